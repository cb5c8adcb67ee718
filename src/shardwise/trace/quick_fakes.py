"""What FakeTensorMode gives for the commonest ops, without what it does around them: half of a trace's ops
are views, and the optimizer's take lists of all parameters.

A view of one fake tensor is the view of its meta tensor; what writes in place and gives nothing leaves fakes
as they are. What FakeTensorMode gave once for shapes, dtypes and numbers, it gives again for the same ones.
Whatever else there is (constants, real tensors, symbols, subclasses) is FakeTensorMode's.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from enum import Enum, auto
from functools import lru_cache
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from shardwise.parallel.recorder import tensors_in
from shardwise.torch_private import (
    FakeTensor,
    FakeTensorMode,
    has_kernel,
    in_meta_kernels,
    schema_of,
    storage_key,
)

ELSEWHERE = object()

_MOST = 20_000
_given: dict[tuple[Hashable, ...], Any] = {}
"""What ops gave: _Made, or a tuple of them; _Seen of their first argument; None where it was that."""
_Made = tuple[torch.Size, tuple[int, ...], torch.dtype, torch.device]
"""Shape, stride, dtype, device."""
_Seen = tuple[torch.Size, tuple[int, ...]]
"""Shape and stride: what some ops call new, such as _unsafe_view, is the same storage."""


class _Gives(Enum):
    NEW = auto()
    FIRST = auto()


def fake_of(mode: FakeTensorMode, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What an op gives under FakeTensorMode, whose turn it is now."""
    out = quick_fake(mode, func, args, kwargs)
    if out is not ELSEWHERE:
        return out
    key = _key(mode, func, args, kwargs)
    if key is None:
        return func(*args, **kwargs)
    if key not in _given:
        return _kept(key, args, func(*args, **kwargs))
    made = _given[key]
    if made is None:
        return args[0]
    with in_meta_kernels(mode):
        match made:
            case torch.Size(), _, torch.dtype(), _:
                return _fake(mode, made)
            case torch.Size() as shape, tuple() as stride:
                seen = args[0].as_strided(shape, stride, args[0].storage_offset())
                return FakeTensor(mode, seen, args[0].fake_device)
            case _:
                return tuple(_fake(mode, each) for each in made)


def _fake(mode: FakeTensorMode, made: _Made) -> Tensor:
    shape, stride, dtype, device = made
    return FakeTensor(mode, torch.empty_strided(shape, stride, dtype=dtype, device="meta"), device)


def _kept(key: tuple[Hashable, ...], args: Sequence[Any], out: Any) -> Any:
    """`out`, after it was noted, where it can be told in few words."""
    if len(_given) >= _MOST:
        _given.clear()
    if _kind_given(key[0]) is _Gives.FIRST:
        if out is args[0]:
            _given[key] = None
    elif isinstance(out, Tensor):
        if _is_new(out, args):
            _given[key] = _made(out)
        elif _is_seen(out, args[0]):
            _given[key] = out.shape, out.stride()
    elif type(out) is tuple and all(_is_new(each, args) for each in out):
        _given[key] = tuple(map(_made, out))
    return out


def _made(tensor: Tensor) -> _Made:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _is_seen(tensor: Any, first: Any) -> bool:
    """Whether it is another shape of an argument."""
    return (
        type(tensor) is type(first) is FakeTensor
        and storage_key(tensor.untyped_storage()) == storage_key(first.untyped_storage())
        and (tensor.dtype, tensor.fake_device) == (first.dtype, first.fake_device)
        and first.storage_offset() == tensor.storage_offset()
    )


def _is_new(tensor: Any, args: Sequence[Any]) -> bool:
    """Whether it is all of a storage of its own, and nothing is known of it but its shape."""
    if type(tensor) is not FakeTensor or tensor.constant is not None or tensor.layout is not torch.strided:
        return False
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    whole = (last + 1) * tensor.element_size() if tensor.numel() else 0
    storage = tensor.untyped_storage()
    key = storage_key(storage)
    return (
        tensor.storage_offset() == 0
        and storage.nbytes() == whole
        and all(storage_key(each.untyped_storage()) != key for each in tensors_in(args))
    )


