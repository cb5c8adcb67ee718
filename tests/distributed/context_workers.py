"""What the ranks of test_context.py run: steps on sequences that ranks share, against one process; and with a
fault planted."""

from functools import cache, partial
from typing import Any

import msgspec
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from shardwise.core.errors import ShardwiseError
from shardwise.core.mesh import Mesh
from shardwise.launch import RankContext
from shardwise.step.build import build_model, device_mesh
from shardwise.step.portion import Portion
from shardwise.step.train import TrainStep
from shardwise.verify.expected import Unsharded, shake, unsharded
from shardwise.verify.proof import gradient_errors, prove
from tests.distributed.context_cases import OURS, ContextCase, batches, context_cases, packed
from tests.distributed.context_faults import FAULTS

CPU = torch.device("cpu")


class Off(msgspec.Struct, frozen=True):
    """How far a case is off one process, the worst of everything that is compared; relative. findings: what
    verify says."""

    worst: float
    findings: tuple[str, ...] = ()
    refused: str = ""


def built(case: ContextCase, mesh: DeviceMesh | None) -> nn.Module:
    """Sharded over the mesh; without one whole."""
    return build_model(
        case.source,
        case.plan if mesh is not None else None,
        mesh,
        dtype=torch.float64,
        device=CPU,
        seed=3,
        recompute=case.recompute,
        on_parameter=shake,
    )


@cache
def expected_of(model: str) -> Unsharded:
    return unsharded(built(ContextCase(model, "", "gather"), None), batches(), parts=2)


def run(context: RankContext, payload: bytes) -> bytes:
    """Per case, of the telling ones or the rest; or per fault."""
    found: dict[str, Off] = {}
    if payload == b"faults":
        case = ContextCase("llama", "cp=2", "gather", plan_name="rowwise")
        expected_of(case.model)  # before a fault is planted
        for fault in FAULTS:
            context.note(fault.name)
            with fault.plant():
                found[fault.name] = _off(msgspec.structs.replace(case, way=fault.way))
        return msgspec.json.encode(found)
    for case in context_cases(context.world_size):
        if case.is_telling != (payload == b"telling"):
            continue
        context.note(case.name)
        try:
            found[case.name] = _packed_off(case) if case.has_documents else _off(case)
        except ShardwiseError as error:
            found[case.name] = Off(0, (), str(error))
    return msgspec.json.encode(found)


def _off(case: ContextCase) -> Off:
    """Outputs, loss, every gradient, and norms and weights after two steps."""
    mesh = device_mesh(Mesh.parse(case.mesh), "cpu")
    expected = expected_of(case.model)
    proof, findings = prove(built(case, mesh), expected, partial(built, case, None), Portion.on(mesh))
    errors = (proof.output_error, proof.loss_error, proof.worst_gradient_error, proof.norm_error)
    return Off(
        max(*(error if error is not None else 0.0 for error in errors), proof.weights_error or 0.0),
        tuple(f"{each.subject}: {each.reason}" for each in findings),
    )


class _WithDocuments(nn.Module):
    """A step's model, told this rank's part of the packed documents."""

    def __init__(self, model: nn.Module, told: dict[str, Tensor]) -> None:
        super().__init__()
        self.inner, self.told = model, told

    def forward(self, ids_BS: Tensor) -> Tensor:
        logits: Tensor = self.inner(ids_BS, **self.told)
        return logits


def _packed_off(case: ContextCase) -> Off:
    """Loss and every gradient of a step on packed documents."""
    ids_BS, labels_BS = batches()[0]
    positions, documents = packed()

    def gradients(mesh: DeviceMesh | None) -> tuple[float, nn.Module, dict[str, Any]]:
        portion = Portion.on(mesh) if mesh is not None else Portion()
        told = {"position_ids": portion.of(positions)[0]}
        if case.model in OURS:
            told["documents"] = portion.of(documents)[0]
        model = built(case, mesh)
        step = TrainStep(_WithDocuments(model, told), mesh=mesh)
        loss = step.gradients(portion.cut(ids_BS, labels_BS))
        return float(loss), model, {name: each.grad for name, each in model.named_parameters()}

    loss, _, whole = gradients(None)
    own_loss, model, own = gradients(device_mesh(Mesh.parse(case.mesh), "cpu"))
    errors = gradient_errors(model, own, whole, {})
    return Off(max(abs(own_loss / loss - 1), *(each.relative for each in errors.values())))
