"""Parameters of the native engine: DTensors cut from whole tensors, the order of their rows in checkpoints, and the reduction of
the gradients of replicated parameters of which every rank computed a part.

An interleaved table keeps its rows in another order than a DTensor's shards say. state_dict() gives them back in the order of their
ids (an all-to-all of rows; all ranks must call it), load_state_dict() takes that order, so checkpoints know nothing of ownership.
An optimizer's state follows the rows as they are kept: resume it with the same plan and tp size.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Partial as TorchPartial
from torch.distributed.tensor import Placement as TorchPlacement
from torch.distributed.tensor import Replicate as TorchReplicate
from torch.distributed.tensor import Shard as TorchShard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from shardwise.core.collective import Origin
from shardwise.core.placement import Partial, Placement, Replicate, Shard
from shardwise.core.plan import Ownership
from shardwise.parallel.axis import Axis
from shardwise.parallel.collectives import chunk_sizes, sum_now, swap_rows_now
from shardwise.parallel.ownership import RowOwnership


def to_torch(placement: Placement) -> TorchPlacement:
    """Our placement as PyTorch's."""
    match placement:
        case Shard(dim):
            return TorchShard(dim)
        case Replicate():
            return TorchReplicate()
        case Partial():
            return TorchPartial()


def as_dtensor(local: Tensor, whole: torch.Size, placement: Placement, axis: Axis) -> DTensor:
    """A local tensor as this rank's part of a contiguous one of shape `whole`."""
    stride = torch.empty(whole, device="meta").stride()
    return DTensor.from_local(local, axis.mesh, [to_torch(placement)], run_check=False, shape=whole, stride=stride)


def own_part(whole: Tensor, placement: Placement, axis: Axis, ownership: RowOwnership | None = None) -> Tensor:
    """This rank's part of a whole tensor, as memory of its own."""
    match placement:
        case Shard(0) if ownership is not None and ownership.kind is Ownership.INTERLEAVED:
            return whole.index_select(0, ownership.ids_of(axis.rank).to(whole.device))
        case Shard(dim):
            sizes = chunk_sizes(whole.shape[dim], axis.size)
            return whole.narrow(dim, sum(sizes[: axis.rank]), sizes[axis.rank]).clone(memory_format=torch.contiguous_format)
        case _:
            return whole.clone(memory_format=torch.contiguous_format)


def shard_parameter(parameter: nn.Parameter, placement: Placement, axis: Axis, ownership: RowOwnership | None) -> nn.Parameter:
    """The DTensor parameter that takes the place of a whole one (real or meta)."""
    if isinstance(parameter, DTensor):
        raise AssertionError("the parameter is a DTensor already")
    local = own_part(parameter.detach(), placement, axis, ownership)
    return nn.Parameter(as_dtensor(local, parameter.shape, placement, axis), requires_grad=parameter.requires_grad)


def local_weight(parameter: Tensor, grad_placement: Placement) -> Tensor:
    """The local tensor of a parameter for use in a forward, telling autograd what its gradient will be."""
    if not isinstance(parameter, DTensor):
        raise AssertionError("the parameter is no DTensor: was it replaced after parallelize()?")
    return parameter.to_local(grad_placements=[to_torch(grad_placement)])


def fill(model: nn.Module, whole_of: Callable[[str, torch.Size], Tensor], row_order: dict[str, RowOwnership]) -> None:
    """Gives every parameter its values: `whole_of(name, shape)` returns the whole tensor, of which this rank keeps its part.

    Meta parameters become real on the device of what `whole_of` returns. row_order: parameters whose rows are interleaved.
    """
    replaced: dict[int, nn.Parameter] = {}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if id(parameter) not in replaced:
            whole = whole_of(name, parameter.shape)
            replaced[id(parameter)] = nn.Parameter(_part_for(parameter, whole, row_order.get(name)), requires_grad=parameter.requires_grad)
            del whole
        module_name, _, own_name = name.rpartition(".")
        setattr(model.get_submodule(module_name), own_name, replaced[id(parameter)])


def _part_for(parameter: Tensor, whole: Tensor, ownership: RowOwnership | None) -> Tensor:
    if not isinstance(parameter, DTensor):
        return whole
    return part_of_dtensor(whole, parameter, ownership)


def part_of_dtensor(whole: Tensor, like: DTensor, ownership: RowOwnership | None = None) -> DTensor:
    """A whole tensor cut as `like` is cut, on any mesh. Partial axes can't be cut."""
    if ownership is not None and ownership.kind is Ownership.INTERLEAVED:
        whole = whole.index_select(0, torch.cat([ownership.ids_of(rank) for rank in range(ownership.axis_size)]).to(whole.device))
    shape, offset = compute_local_shape_and_global_offset(like.shape, like.device_mesh, like.placements)
    part = whole[tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))]
    return DTensor.from_local(
        part.clone(memory_format=torch.contiguous_format),
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )


