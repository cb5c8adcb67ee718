"""The model's own noise: what rounding alone does to its loss and gradients when sums are taken in another
order.

A sharded model sums each matmul's inner dim in as many parts as there are ranks. SplitMatmuls does the same
to an unsharded one, forward and backward, so the difference that it makes is the difference that a right plan
may make. So it does with grouped matmuls (core/grouped.py has their shapes), with parts that their kernels
take. What stands in a higher-order operator is run as it is: only attention is that, and no plan cuts a sum
inside it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from shardwise.torch_private import TorchDispatchMode

aten = torch.ops.aten


class SplitMatmuls(TorchDispatchMode):
    """Inside, every matmul's inner dim is summed in `parts` parts. coarsest: the shortest dtype that a value
    was rounded to on the way.

    Models take norms, routers and losses in float32 whatever dtype they are in; a sum of such values over
    ranks is rounded as float32 is.
    """

    supports_higher_order_operators = True

    def __init__(self, parts: int) -> None:
        super().__init__()
        self._parts = parts
        self.coarsest: torch.dtype | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is aten.mm.default or func is aten.bmm.default:
            return self._in_parts(func, args[0], args[1])
        if func is aten.addmm.default or func is aten.baddbmm.default:
            inner = aten.mm.default if func is aten.addmm.default else aten.bmm.default
            product = self._in_parts(inner, args[1], args[2])
            return kwargs.get("beta", 1) * args[0] + kwargs.get("alpha", 1) * product
        if func is aten._grouped_mm.default:
            return self._grouped(func, *args, **kwargs)
        if func is aten._to_copy.default and is_rounding(args[0].dtype, kwargs.get("dtype")):
            self.coarsest = max(
                (self.coarsest, kwargs["dtype"]),
                key=lambda dtype: torch.finfo(dtype).eps if dtype is not None else 0.0,
            )
        return func(*args, **kwargs)

    def _in_parts(self, matmul: Callable[[Tensor, Tensor], Tensor], left: Tensor, right: Tensor) -> Tensor:
        if left.shape[-1] < self._parts or not left.is_floating_point():
            return matmul(left, right)
        products = [
            matmul(a, b)
            for a, b in zip(left.chunk(self._parts, -1), right.chunk(self._parts, -2), strict=True)
        ]
        return _sum(products)

    def _grouped(
        self, matmul: Callable[..., Tensor], left: Tensor, right: Tensor, offs: Tensor | None = None,
        *more: Any, **named: Any,
    ) -> Tensor:  # fmt: skip
        """offs: where each group ends."""
        if offs is not None and left.dim() == right.dim() == 2:  # the sum goes over each group's rows
            halves = matmul(left, right, _halved(offs, left.element_size()), *more, **named)
            summed: Tensor = halves.unflatten(0, (-1, 2)).sum(1)
            return summed
        parts = zip(_aligned(left, -1, self._parts), _aligned(right, -2, self._parts), strict=True)
        return _sum([matmul(a, b, offs, *more, **named) for a, b in parts])


_ALIGNED_BYTES = 16
"""Operands of a grouped matmul begin at multiples of it (PyTorch's _grouped_mm_validate_inputs)."""


def _aligned(tensor: Tensor, dim: int, parts: int) -> tuple[Tensor, ...]:
    step = max(1, _ALIGNED_BYTES // tensor.element_size())
    size: int = -(-tensor.shape[dim] // (parts * step)) * step
    return torch.split(tensor, size, dim)


def _halved(ends: Tensor, element_size: int) -> Tensor:
    """Where two halves of each group of rows end, whatever the number of parts: [2 G] for [G]."""
    step = max(1, _ALIGNED_BYTES // element_size)
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    middles = starts + (ends - starts) // 2 // step * step
    return torch.stack([middles, ends], 1).flatten()


def _sum(products: Sequence[Tensor]) -> Tensor:
    total = products[0]
    for product in products[1:]:
        total = total + product
    return total


def is_rounding(before: torch.dtype, after: torch.dtype | None) -> bool:
    """Whether a cast from one to the other is to a shorter floating one."""
    return (
        after is not None
        and before.is_floating_point
        and after.is_floating_point
        and torch.finfo(after).eps > torch.finfo(before).eps
    )


class NoDropout(TorchFunctionMode):
    """Inside, nothing is dropped, though the model is in train mode: masks are random, and no two runs could
    be compared."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _DROPOUTS:
            return args[0] if args else kwargs["input"]
        if func is torch.nn.functional.scaled_dot_product_attention:
            if len(args) > 4:
                args = (*args[:4], 0.0, *args[5:])
            elif "dropout_p" in kwargs:
                kwargs = {**kwargs, "dropout_p": 0.0}
        return func(*args, **kwargs)


_DROPOUTS = frozenset(
    {
        torch.nn.functional.dropout,
        torch.nn.functional.dropout1d,
        torch.nn.functional.dropout2d,
        torch.nn.functional.dropout3d,
        torch.nn.functional.alpha_dropout,
        torch.nn.functional.feature_alpha_dropout,
        torch.dropout,
        torch.native_dropout,
    }
)
