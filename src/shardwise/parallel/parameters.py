"""Parameters of the native engine: DTensors cut from whole tensors, in the order in which ranks keep them,
and the reduction of the gradients of replicated parameters of which every rank computed a part."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor import Partial as TorchPartial
from torch.distributed.tensor import Placement as TorchPlacement
from torch.distributed.tensor import Replicate as TorchReplicate
from torch.distributed.tensor import Shard as TorchShard
from torch.utils.hooks import RemovableHandle

from shardwise.core.collective import Origin
from shardwise.core.errors import ModelError
from shardwise.core.mesh import Role, role_of
from shardwise.core.placement import Partial, Placement, Replicate, Shard
from shardwise.parallel.axis import Axis
from shardwise.parallel.chunks import chunk_sizes
from shardwise.parallel.exchanges import sum_now
from shardwise.parallel.ownership import Order
from shardwise.torch_private import (
    StridedShard,
    after_backward,
    graph_task,
    hooks_of,
    local_shape_and_offset,
    parameters_of,
    set_hooks_again,
)


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
    return DTensor.from_local(
        local, axis.mesh, [to_torch(placement)], run_check=False, shape=whole, stride=stride
    )


def own_part(whole: Tensor, placement: Placement, axis: Axis, order: Order | None = None) -> Tensor:
    """This rank's part of a whole tensor, as memory of its own."""
    match placement:
        case Shard(dim) if order is not None:
            return whole.index_select(dim, order.ids_of(axis.rank).to(whole.device))
        case Shard(dim):
            sizes = chunk_sizes(whole.shape[dim], axis.size)
            return whole.narrow(dim, sum(sizes[: axis.rank]), sizes[axis.rank]).clone(
                memory_format=torch.contiguous_format
            )
        case _:
            return whole.clone(memory_format=torch.contiguous_format)


@dataclass(frozen=True, slots=True)
class Cut:
    """How a parameter is held over one axis. order: of what is cut, where ranks keep it in another than its
    own."""

    placement: Placement
    axis: Axis
    order: Order | None = None


def shard_parameter(parameter: nn.Parameter, cuts: Sequence[Cut], mesh: DeviceMesh) -> nn.Parameter:
    """The DTensor parameter that takes the place of a whole one (real or meta). cuts: over each axis of
    `mesh`."""
    if isinstance(parameter, DTensor):
        raise AssertionError("the parameter is a DTensor already")
    local = parameter.detach()
    for cut in cuts:
        local = own_part(local, cut.placement, cut.axis, cut.order)
    stride = torch.empty(parameter.shape, device="meta").stride()
    placements = [to_torch(cut.placement) for cut in cuts]
    held = DTensor.from_local(local, mesh, placements, run_check=False, shape=parameter.shape, stride=stride)
    return nn.Parameter(held, requires_grad=parameter.requires_grad)


def local_weight(parameter: Tensor, grad_placement: Placement) -> Tensor:
    """The local tensor of a parameter for use in a forward, telling autograd what its gradient will be. A
    module around may have put it there already."""
    if not isinstance(parameter, DTensor):
        if type(parameter) is nn.Parameter:  # isinstance takes a DTensor's local tensor for one, too
            raise AssertionError("the parameter is no DTensor: was it replaced after parallelize()?")
        return parameter
    # over the axis of experts, which comes first, it is cut
    outer = parameter.placements[:-1]
    return parameter.to_local(grad_placements=[*outer, to_torch(grad_placement)])


def is_cut_further(parameter: Tensor) -> bool:
    """Whether another than the native engine has cut it, over axes of its own: FSDP2, which makes it whole
    along those in its module's own call."""
    if not isinstance(parameter, DTensor):
        return False
    mesh, ours = parameter.device_mesh, (Role.CUTS_EXPERTS, Role.CUTS_TENSORS)
    names = mesh.mesh_dim_names or ("",) * mesh.ndim
    return mesh.ndim > 1 and any(role_of(name) not in ours for name in names)


def fill(
    model: nn.Module, whole_of: Callable[[str, torch.Size], Tensor], row_order: Mapping[str, Order]
) -> None:
    """Gives every parameter its values: `whole_of(name, shape)` returns the whole tensor, of which this rank
    keeps its part.

    Meta parameters become real on the device of what `whole_of` returns, and keep the hooks that a factory
    has put on them. row_order: of parameters that aren't kept in their own.
    """
    replace_values(
        model,
        lambda name, parameter: _part_for(parameter, whole_of(name, parameter.shape), row_order.get(name)),
    )


def replace_values(model: nn.Module, value_of: Callable[[str, nn.Parameter], Tensor]) -> None:
    """Puts new parameters in the place of all, tied ones tied, with their hooks. value_of: by the first name
    and the parameter, what the new one holds; where that is a DTensor, one."""
    replaced: dict[int, nn.Parameter] = {}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if id(parameter) not in replaced:
            filled = nn.Parameter(value_of(name, parameter), requires_grad=parameter.requires_grad)
            _move_hooks(parameter, filled)
            replaced[id(parameter)] = filled
        module_name, _, own_name = name.rpartition(".")
        setattr(model.get_submodule(module_name), own_name, replaced[id(parameter)])


def _move_hooks(before: nn.Parameter, after: nn.Parameter) -> None:
    on_gradient, once_accumulated = hooks_of(before)
    for hook in on_gradient:
        after.register_hook(hook)
    for hook in once_accumulated:
        after.register_post_accumulate_grad_hook(hook)


def _part_for(parameter: Tensor, whole: Tensor, order: Order | None) -> Tensor:
    if not isinstance(parameter, DTensor):
        return whole
    return part_of_dtensor(whole, parameter, order)


