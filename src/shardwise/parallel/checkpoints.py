"""What state_dict() and load_state_dict() of a sharded module speak of: whole tensors, in the model's own
order.

A parameter that is kept in another order than a DTensor's shards say (an interleaved table, a weight cut in
pieces) is given back in its own (an all-to-all of its parts; all ranks must call it) and taken in it, so
checkpoints know nothing of plans. An optimizer's own state_dict() has its state as the parameter is kept, for
the same plan and tp size; train/checkpoints/ saves that in the model's own order too.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Replicate as TorchReplicate
from torch.distributed.tensor import Shard as TorchShard

from shardwise.core.errors import PlanError
from shardwise.core.placement import Shard
from shardwise.parallel.axis import Site
from shardwise.parallel.chunks import chunk_sizes
from shardwise.parallel.exchanges import swap_rows_now
from shardwise.parallel.ownership import Order, RowOwnership
from shardwise.parallel.parameters import as_part_like, part_of_dtensor
from shardwise.torch_private import StridedShard


def take_whole_tensors(module: nn.Module, orders: Mapping[str, Order]) -> None:
    """Lets load_state_dict() take plain whole tensors too, of which each rank keeps its part. orders: of the
    parameters that aren't kept in the model's own."""

    def before_load(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        for name, parameter in module.named_parameters(recurse=False):
            value = state.get(f"{prefix}{name}")
            if (
                not isinstance(parameter, DTensor)
                or not isinstance(value, Tensor)
                or isinstance(value, DTensor)
            ):
                continue
            if value.shape == parameter.shape:  # a wrong shape gets load_state_dict's own message
                state[f"{prefix}{name}"] = part_of_dtensor(value.detach(), parameter, orders.get(name))

    module.register_load_state_dict_pre_hook(before_load)


def keep_in_order(module: nn.Module, name: str, order: Order, site: Site) -> None:
    """Makes state_dict() and load_state_dict() speak of the module's parameter `name` in the model's own
    order. To be called before take_whole_tensors(), which has whole tensors in their place."""
    kept_as = _Kept(order, site)

    def after_state_dict(_: nn.Module, state: dict[str, Any], prefix: str, __: Any) -> None:
        key = f"{prefix}{name}"
        state[key] = kept_as.in_own_order(state[key].detach())

    def before_load(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        kept, value = getattr(module, name), state.get(f"{prefix}{name}")
        assert isinstance(kept, DTensor)
        if not isinstance(value, Tensor) or value.shape != kept.shape:
            return  # load_state_dict has a message of its own
        kept_as.check_mesh(kept)
        if isinstance(value, DTensor):
            state[f"{prefix}{name}"] = kept_as.as_kept(value.detach(), kept)

    module.register_state_dict_post_hook(after_state_dict)
    module.register_load_state_dict_pre_hook(before_load)


class _Kept:
    """The way between the order in which an axis' ranks keep a tensor and its own, in which each rank has a
    chunk."""

    def __init__(self, order: Order, site: Site) -> None:
        self._order, self._site = order, site
        axis = site.axis
        owner = torch.empty(order.size, dtype=torch.int64)
        for rank in range(axis.size):
            owner[order.ids_of(rank)] = rank
        sizes = chunk_sizes(order.size, axis.size)
        own_ids, first = order.ids_of(axis.rank), sum(sizes[: axis.rank])
        owners = owner[first : first + sizes[axis.rank]]
        self._to_chunk = torch.bincount(own_ids // max(1, sizes[0]), minlength=axis.size).tolist()
        self._to_owner = torch.bincount(owners, minlength=axis.size).tolist()
        self._by_owner = torch.argsort(owners, stable=True)

    def check_mesh(self, kept: DTensor) -> None:
        if isinstance(self._order, RowOwnership) and kept.device_mesh.size() > self._site.axis.size:
            raise PlanError(
                f"{self._site.module}: rule {self._site.rule} interleaves its rows, and FSDP has cut them "
                f"again over a mesh of {kept.device_mesh.shape}, so no checkpoint can tell their order. Use "
                'ownership = "contiguous".'
            )

    def in_own_order(self, kept: DTensor) -> DTensor:
        self.check_mesh(kept)
        rows = self._part_on_axis(kept)
        received = self._swap(rows, self._to_chunk, self._to_owner)  # ids ascend, so they are sorted by chunk
        own = torch.empty_like(received)
        own[self._by_owner.to(own.device)] = received
        return self._cut_again(own, kept)

    def as_kept(self, value: Tensor, kept: DTensor) -> DTensor:
        """value: in its own order, cut over the same ranks."""
        rows = self._part_on_axis(value)
        by_owner = rows[self._by_owner.to(rows.device)]
        return self._cut_again(self._swap(by_owner, self._to_owner, self._to_chunk), kept)

    def _swap(self, rows: Tensor, send: list[int], receive: list[int]) -> Tensor:
        placement = Shard(self._order.dim)
        origin = self._site.origin(placement, placement)
        return swap_rows_now(rows, send, receive, self._site.axis, origin)

    def _part_on_axis(self, tensor: Tensor) -> Tensor:
        """This rank's part over the axis alone, with the dim that is kept in an order first."""
        assert isinstance(tensor, DTensor)
        axis, mesh = self._site.axis, tensor.device_mesh
        if mesh.size() > axis.size:  # FSDP has cut it further
            on_axis = [
                TorchShard(self._order.dim) if name == axis.mesh_name else TorchReplicate()
                for name in mesh.mesh_dim_names or ()
            ]
            tensor = tensor.redistribute(placements=on_axis)
        return tensor.to_local().movedim(self._order.dim, 0)

    def _cut_again(self, rows: Tensor, like: DTensor) -> DTensor:
        """The inverse of _part_on_axis."""
        part, mesh = rows.movedim(0, self._order.dim), like.device_mesh
        if mesh.size() > self._site.axis.size:
            for index, (name, placement) in enumerate(
                zip(mesh.mesh_dim_names or (), like.placements, strict=True)
            ):
                # FSDP2 cuts what this rank has over the axis, whatever PyTorch calls that
                if name != self._site.axis.mesh_name and isinstance(placement, TorchShard | StridedShard):
                    sizes = chunk_sizes(part.shape[placement.dim], mesh.size(index))
                    rank = mesh.get_local_rank(index)
                    part = part.narrow(placement.dim, sum(sizes[:rank]), sizes[rank])
        return as_part_like(part.contiguous(), like)


def speak_of_whole_tensors(model: nn.Module, orders: Mapping[int, tuple[Order, Site]]) -> dict[str, Order]:
    """Of every module with sharded parameters. orders: by the id of a parameter that isn't kept in the
    model's own. Returns those by all names of the parameters."""
    for module in model.modules():
        own = {name: p for name, p in module.named_parameters(recurse=False) if isinstance(p, DTensor)}
        ordered = {name: orders[id(p)] for name, p in own.items() if id(p) in orders}
        for name, (order, site) in ordered.items():
            keep_in_order(module, name, order, site)
        if own:
            take_whole_tensors(module, {name: order for name, (order, _) in ordered.items()})
    named = model.named_parameters(remove_duplicate=False)
    return {name: orders[id(parameter)][0] for name, parameter in named if id(parameter) in orders}
