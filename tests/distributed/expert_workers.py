"""What the ranks of test_experts.py run: a training step of a mixture of experts under each plan, against one
process."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from unittest.mock import patch

import msgspec
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from shardwise.core.mesh import Mesh
from shardwise.launch import RankContext
from shardwise.step import balance
from shardwise.step.build import build_model, device_mesh
from shardwise.step.portion import Portion
from shardwise.torch_private import local_part
from shardwise.verify.expected import Unsharded, unsharded
from shardwise.verify.proof import prove
from tests.distributed.expert_cases import CASES, Case, batches

CPU = torch.device("cpu")
LARGE = 1e9


class Proved(msgspec.Struct, frozen=True):
    """How far a case is off one process, relative: the largest of output, loss, gradients, norms and weights
    after two steps. findings: what verify says."""

    off: float
    findings: tuple[str, ...]


def built(case: Case, mesh: DeviceMesh | None, *, with_fault: bool = False) -> nn.Module:
    """Sharded over the mesh; without one whole."""
    return build_model(
        case.source, case.plan(with_fault=with_fault) if mesh is not None else None, mesh,
        dtype=torch.float64, device=CPU, seed=3, recompute=case.recompute, on_parameter=case.initial,
    )  # fmt: skip


@cache
def _expected(key: tuple[object, ...]) -> Unsharded:
    case = next(case for case in CASES if _key(case) == key)
    return unsharded(built(case, None), batches(), parts=2)


def _key(case: Case) -> tuple[object, ...]:
    return case.model, case.gate, case.top_k, case.capacity, case.aux_loss


def run(context: RankContext, payload: bytes) -> bytes:
    """Per case of so many ranks, of the telling ones or the rest, by its name: as it is, and with its
    fault."""
    found = {}
    for case in CASES:
        is_asked = case.is_telling == (payload == b"telling")
        if Mesh.parse(case.mesh).world_size != context.world_size or not is_asked:
            continue
        for with_fault in (False, True) if case.has_fault else (False,):
            context.note(case.name)
            with _local_means() if with_fault and case.local_means else nullcontext():
                found[f"{case.name}|{with_fault}"] = _proved(case, with_fault)
    return msgspec.json.encode(found)


def checkpoints(context: RankContext, payload: bytes) -> bytes:
    """Per case of so many ranks, by its name: parameters of which state_dict() gives something else than the
    whole, or load_state_dict() takes something else from it."""
    found = {}
    for case in CASES:
        if Mesh.parse(case.mesh).world_size != context.world_size or not case.has_checkpoint:
            continue
        context.note(case.name)
        mesh = device_mesh(Mesh.parse(case.mesh), "cpu")
        whole = built(case, None).state_dict()
        model, other = built(case, mesh), built(case, mesh)
        state = model.state_dict()
        wrong = [name for name, value in state.items() if not torch.equal(_whole(value), whole[name])]
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        other.load_state_dict(whole)
        for name, parameter in other.named_parameters():
            if not torch.equal(local_part(parameter), local_part(model.get_parameter(name))):
                wrong.append(f"{name}, loaded")
        found[case.name] = wrong + sorted(whole.keys() ^ state.keys())
    return msgspec.json.encode(found)


def _whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


@contextmanager
def _local_means() -> Iterator[None]:
    """Ranks keep the means of their routers to themselves."""
    with patch.object(balance, "sum_over_now", lambda *_: None):
        yield


def _proved(case: Case, with_fault: bool) -> Proved:
    mesh = device_mesh(Mesh.parse(case.mesh), "cpu")
    make = partial(built, case, with_fault=with_fault)
    portion = Portion.on(mesh, case.accumulation)
    proof, findings = prove(make(mesh), _expected(_key(case)), partial(make, None), portion)
    after = (proof.norm_error, proof.weights_error)
    off = max(proof.output_error, proof.loss_error, proof.worst_gradient_error)
    off = max(off, *(number if number is not None else LARGE for number in after))
    off = min(off, LARGE)
    return Proved(off, tuple(f"{each.subject}: {each.reason}" for each in findings))