def part_of_dtensor(whole: Tensor, like: DTensor, order: Order | None = None) -> DTensor:
    """A whole tensor cut as `like` is cut, on any mesh. Partial axes can't be cut."""
    if order is not None:
        ids = torch.cat([order.ids_of(rank) for rank in range(order.axis_size)])
        whole = whole.index_select(order.dim, ids.to(whole.device))
    if like.device_mesh.ndim == 1 and isinstance(like.placements[0], StridedShard):
        # another library's weight of several, each cut by itself: no one slice is it
        return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
    shape, offset = local_shape_and_offset(like.shape, like.device_mesh, like.placements)
    part = whole[tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))]
    return as_part_like(part.clone(memory_format=torch.contiguous_format), like)


def as_part_like(local: Tensor, like: DTensor) -> DTensor:
    """A local tensor as this rank's part of what is cut as `like` is."""
    return DTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def refuse_untied(model: nn.Module, ties: Collection[tuple[str, ...]]) -> None:
    """Ends a forward with a ModelError once parameters that are one now have become several, which would
    train apart unnoticed."""

    def held_as(name: str) -> Any:
        """None for what lives on another stage of a pipeline."""
        module_name, _, own_name = name.rpartition(".")
        return parameters_of(model.get_submodule(module_name)).get(own_name)

    def before_forward(*_: Any) -> None:
        for names in ties:
            held = [each for each in map(held_as, names) if each is not None]
            if len(set(map(id, held))) > 1:
                raise ModelError(
                    f"{' and '.join(names)} were one parameter when the model was sharded, and are several "
                    f"now, as load_state_dict(assign=True) leaves them. Tie them again: model.{names[1]} = "
                    f"model.{names[0]}."
                )

    if ties:
        model.register_forward_pre_hook(before_forward)


# Module.to() swaps what is in a parameter, hooks and attributes alike, and keeps the object: an attribute
# tells when the hook is gone
_WATCHED = "_shardwise_watched"


class PartialGradients:
    """Sums, at the end of every backward, the gradients of replicated parameters of which each rank computed
    a part.

    One flattened all-reduce per dtype. Afterwards `.grad` is Replicate, like its parameter; what earlier
    backwards had accumulated is added to. Parameters that FSDP2 manages are left alone: FSDP2 sums their
    Partial gradients itself.
    """

    def __init__(
        self, model: nn.Module, parameters: Iterable[tuple[nn.Module, str]], axis: Axis, origin: Origin
    ) -> None:
        self._model = model
        self._hooks: dict[tuple[nn.Module, str], RemovableHandle | None] = dict.fromkeys(parameters)
        self._axis = axis
        self._origin = origin
        # by graph task, since a reentrant checkpoint runs a backward inside a backward: parameters, and what
        # they had accumulated before
        self._backwards: dict[int, list[tuple[nn.Parameter, DTensor | None]]] = {}
        self.watch()
        model.register_forward_pre_hook(lambda *_: self.watch())

    def watch(self) -> None:
        """Hooks the parameters as they are now: they may have been replaced since (filled, moved off meta,
        wrapped by FSDP2) or unfrozen."""
        places = [(place, getattr(*place)) for place in self._hooks]
        new = [
            (place, p)
            for place, p in places
            if not hasattr(p, _WATCHED) and p.requires_grad and not p.is_meta
        ]
        if not new:
            return
        managed = _managed_by_fsdp(self._model)
        for place, parameter in new:
            setattr(parameter, _WATCHED, True)
            if place[0] not in managed:
                self._hook(place, parameter)

    def _hook(self, place: tuple[nn.Module, str], parameter: nn.Parameter) -> None:
        former = self._hooks[place]
        if former is not None:
            former.remove()
        set_hooks_again(parameter)
        self._hooks[place] = parameter.register_hook(lambda _: self._before_accumulation(parameter))

    def _before_accumulation(self, parameter: nn.Parameter) -> None:
        task = graph_task()
        if task not in self._backwards:
            self._backwards[task] = []
            after_backward(lambda: self._reduce(task))
        earlier = parameter.grad
        assert earlier is None or isinstance(earlier, DTensor)
        if earlier is not None and not _is_partial(earlier):
            # a sum must not mix what is reduced already with a part that isn't
            parameter.grad = None
        else:
            earlier = None
        self._backwards[task].append((parameter, earlier))

    def _reduce(self, task: int) -> None:
        entries = self._backwards.pop(task)
        by_dtype: dict[torch.dtype, list[nn.Parameter]] = {}
        for parameter, _ in entries:
            if isinstance(parameter.grad, DTensor) and _is_partial(parameter.grad):
                by_dtype.setdefault(parameter.dtype, []).append(parameter)
        for parameters in by_dtype.values():
            parts = [parameter.grad.to_local() for parameter in parameters]  # type: ignore[union-attr]
            flat = parts[0].view(-1) if len(parts) == 1 else torch.cat([part.reshape(-1) for part in parts])
            sum_now(flat, self._axis, self._origin)
            for parameter, summed in zip(
                parameters, flat.split([part.numel() for part in parts]), strict=True
            ):
                assert isinstance(parameter, DTensor)
                parameter.grad = as_part_like(summed.view_as(parameter.to_local()), parameter)
        for parameter, earlier in entries:
            if earlier is not None:  # torch.autograd.grad comes by here too, and accumulates nothing
                parameter.grad = earlier if parameter.grad is None else earlier + parameter.grad


def _is_partial(gradient: DTensor) -> bool:
    return any(placement.is_partial() for placement in gradient.placements)


def _managed_by_fsdp(model: nn.Module) -> set[nn.Module]:
    """All modules whose parameters FSDP2 sums: those inside its units."""
    from torch.distributed.fsdp import FSDPModule

    return {
        inner for module in model.modules() if isinstance(module, FSDPModule) for inner in module.modules()
    }
