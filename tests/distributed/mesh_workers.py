"""What the ranks of test_meshes.py run: one training step on every mesh, against one process; and what it
issued."""

from dataclasses import replace
from functools import cache, partial

import msgspec
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from shardwise.core.errors import ShardwiseError
from shardwise.core.mesh import Mesh, joined
from shardwise.core.program import Phase
from shardwise.launch import RankContext
from shardwise.step.build import build_model, device_mesh
from shardwise.step.groups import make_groups
from shardwise.step.portion import Portion
from shardwise.step.train import TrainStep
from shardwise.verify.expected import Unsharded, shake, unsharded
from shardwise.verify.proof import prove
from tests.distributed.c10d_log import Issued, ranks_of, writing_down
from tests.distributed.mesh_cases import MeshCase, batches, mesh_cases

CPU = torch.device("cpu")


class Proved(msgspec.Struct, frozen=True):
    """How far a case is off one process: outputs, loss, worst gradient, gradient norms and weights after two
    steps; relative. findings: what verify says. issued: by this rank, in a step after the first."""

    output: float
    loss: float
    gradient: float
    norm: float
    weights: float
    findings: tuple[str, ...]
    issued: list[Issued]
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
        reshard=case.reshard,
        recompute=case.recompute,
        on_parameter=shake,
    )


@cache
def expected_of(model: str) -> Unsharded:
    return unsharded(built(MeshCase(model, ""), None), batches(), parts=2)


def run(context: RankContext, payload: bytes) -> bytes:
    """Per case, of the telling ones or the rest, by its name."""
    found = {}
    for case in mesh_cases(context.world_size):
        if case.is_telling != (payload == b"telling"):
            continue
        context.note(case.name)
        try:
            found[case.name] = _proved(case)
        except ShardwiseError as error:
            found[case.name] = Proved(0, 0, 0, 0, 0, (), [], str(error))
    return msgspec.json.encode(found)


def _proved(case: MeshCase) -> Proved:
    mesh = device_mesh(Mesh.parse(case.mesh), "cpu")
    portion = Portion.on(mesh, case.accumulation, reduce_once=case.reduce_once)
    proof, findings = prove(built(case, mesh), expected_of(case.model), partial(built, case, None), portion)
    return Proved(
        proof.output_error,
        proof.loss_error,
        proof.worst_gradient_error,
        proof.norm_error if proof.norm_error is not None else float("inf"),
        proof.weights_error if proof.weights_error is not None else float("inf"),
        tuple(f"{each.subject}: {each.reason}" for each in findings),
        _issued(case, mesh, portion),
    )


def _issued(case: MeshCase, mesh: DeviceMesh, portion: Portion) -> list[Issued]:
    phases = [Phase.FORWARD]
    step = TrainStep(built(case, mesh), mesh=mesh, reduce_once=case.reduce_once, on_phase=phases.append)
    batch = portion.cut(*batches()[0])
    step(batch)
    issued: list[Issued] = []
    phases.append(Phase.FORWARD)
    with writing_down(issued, lambda: str(phases[-1])):
        step(batch)
    axes = {ranks_of(group): joined(names) for names, group in make_groups(mesh).items()}
    return [replace(call, group=axes[call.group]) for call in issued]
