"""The sizes that a forward writes (`view(batch, length, self.num_heads, -1)`, slices, splits), each with what
it is the size of: taken down above torch's functions, where a size is still the object that the forward
wrote."""

from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from shardwise.dims.by_data import run_of
from shardwise.dims.factors import find, view
from shardwise.dims.record import Record, SizeUse, Value
from shardwise.dims.sizes import Length, Size, expression_of


class Recorder(Protocol):
    """Who books the forward."""

    record: Record

    @property
    def module(self) -> str: ...

    def value_of(self, tensor: Tensor) -> Value: ...


class WrittenSizes(TorchFunctionMode):
    """Books them, and gives the forward lengths that know whose they are."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__getitem__":
            args = (args[0], _as_slices(args[1]))
        out = func(*args, **kwargs)
        if name in ("__get__", "size") and isinstance(out, torch.Size | int) and args:
            return self._lengths(args[0], out, func, args, kwargs)
        if isinstance(out, Tensor | tuple | list):
            self._uses(name, args, kwargs, out)
        return out

    def _lengths(self, tensor: Any, out: Any, func: Any, args: Any, kwargs: Any) -> Any:
        if not isinstance(tensor, Tensor) or isinstance(out, bool):
            return out
        number, now = self._recorder.value_of(tensor).number, len(self._recorder.record.events)
        if isinstance(out, torch.Size):
            return torch.Size(Size.of(size, Length(number, dim, now)) for dim, size in enumerate(out))
        if getattr(func, "__name__", "") == "size":
            dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % tensor.dim()
            return Size.of(out, Length(number, dim, now))
        return out

    def _uses(self, name: str, args: Any, kwargs: Any, out: Any) -> None:
        match name:
            case "view" | "reshape" | "expand" | "new_zeros" | "new_ones" | "new_empty" | "broadcast_to":
                sizes = args[1:] or tuple(kwargs.get(key) for key in ("shape", "size") if key in kwargs)
                self._written(name, out, _listed(sizes))
            case "arange":
                bounds = [each for each in args if isinstance(each, int)]
                if len(bounds) == len(args) in (1, 2):
                    self._written(name, out, [bounds[-1] - (bounds[0] if len(bounds) == 2 else 0)])
            case "zeros" | "ones" | "empty" | "rand" | "randn":
                self._written(name, out, _listed(args or (kwargs.get("size", ()),)))
            case "full" | "new_full":
                self._written(name, out, _listed(args[:1] if name == "full" else args[1:2]))
            case "unflatten":
                at = args[1] % args[0].dim()
                sizes = _listed(args[2:] or (kwargs.get("sizes", ()),))
                self._written(name, out, sizes, first=at)
            case "split" | "split_with_sizes":
                self._split(name, args, kwargs, out)
            case "chunk":
                self._chunk(name, args[0], out, *args[1:], **kwargs)
            case "repeat":
                self._repeat(name, args[0], out, _listed(args[1:] or (kwargs.get("repeats", ()),)))
            case "repeat_interleave":
                self._interleave(name, args[0], out, *args[1:], **kwargs)
            case "group_norm" if len(args) > 1 or "num_groups" in kwargs:
                self._groups(name, args[0], args[1] if len(args) > 1 else kwargs["num_groups"])
            case "conv1d" | "conv2d":
                groups = args[6] if len(args) > 6 else kwargs.get("groups", 1)
                if groups == args[0].shape[1]:
                    self._groups(name, args[0], groups)  # each channel has its own filter
            case "__getitem__":
                self._sliced(name, args[0], args[1], out)
            case "narrow":
                dim, start, length = args[1] % args[0].dim(), args[2], args[3]
                self._part(name, args[0], out, dim, dim, start, length)

    def _written(self, name: str, out: Any, sizes: list[Any], first: int = 0) -> None:
        if not isinstance(out, Tensor) or not all(isinstance(size, int) for size in sizes):
            return
        value = self._recorder.value_of(out)
        for at, size in enumerate(sizes, first):
            if size > 1 and at < len(value.dims):
                self._add(SizeUse(name, self._recorder.module, value, at, expression_of(size)))

    def _split(self, name: str, args: Any, kwargs: Any, out: Any) -> None:
        tensor, sizes = args[0], args[1] if len(args) > 1 else next(iter(kwargs.values()))
        dim = (args[2] if len(args) > 2 else kwargs.get("dim", 0)) % tensor.dim()
        listed = [sizes] * len(out) if isinstance(sizes, int) else list(sizes)
        start = Size.of(0, 0)
        for part, size in zip(out, listed, strict=False):
            self._part(name, tensor, part, dim, dim, start, size)
            start = start + size

    def _chunk(self, name: str, tensor: Tensor, out: Any, chunks: int = 1, dim: int = 0, **_: Any) -> None:
        at, start = dim % tensor.dim(), Size.of(0, 0)
        each = -(-self._length(tensor, at) // chunks)
        for part in out:
            if part.shape[at] == each:
                self._part(name, tensor, part, at, at, start, each)
            start = start + each

    def _repeat(self, name: str, tensor: Tensor, out: Tensor, times: list[int]) -> None:
        ahead = len(times) - tensor.dim()
        for at, n in enumerate(times[max(ahead, 0) :]):
            self._written(name, out, [self._length(tensor, at) * n], first=at + ahead)
        self._written(name, out, times[:ahead])

    def _interleave(
        self, name: str, tensor: Any, out: Any, repeats: Any = 1, dim: int | None = None, **_: Any
    ) -> None:
        if isinstance(repeats, int) and dim is not None:
            at = dim % tensor.dim()
            self._written(name, out, [self._length(tensor, at) * repeats], first=at)

    def _groups(self, name: str, tensor: Tensor, groups: int) -> None:
        """The number of groups is the outer factor of the channels [B, channels, ...]."""
        value = self._recorder.value_of(tensor)
        outer, _ = view([value.dims[1]], [groups, tensor.shape[1] // groups])
        counted = Value(value.number, [outer], value.source)
        self._add(SizeUse(name, self._recorder.module, counted, 0, expression_of(groups)))

    def _length(self, tensor: Tensor, dim: int) -> Size:
        number, now = self._recorder.value_of(tensor).number, len(self._recorder.record.events)
        return Size.of(tensor.shape[dim], Length(number, dim, now))

    def _sliced(self, name: str, tensor: Any, index: Any, out: Any) -> None:
        if not isinstance(tensor, Tensor) or not isinstance(out, Tensor):
            return
        items = list(index) if isinstance(index, tuple) else [index]
        by_data = [item for item in items if isinstance(item, Tensor | list | tuple)]
        if len(by_data) > 1 or any(isinstance(item, int) for item in items if by_data):
            return
        taken = sum(item is not None and item is not Ellipsis for item in items)
        before, after = 0, 0
        for item in items:
            if item is Ellipsis:
                before, after = before + tensor.dim() - taken, after + tensor.dim() - taken
            elif item is None:
                after += 1
            elif isinstance(item, Tensor):
                self._indexed(name, tensor, out, before, after, item)
                before, after = before + 1, after + 1
            elif isinstance(item, slice):
                size = tensor.shape[before]
                if item.step in (None, 1) and (item.start is not None or item.stop is not None):
                    start = _bound(item.start, 0, size, tensor, before, self._recorder)
                    stop = _bound(item.stop, size, size, tensor, before, self._recorder)
                    if int(stop) > int(start):
                        self._part(name, tensor, out, before, after, start, stop - start)
                before, after = before + 1, after + 1
            else:
                before += 1

    def _indexed(self, name: str, tensor: Tensor, out: Tensor, dim: int, at: int, index: Tensor) -> None:
        """By known numbers, one after the other: a slice, from the end where they are negative."""
        run = run_of(index, tensor.shape[dim])
        if run is not None:
            first = index.tolist()[0]
            start = self._length(tensor, dim) + first if first < 0 else first
            self._part(name, tensor, out, dim, at, start, len(index))

    def _part(self, name: str, tensor: Tensor, out: Tensor, dim: int, at: int, start: int, size: int) -> None:
        value, of = self._recorder.value_of(out), self._recorder.value_of(tensor).dims[dim]
        if find(of).size != int(size) and at < len(value.dims):
            self._add(
                SizeUse(name, self._recorder.module, value, at, expression_of(size), of, expression_of(start))
            )

    def _add(self, use: SizeUse) -> None:
        record = self._recorder.record
        record.sizes.append(replace(use, at=len(record.events)))


def _as_slices(index: Any) -> Any:
    """An index with its one list of numbers, one after the other, as a slice: the dispatcher would be given
    them as a tensor without data."""
    items = list(index) if isinstance(index, tuple) else [index]
    lists = [at for at, item in enumerate(items) if isinstance(item, list)]
    if len(lists) != 1 or any(isinstance(item, Tensor | tuple | int) for item in items):
        return index
    (at,) = lists
    numbers = items[at]
    is_run = bool(numbers) and all(type(n) is int for n in numbers)
    if not is_run or numbers != list(range(numbers[0], numbers[0] + len(numbers))):
        return index
    if numbers[0] < 0 <= numbers[-1]:
        return index
    items[at] = slice(numbers[0], numbers[-1] + 1 or None)
    return tuple(items)


def _bound(given: int | None, default: int, size: int, tensor: Tensor, dim: int, recorder: Recorder) -> Size:
    """A slice's bound, as an expression: None and negative numbers count from the dim's end."""
    length = Size.of(size, Length(recorder.value_of(tensor).number, dim, len(recorder.record.events)))
    if given is None:
        return Size.of(0, 0) if default == 0 else length
    if given < 0:
        return length + given  # type: ignore[no-any-return]
    return length if given >= size else Size.of(int(given), expression_of(given))


def _listed(sizes: Any) -> list[Any]:
    """The sizes of a call that takes them one by one or as one sequence."""
    if len(sizes) == 1 and isinstance(sizes[0], tuple | list | torch.Size):
        return list(sizes[0])
    return list(sizes)
