"""What a run needs before it starts: whether a machine can hold it."""

from collections.abc import Sequence

import torch
from torch import nn

from shardwise.core.errors import OptionError
from shardwise.core.mesh import Mesh
from shardwise.core.placement import Shard
from shardwise.core.plan import AnyPlan, Engine, Plan, TheirPlan
from shardwise.parallel.any_plan import name_of
from shardwise.parallel.chunks import chunk_sizes
from shardwise.parallel.claims import claims
from shardwise.parallel.resolve import resolve

# a rank's own footprint beside tensors: the interpreter with torch loaded, measured as VmRSS after import on
# Linux
_PROCESS_BYTES = 300 * 2**20


def state_bytes(model: nn.Module, plan: AnyPlan, mesh: Mesh, dtype: torch.dtype) -> int:
    """Parameters, gradients and AdamW's two moments of the largest rank, exact up to uneven shards of FSDP;
    activations come on top. Of a plan that isn't ours, of which nobody knows what it leaves whole: what it is
    at the least."""
    if not isinstance(plan, Plan):
        whole = sum(parameter.numel() for parameter in model.parameters())
        parts = mesh.fsdp * (1 if plan is TheirPlan.UNSHARDED else mesh.tp)
        return int(4 * whole / parts * dtype.itemsize)
    sharded: dict[str, float] = {}
    named = dict(model.named_parameters(remove_duplicate=False))
    assignments = resolve(model, plan, tp=mesh.tp, fsdp=mesh.fsdp, experts=mesh.experts)
    for name, claim in claims(assignments).items():
        if name not in named:
            continue
        placement, held = claim.held.kept_on(mesh.tp), float(named[name].numel())
        if isinstance(placement, Shard):
            size = named[name].shape[placement.dim]
            held *= chunk_sizes(size, mesh.tp)[0] / size
        if claim.assignment.sharder.is_shared_out(claim.assignment.style):
            held /= mesh.experts
        sharded[name] = held
    parameters = (
        sum(sharded.get(name, parameter.numel()) for name, parameter in model.named_parameters()) / mesh.fsdp
    )
    total = 4 * parameters
    if plan.engine is Engine.DTENSOR and mesh.fsdp == 1:
        for assignment in resolve(model, plan, tp=mesh.tp):
            if assignment.sharder.twin_keeps_whole_gradient:
                total += assignment.module.get_parameter("weight").numel() * (1 - 1 / mesh.tp)
    return int(total * dtype.itemsize)


def refuse_too_large(
    model: nn.Module,
    label: str,
    plans: Sequence[AnyPlan],
    mesh: Mesh,
    dtype: torch.dtype,
    *,
    device_type: str,
    copies: int,
    available: int | None,
) -> None:
    """Raises OptionError where the state alone can't fit. copies: models that are on the device at once."""
    worst = max(plans, key=lambda plan: state_bytes(model, plan, mesh, dtype))
    state = state_bytes(model, worst, mesh, dtype)
    what = f'{label} under "{name_of(worst)}" on {mesh} needs at least {_gib(state)} per rank'
    parts = (
        "(parameters, gradients and AdamW state in "
        + str(dtype).removeprefix("torch.")
        + "; activations come on top)"
    )
    if device_type == "cuda":
        gpu = torch.cuda.get_device_properties(0).total_memory
        if state > gpu:
            raise OptionError(f"{what} {parts}; a GPU here has {_gib(gpu)}. Use a larger tp or an fsdp axis.")
        return
    needed = mesh.world_size * (copies * state + _PROCESS_BYTES)
    if available is not None and needed > available:
        held = f"{copies} plan{'s' * (copies > 1)} held at once"
        raise OptionError(
            f"{what} {parts}, {_gib(needed)} for {mesh.world_size} ranks with {held}; this machine has "
            f"{_gib(available)} available and no GPU in use. Use a smaller model, fewer plans, or a machine "
            "that holds it."
        )


def _gib(n_bytes: float) -> str:
    return f"{n_bytes / 2**30:.1f} GiB"
