"""A model in one dtype throughout, whatever shorter ones its code casts to.

A model that computes its experts in bfloat16, however wide its weights are, rounds more than a wrong plan may
show. A plan cuts sums, and doesn't care for dtypes: without those casts the same sums are compared as exactly
as float64 is. Grouped matmuls, which have no float64, are then a matmul for each group.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from shardwise.torch_private import grouped_mm
from shardwise.verify.noise import is_rounding

_CASTS = frozenset({Tensor.bfloat16, Tensor.half, Tensor.float})
_TO_ANOTHER = frozenset({Tensor.to, Tensor.type, Tensor.type_as})
_GROUPED = frozenset({grouped_mm, F.grouped_mm})


class Unrounded(TorchFunctionMode):
    """Inside, a tensor stays in its dtype where it would be cast to a shorter one."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if not isinstance(first, Tensor) or not first.is_floating_point():
            return func(*args, **kwargs)
        if func in _CASTS:
            return first
        if func in _GROUPED and first.dtype is torch.float64:
            return _for_each_group(*args, **kwargs)

        def kept(value: Any) -> Any:
            if isinstance(value, torch.dtype) and is_rounding(first.dtype, value):
                return first.dtype
            if isinstance(value, Tensor) and func in _TO_ANOTHER and is_rounding(first.dtype, value.dtype):
                return value.to(first.dtype)
            return value

        return func(first, *map(kept, args[1:]), **{key: kept(value) for key, value in kwargs.items()})


def _for_each_group(
    rows: Tensor,
    matrices: Tensor,
    *,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """rows [R, K], of which each group has its own, matrices [G, K, N] -> [R, N]; rows of no group are zeros.

    Raises NotImplementedError for what no forward of a mixture asks for."""
    if offs is None or rows.dim() != 2 or matrices.dim() != 3 or bias is not None:
        raise NotImplementedError(
            f"a grouped matmul of {list(rows.shape)} and {list(matrices.shape)} has no float64"
        )
    ends = offs.tolist()
    starts = [0, *ends[:-1]]
    made = [rows[start:end] @ matrix for start, end, matrix in zip(starts, ends, matrices, strict=True)]
    made.append(rows.new_zeros(rows.shape[0] - ends[-1], matrices.shape[-1]))
    return torch.cat(made)
