"""What the ranks of test_meshes.py run: one training step on every mesh, against one process; and what it
issued."""

from dataclasses import replace
from functools import cache, partial
from unittest.mock import patch

import msgspec
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh

from shardwise.core.errors import ShardwiseError
from shardwise.core.mesh import Mesh, joined
from shardwise.core.program import Phase
from shardwise.launch import RankContext
from shardwise.measure.sockets import sent_bytes, sent_since
from shardwise.step.build import build_model, device_mesh
from shardwise.step.gradient_sums import GradientSums
from shardwise.step.groups import make_groups
from shardwise.step.portion import Portion
from shardwise.step.train import TrainStep, mixed_precision
from shardwise.verify.expected import Unsharded, shake, unsharded
from shardwise.verify.proof import prove
from shardwise.verify.rounded import is_mixed, loosened
from tests.distributed.c10d_log import Issued, ranks_of, writing_down
from tests.distributed.mesh_cases import FAULTS, Fault, MeshCase, batches, mesh_cases

CPU = torch.device("cpu")
_NOT_RUN = 1e9  # of steps that a wrong gradient spares; JSON has no word for infinite


class Proved(msgspec.Struct, frozen=True):
    """How far a case is off one process: outputs, loss, worst gradient, gradient norms and weights after two
    steps; relative. findings: what verify says. issued: by this rank, in the step after these. sent_bytes:
    what its sockets sent in that step, if the system tells."""

    output: float
    loss: float
    gradient: float
    norm: float
    weights: float
    findings: tuple[str, ...]
    issued: list[Issued] = []
    sent_bytes: int | None = None
    refused: str = ""


def built(case: MeshCase, mesh: DeviceMesh | None) -> nn.Module:
    """Sharded over the mesh; without one whole."""
    return build_model(
        case.spec,
        case.plan if mesh is not None else None,
        mesh,
        dtype=torch.float64,
        device=CPU,
        seed=3,
        policy=mixed_precision(case.settings),
        reshard=case.reshard,
        pipeline=case.settings.pipeline(Mesh.parse(case.mesh)) if mesh is not None else None,
        recompute=case.recompute,
        on_parameter=shake,
    )


@cache
def expected_of(model: str, stages: int, portion: Portion) -> Unsharded:
    """stages: of which each has a layer. portion: of one process."""
    return unsharded(built(MeshCase(model, f"pp={stages}"), None), batches(), parts=2, portion=portion)


def run(context: RankContext, payload: bytes) -> bytes:
    """Per case, of the telling ones or the rest, by its name; and per fault, with the telling ones."""
    found = {}
    for fault in FAULTS if payload == b"telling" else ():
        if fault.case.world_size == context.world_size:
            context.note(fault.name)
            found[fault.name] = _with_fault(fault)
    for case in mesh_cases(context.world_size):
        if case.is_telling != (payload == b"telling"):
            continue
        context.note(case.name)
        try:
            mesh = device_mesh(Mesh.parse(case.mesh), "cpu")
            model, portion = built(case, mesh), _portion(case, mesh)
            proved = _proved(case, model, portion)
            issued, sent = _issued(case, model, mesh, portion)
            found[case.name] = msgspec.structs.replace(proved, issued=issued, sent_bytes=sent)
        except ShardwiseError as error:
            found[case.name] = Proved(0, 0, 0, 0, 0, (), refused=str(error))
    return msgspec.json.encode(found)


def _with_fault(fault: Fault) -> Proved:
    mesh = device_mesh(Mesh.parse(fault.mesh), "cpu")
    model = built(fault.case, mesh)
    right = GradientSums.axes_of

    def axes_of(sums: GradientSums, parameter: Tensor) -> tuple[str, ...]:
        axes = right(sums, parameter)
        is_meant = parameter is model.get_parameter(fault.parameter)
        return tuple(name for name in axes if not (is_meant and name in fault.unsummed))

    portion = _portion(fault.case, mesh)
    with patch.object(GradientSums, "axes_of", axes_of):
        return _proved(fault.case, model, portion)


def _portion(case: MeshCase, mesh: DeviceMesh) -> Portion:
    return Portion.on(mesh, case.settings.accumulation, reduce_once=case.reduce_once)


def _proved(case: MeshCase, model: nn.Module, portion: Portion) -> Proved:
    expected = expected_of(case.model, case.stages, portion.of_one_process)
    whole = partial(built, case, None)
    policy = mixed_precision(case.settings)
    if is_mixed(policy):
        expected = loosened(expected, whole, policy, "cpu")
    proof, findings = prove(model, expected, whole, portion)
    return Proved(
        proof.output_error,
        proof.loss_error,
        proof.worst_gradient_error,
        _NOT_RUN if proof.norm_error is None else proof.norm_error,
        _NOT_RUN if proof.weights_error is None else proof.weights_error,
        tuple(f"{each.subject}: {each.reason}" for each in findings),
    )


def _issued(
    case: MeshCase, model: nn.Module, mesh: DeviceMesh, portion: Portion
) -> tuple[list[Issued], int | None]:
    """model: that has taken a step, and so made what it makes once."""
    phases = [Phase.FORWARD]
    step = TrainStep(model, mesh=mesh, reduce_once=case.reduce_once, on_phase=phases.append)
    batch = portion.cut(*batches()[0])
    issued: list[Issued] = []
    distributed.barrier()
    before = sent_bytes()
    with writing_down(issued, lambda: str(phases[-1])):
        step(batch)
    distributed.barrier()  # what gloo's threads have still to send is sent
    sent = sent_since(before)
    distributed.barrier()  # where a rank ends, the other's sockets close, and what they sent is forgotten
    axes = {ranks_of(group): joined(names) for names, group in make_groups(mesh).items()}
    return [replace(call, group=axes[call.group]) for call in issued], sent
