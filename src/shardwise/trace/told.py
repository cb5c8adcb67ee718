"""What modules and styles tell of the collectives that a trace has seen: what the module is, and why it
issues one."""

from collections.abc import Iterable, Iterator
from dataclasses import replace

from torch import nn
from torch.distributed.tensor import DTensor

from shardwise.core.collective import TO_ONE_RANK
from shardwise.core.mesh import Role, role_of
from shardwise.core.placement import Shard
from shardwise.core.program import Collective, Item, Phase
from shardwise.parallel.kinds import kind_of
from shardwise.parallel.styles import reasons_of
from shardwise.trace.placements import from_torch


def told(items: Iterable[Item], model: nn.Module) -> Iterator[Item]:
    """The same items; collectives with the kind of their module, and the sentence of its style."""
    modules = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
    for item in items:
        # why a tensor goes to one other rank, whoever asks for it has said
        if isinstance(item, Collective) and item.module in modules and item.call.kind not in TO_ONE_RANK:
            yield _told(item, modules[item.module])
        else:
            yield item


def _told(collective: Collective, module: nn.Module) -> Collective:
    kind = kind_of(module)
    if collective.reason is not None or role_of(collective.call.axis) is not Role.CUTS_TENSORS:
        return replace(collective, module_kind=kind)
    reasons = reasons_of(module, collective.rule, _cut_dim(module, collective.call.axis))
    if reasons is None:
        return replace(collective, module_kind=kind)
    is_backward = collective.phase is Phase.BACKWARD
    return replace(collective, module_kind=kind, reason=reasons.backward if is_backward else reasons.forward)


def _cut_dim(module: nn.Module, axis: str) -> int | None:
    """The dim of the module's weight that is cut over an axis."""
    weight = getattr(module, "weight", None)
    names = weight.device_mesh.mesh_dim_names or () if isinstance(weight, DTensor) else ()
    if not isinstance(weight, DTensor) or axis not in names:
        return None
    placement = from_torch(weight.placements[names.index(axis)])
    return placement.dim % weight.dim() if isinstance(placement, Shard) else None