_WORDS = frozenset(
    (int, float, bool, str, NoneType, torch.dtype, torch.layout, torch.device, torch.memory_format)
)


def _key(
    mode: FakeTensorMode, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Hashable, ...] | None:
    """All that decides what an op gives; None where that can't be told in few words."""
    if _kind_given(func) is None or mode.shape_env is not None:
        return None
    key: list[Hashable] = [func, torch.get_default_dtype(), torch.is_inference_mode_enabled()]
    if not _tell(args, mode, key):
        return None
    for name, value in kwargs.items():
        key.append(name)
        if not _tell((value,), mode, key):
            return None
    return tuple(key)


def _tell(values: Iterable[Any], mode: FakeTensorMode, key: list[Hashable]) -> bool:
    for value in values:
        kind = type(value)
        if kind is FakeTensor:
            if not _is_plain(value, mode) or value.layout is not torch.strided or value.dtype.is_complex:
                return False
            key += (value.shape, value.stride(), value.dtype, value.fake_device)
        elif kind in _WORDS:
            key.append((kind, value))  # 1 and True and 1.0 are alike
        elif kind is list or kind is tuple:
            key.append(len(value))
            if not _tell(value, mode, key):
                return False
        else:
            return False
    return True


@lru_cache(maxsize=4096)
def _kind_given(func: Any) -> _Gives | None:
    """What it gives by its schema: new tensors, or its first argument, into which it writes. None: neither,
    or it depends on data."""
    schema, tags = schema_of(func), set(func.tags)
    told_by_data = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.inplace_view}
    kinds = {str(each.type) for each in schema.returns}
    if (
        not schema.name.startswith("aten::")
        or not any("Tensor" in str(each.type) for each in schema.arguments)
        or kinds != {"Tensor"}
        or told_by_data & tags
        or func.is_view
        or has_kernel(func.name(), "CompositeImplicitAutograd")
    ):
        return None
    written = [each.alias_info is not None for each in schema.arguments]
    if not any(written):
        return _Gives.NEW if all(each.alias_info is None for each in schema.returns) else None
    is_first = written[0] and sum(written) == 1 and len(schema.returns) == 1
    return _Gives.FIRST if is_first and schema.returns[0].alias_info is not None else None


def quick_fake(mode: FakeTensorMode, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The fakes that an op gives; ELSEWHERE where FakeTensorMode is to say it."""
    if is_void(func):
        tensors = tensors_in(args) + tensors_in(kwargs)
        return None if all(_is_plain(each, mode) for each in tensors) else ELSEWHERE
    if not _is_view(func) or not _is_plain(args[0], mode):
        return ELSEWHERE
    with in_meta_kernels(mode):
        out = func(*args, **kwargs)
    device = args[0].fake_device
    if isinstance(out, Tensor):
        return FakeTensor(mode, out, device)
    return [FakeTensor(mode, each, device) for each in out]


def _is_plain(tensor: Any, mode: FakeTensorMode) -> bool:
    """A fake of which nothing is known but its shape."""
    return type(tensor) is FakeTensor and tensor.fake_mode is mode and tensor.constant is None


@lru_cache(maxsize=4096)
def _is_view(func: Any) -> bool:
    """Of its first argument, which is its only tensor; and an op of its own, not one made of others."""
    schema = schema_of(func)
    tensors = [each.name for each in schema.arguments if "Tensor" in str(each.type)]
    return (
        schema.name.startswith("aten::")
        and bool(func.is_view)
        and tensors == [schema.arguments[0].name]
        and torch.Tag.inplace_view not in func.tags
        and not has_kernel(func.name(), "CompositeImplicitAutograd")
    )


@lru_cache(maxsize=4096)
def is_void(func: Any) -> bool:
    """Whether it only writes into what it takes."""
    schema = schema_of(func)
    return schema.name.startswith("aten::") and not schema.returns and bool(schema.is_mutable)