def keep_rows_in_order(module: nn.Module, ownership: RowOwnership, axis: Axis, origin: Origin) -> None:
    """Makes state_dict() and load_state_dict() of `module.weight` speak of rows in the order of their ids."""
    own_ids = ownership.ids_of(axis.rank)
    sizes = chunk_sizes(ownership.vocab_size, axis.size)
    first = sum(sizes[: axis.rank])
    to_chunk = torch.bincount(own_ids // max(1, sizes[0]), minlength=axis.size).tolist()
    chunk_ids = torch.arange(first, first + sizes[axis.rank])
    owners = ownership.owner(chunk_ids)
    order = torch.argsort(owners, stable=True)
    to_owner = torch.bincount(owners, minlength=axis.size).tolist()

    def in_order_of_ids(kept: DTensor) -> DTensor:
        received = swap_rows_now(kept.to_local(), to_chunk, to_owner, axis, origin)
        natural = torch.empty_like(received)
        natural[order.to(received.device)] = received
        return as_dtensor(natural, kept.shape, Shard(0), axis)

    def as_kept(natural: Tensor) -> DTensor:
        if not isinstance(natural, DTensor):
            return as_dtensor(natural.index_select(0, own_ids.to(natural.device)), natural.shape, Shard(0), axis)
        sorted_rows = natural.to_local()[order.to(natural.device)]
        return as_dtensor(swap_rows_now(sorted_rows, to_owner, to_chunk, axis, origin), natural.shape, Shard(0), axis)

    def after_state_dict(_: nn.Module, state: dict[str, Any], prefix: str, __: Any) -> None:
        state[f"{prefix}weight"] = in_order_of_ids(state[f"{prefix}weight"].detach())

    def before_load(_: nn.Module, state: dict[str, Any], prefix: str, *__: Any) -> None:
        if f"{prefix}weight" in state:
            state[f"{prefix}weight"] = as_kept(state[f"{prefix}weight"].detach())

    module.register_state_dict_post_hook(after_state_dict)
    module.register_load_state_dict_pre_hook(before_load)


def take_whole_tensors(module: nn.Module) -> None:
    """Lets load_state_dict() take plain whole tensors too, of which each rank keeps its part."""

    def before_load(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        for name, parameter in module.named_parameters(recurse=False):
            value = state.get(f"{prefix}{name}")
            if not isinstance(parameter, DTensor) or not isinstance(value, Tensor) or isinstance(value, DTensor):
                continue
            if value.shape == parameter.shape:  # a wrong shape gets load_state_dict's own message
                state[f"{prefix}{name}"] = part_of_dtensor(value, parameter)

    module.register_load_state_dict_pre_hook(before_load)


class PartialGradients:
    """Sums, at the end of every backward, the gradients of replicated parameters of which each rank computed a part.

    One flattened all-reduce per dtype. Afterwards `.grad` is Replicate, like its parameter; what earlier backwards had accumulated is
    added to. Parameters that FSDP2 manages are left alone: FSDP2 sums their Partial gradients itself.
    """

    def __init__(self, model: nn.Module, parameters: Iterable[tuple[nn.Module, str]], axis: Axis, origin: Origin) -> None:
        self._model = model
        self._places = tuple(parameters)
        self._axis = axis
        self._origin = origin
        self._watched: set[int] = set()
        self._earlier: dict[int, DTensor | None] = {}
        self._arrived: list[nn.Parameter] = []
        self._backward = -1
        self.watch()
        model.register_forward_pre_hook(lambda *_: self.watch())

    def watch(self) -> None:
        """Hooks the parameters as they are now: they may have been replaced since (filled, moved off meta, wrapped by FSDP2)."""
        new = [p for module, name in self._places if id(p := getattr(module, name)) not in self._watched]
        if not new:
            return
        self._watched.update(map(id, new))
        if _managed_by_fsdp(self._model) or self._axis.size == 1:
            return
        for parameter in new:
            if parameter.requires_grad and not parameter.is_meta:
                parameter.register_hook(lambda _, parameter=parameter: self._before_accumulation(parameter))
                parameter.register_post_accumulate_grad_hook(self._after_accumulation)

    def _before_accumulation(self, parameter: nn.Parameter) -> None:
        task = torch._C._current_graph_task_id()
        if task != self._backward:  # a new backward; a former one may have ended by an exception
            self._backward = task
            self._earlier.clear()
            self._arrived.clear()
            torch.autograd.Variable._execution_engine.queue_callback(self._reduce)
        # a sum must not mix what is reduced already with a part that isn't
        self._earlier[id(parameter)] = parameter.grad  # type: ignore[assignment]
        parameter.grad = None

    def _after_accumulation(self, parameter: Tensor) -> None:
        self._arrived.append(parameter)  # type: ignore[arg-type]

    def _reduce(self) -> None:
        by_dtype: dict[torch.dtype, list[nn.Parameter]] = {}
        for parameter in self._arrived:
            by_dtype.setdefault(parameter.dtype, []).append(parameter)
        for parameters in by_dtype.values():
            parts = [parameter.grad.to_local() for parameter in parameters]  # type: ignore[union-attr]
            flat = parts[0].view(-1) if len(parts) == 1 else torch.cat([part.reshape(-1) for part in parts])
            sum_now(flat, self._axis, self._origin)
            for parameter, summed in zip(parameters, flat.split([part.numel() for part in parts]), strict=True):
                grad = as_dtensor(summed.view(parameter.shape), parameter.shape, Replicate(), self._axis)
                earlier = self._earlier.get(id(parameter))
                parameter.grad = grad if earlier is None else earlier + grad
        self._earlier.clear()
        self._arrived.clear()


def _managed_by_fsdp(model: nn.Module) -> bool:
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in model.modules())
