"""A module's own forward, whatever its class, on local tensors: for the time of a call its parameters are
this rank's plain tensors, and afterwards the DTensors that they were. Buffers stay whole; a forward may get a
rank's part of one.

They are swapped at each call, so that a recomputed forward and FSDP2, which puts its own in their place just
before, have it right too. What is local already (a module around reads it by name) stays as it is.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from shardwise.core.errors import PlanError
from shardwise.core.placement import Placement
from shardwise.parallel.axis import Axis, Site
from shardwise.parallel.parameters import is_cut_further, local_weight
from shardwise.parallel.shared import Shared
from shardwise.torch_private import buffers_of, parameters_of

Change = Callable[[Tensor], Tensor]


@dataclass(slots=True, eq=False)
class Part:
    """Which indices of a dim of `size` a rank uses of what it has whole. They lie where it was used last."""

    dim: int
    size: int
    ids: Tensor

    def of(self, whole: Tensor) -> Tensor:
        if self.ids.device != whole.device:
            self.ids = self.ids.to(whole.device)
        return whole.index_select(self.dim, self.ids)


@dataclass(frozen=True, slots=True, eq=False)
class Use:
    """A parameter or buffer as a forward uses it: the module that owns it, and what each rank's gradient is.
    is_added_once: it is added to what is summed over the ranks, so rank 0 has it and others have zeros.
    part: it is whole, and only this of it is used. shared: it is cut, and what ranks share is gathered."""

    module: nn.Module
    name: str
    gradient: Placement
    is_added_once: bool = False
    part: Part | None = None
    shared: Shared | None = None


@contextmanager
def in_place(tensors: Iterable[tuple[dict[str, Any], str, Tensor]]) -> Iterator[None]:
    """These tensors stand in modules' own dicts inside, by (dict, name, tensor), and what stood there does
    afterwards."""
    found: list[tuple[dict[str, Any], str, Tensor]] = []
    try:
        for there, name, tensor in tensors:
            found.append((there, name, there[name]))
            there[name] = tensor
        yield
    finally:
        for there, name, value in reversed(found):
            there[name] = value


def on_local(uses: Sequence[Use], axis: Axis) -> AbstractContextManager[None]:
    """Parameters, and buffers of which a rank uses a part, are local tensors inside."""
    return in_place(_locals_of(uses, axis))


def _locals_of(uses: Sequence[Use], axis: Axis) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    for use in uses:
        is_buffer = use.name in buffers_of(use.module)
        there: dict[str, Any] = buffers_of(use.module) if is_buffer else parameters_of(use.module)
        value = there[use.name]
        local = _local_buffer(value, use.part) if is_buffer else _local_parameter(value, use, axis)
        if local is not None and local is not value:
            yield there, use.name, local


def _local_parameter(parameter: Tensor | None, use: Use, axis: Axis) -> Tensor | None:
    """What a forward uses; as it is where that is done already, or FSDP2, which has cut it over another axis,
    makes it whole in that module's own call."""
    if parameter is None or is_cut_further(parameter):
        return parameter
    local = local_weight(parameter, use.gradient)
    if local is parameter:
        return parameter
    if use.is_added_once and axis.rank:
        local = local * 0
    if use.shared is not None:
        return use.shared.of(local)
    return use.part.of(local) if use.part is not None else local


def _local_buffer(buffer: Tensor | None, part: Part | None) -> Tensor | None:
    if buffer is None or part is None or buffer.shape[part.dim] != part.size:
        return buffer
    return part.of(buffer)


def wrap(module: nn.Module, around: Callable[..., Any]) -> None:
    """Gives a module a forward that calls around(its former forward, *args, **kwargs), and looks like the
    former one."""
    inner = module.forward

    @functools.wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return around(inner, *args, **kwargs)

    module.forward = forward


def run_on_local(module: nn.Module, uses: Sequence[Use], axis: Axis) -> None:
    """Gives a module its own forward with these parameters as local tensors."""

    def around(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with on_local(uses, axis):
            return inner(*args, **kwargs)

    wrap(module, around)


def change_first_tensor(
    args: tuple[Any, ...], kwargs: dict[str, Any], change: Change, site: Site
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call's arguments, the first tensor among them changed: that at the first position, or else the first
    keyword's, as Hugging Face calls. Raises PlanError where there is none."""
    if args and isinstance(args[0], Tensor):
        return (change(args[0]), *args[1:]), kwargs
    for key, value in kwargs.items():
        if isinstance(value, Tensor):
            return args, {**kwargs, key: change(value)}
    raise PlanError(f"{site.module}: rule {site.rule} found no tensor among the module's inputs.")


def change_alike(
    args: tuple[Any, ...], kwargs: dict[str, Any], change: Change, site: Site
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """As change_first_tensor(), and with it every other tensor of its shape that has a gradient to take."""
    shapes = []

    def seen(first: Tensor) -> Tensor:
        shapes.append(first.shape)
        return first

    change_first_tensor(args, kwargs, seen, site)

    def changed(value: Any) -> Any:
        is_alike = isinstance(value, Tensor) and value.shape == shapes[0]
        return change(value) if is_alike and value.is_floating_point() else value

    return tuple(map(changed, args)), {key: changed(value) for key, value in kwargs.items()}


def change_other_tensors(
    args: tuple[Any, ...], kwargs: dict[str, Any], change: Change
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call's arguments, all tensors among them but the first changed."""
    is_first = True

    def changed(value: Any) -> Any:
        nonlocal is_first
        if not isinstance(value, Tensor) or is_first:
            is_first = is_first and not isinstance(value, Tensor)
            return value
        return change(value)

    return tuple(changed(value) for value in args), {key: changed(value) for key, value in kwargs.items()}


def change_first_output(output: Any, change: Change, site: Site) -> Any:
    """What a module gives, its first tensor changed. Raises PlanError where there is none."""
    if isinstance(output, Tensor):
        return change(output)
    if isinstance(output, tuple):
        for index, value in enumerate(output):
            if isinstance(value, Tensor):
                items = (*output[:index], change(value), *output[index + 1 :])
                return type(output)(*items) if hasattr(output, "_fields") else items
    raise PlanError(
        f"{site.module}: rule {site.rule} takes a module that gives a tensor, or a tuple with one, and this "
        f"gives {type(output).__name__}."
    )
