"""Attention and dropout as CUDA runs them, where a CPU has no such kernel and takes them apart.

    attention  a CPU's fused kernel takes heads of one width and no dropout; what it takes is mapped by name
               (catalogue.py). CUDA's also take dropout (flash, memory-efficient) and values that are narrower
               or wider than keys (memory-efficient); none takes float32 with fewer key heads than query heads
    dropout    one kernel that keeps its mask; a CPU draws, divides and multiplies

Sources: PyTorch's aten/src/ATen/native/transformers/cuda/sdp_utils.cpp (check_head_dim_size_flash wants q,
k and v of one width, check_head_dim_size_mem_efficient not; check_dtypes_low_precision, check_for_attn_mask,
check_batch_size_and_num_heads_dense), attention.cpp (pad_bias, convert_boolean_attn_mask) and Dropout.cpp
(is_fused_kernel_acceptable). Float32 with grouped heads: seen on an H100 (torch 2.11),
benchmarks/data/h100-steps.json.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

_HALF = (torch.bfloat16, torch.float16)
_FLASH_WIDTH = 256  # the widest head that it takes
_ALIGNED = {torch.float32: 4}  # head widths are multiples of it, of 8 in half precision


@contextmanager
def kernels_of_cuda(making_on_device: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """making_on_device: inside, factory ops make their tensors on the device. (A mode instead of the patches
    isn't there in a recompute.)"""
    attention, dropout = F.scaled_dot_product_attention, F.dropout

    def attend(*args: Any, **kwargs: Any) -> Tensor:
        asked = _Asked.of(*args, **kwargs)
        if asked is None or asked.is_as_on_a_cpu:
            return attention(*args, **kwargs)
        if asked.takes_flash:
            return asked.flash()
        if asked.takes_efficient:
            with making_on_device():
                return asked.efficient()
        with sdpa_kernel(SDPBackend.MATH), making_on_device():
            return asked.unfused() if asked.is_plain else attention(*args, **kwargs)

    def drop(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training or inplace or not 0 < p < 1 or not isinstance(input, Tensor):
            return dropout(input, p, training, inplace)
        return torch.native_dropout(input, p, True)[0]

    with patch.object(F, "scaled_dot_product_attention", attend), patch.object(F, "dropout", drop):
        yield


@dataclass(frozen=True, slots=True)
class _Asked:
    """One call of attention: [B, N, S, D] each, as PyTorch names its arguments."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False

    @classmethod
    def of(cls, *args: Any, **kwargs: Any) -> "_Asked | None":
        """None for what no fused kernel takes anywhere."""
        try:
            made = cls(*args, **kwargs)
        except TypeError:
            return None
        tensors = (made.query, made.key, made.value)
        if not all(isinstance(each, Tensor) and each.dim() == 4 for each in tensors):
            return None
        return made

    @property
    def is_as_on_a_cpu(self) -> bool:
        """Whether the CPU's kernel takes it, and CUDA's where it does (catalogue.name_on)."""
        grouped_float32 = self.query.dtype is torch.float32 and self._is_grouped
        return not (grouped_float32 or self.dropout_p > 0 or not self._is_of_one_width)

    @property
    def takes_flash(self) -> bool:
        is_narrow = self.query.shape[-1] <= _FLASH_WIDTH
        return self.query.dtype in _HALF and self.attn_mask is None and self._is_of_one_width and is_narrow

    @property
    def takes_efficient(self) -> bool:
        if self.query.dtype not in (*_HALF, torch.float32) or self._is_grouped:
            return False
        step = _ALIGNED.get(self.query.dtype, 8)
        return all(each.shape[-1] % step == 0 for each in (self.query, self.value))

    @property
    def _is_grouped(self) -> bool:
        return self.query.shape[1] != self.key.shape[1]

    @property
    def _is_of_one_width(self) -> bool:
        return self.query.shape[-1] == self.key.shape[-1] == self.value.shape[-1]

    def flash(self) -> Tensor:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention
        out: Tensor = kernel(
            self.query, self.key, self.value, self.dropout_p, self.is_causal, scale=self.scale
        )[0]
        return out

    def efficient(self) -> Tensor:
        kernel = torch.ops.aten._scaled_dot_product_efficient_attention
        needs_gradient = any(each.requires_grad for each in (self.query, self.key, self.value))
        out: Tensor = kernel(
            self.query, self.key, self.value, self._bias(), needs_gradient, self.dropout_p, self.is_causal,
            scale=self.scale,
        )[0]  # fmt: skip
        return out

    @property
    def is_plain(self) -> bool:
        """Of what no fused kernel takes, what unfused() can do: nothing is rounded, dropped or masked by a
        tensor."""
        plain = self.query.dtype is torch.float32 and self.attn_mask is None and not self.dropout_p
        return plain and (self.scale is None or self.scale > 0)

    def unfused(self) -> Tensor:
        """What _scaled_dot_product_attention_math does there, step by step: given fakes, which it takes for
        tensors of another kind, it adds its mask to a copy of the scores, and real ones in place."""
        half = (self.query.shape[-1] ** -0.5 if self.scale is None else self.scale) ** 0.5
        query, key, value = self.query * half, self.key, self.value
        mask = None
        if self.is_causal:
            allowed = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
            mask = torch.where(allowed, 0.0, float("-inf"))
            del allowed
        if self._is_grouped:
            key, value = (
                each.repeat_interleave(query.shape[-3] // each.shape[-3], -3) for each in (key, value)
            )
        scores = torch.matmul(query, key.transpose(-2, -1) * half)
        if mask is not None:
            scores.add_(mask)
        scores = torch.ops.aten._safe_softmax(scores, -1)
        out: Tensor = torch.matmul(scores, value)
        return out

    def _bias(self) -> Tensor | None:
        """The mask as numbers that are added, for all heads without a copy of it for each."""
        mask = self.attn_mask
        if mask is None:
            return None
        if mask.dtype is torch.bool:
            numbers = torch.zeros_like(mask, dtype=self.query.dtype)
            mask = numbers.masked_fill_(mask.logical_not(), float("-inf"))
        batch, heads, rows, _ = self.query.shape
        return mask.expand(batch, heads, rows, self.key.shape[-2])
