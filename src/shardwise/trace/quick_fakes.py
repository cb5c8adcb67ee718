"""What FakeTensorMode gives for the commonest ops, without what it does around them: half of a trace's ops
are views, and the optimizer's take lists of all parameters.

A view of one fake tensor is the view of its meta tensor; what writes in place and gives nothing leaves fakes
as they are. Whatever else there is (constants, real tensors, symbols, subclasses) is FakeTensorMode's.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from shardwise.parallel.recorder import tensors_in
from shardwise.torch_private import FakeTensor, FakeTensorMode, has_kernel, in_meta_kernels, schema_of

ELSEWHERE = object()


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
