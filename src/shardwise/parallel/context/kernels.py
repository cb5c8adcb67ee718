"""Attention of some queries to some keys, with the log of the sum of exponentials (lse), so that what several
blocks of keys give can be put together; and its backward, for any lse.

    out = softmax(scale q k^T + mask) v,  lse = log sum exp of the same scores
    p = exp(scores - lse), dv = p^T do, ds = p * (do v^T - rowsum(do * out))
    dq = scale ds k, dk = scale ds^T q

With out and lse of all keys the backward of a block gives its summand of dq, and dk and dv of its keys. Fused
kernels are those of torch.nn.functional.scaled_dot_product_attention that return lse; where none takes what
is asked (float64 on CUDA, values of another width on a CPU), the formulas above run, in float32 at least.

Shapes: q [B, N, L, D]; k [B, K, M, D] and v [B, K, M, E], N a multiple of K; out [B, N, L, E], lse [B, N, L].
mask: bool [B or 1, N or 1, L, M], True where a query sees a key; one that sees none gets an lse of -inf.
Source: Dao et al. 2022 (FlashAttention), section 3 and appendix B.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

_HALF = (torch.float16, torch.bfloat16)
_FLASH_WIDTH, _LSE_ROWS, _BIAS_COLUMNS = 256, 32, 16
# what the width of a head is a multiple of in CUDA's fused kernels. Source: PyTorch's
# aten/src/ATen/native/transformers/cuda/sdp_utils.cpp
_CUDA_WIDTHS = {torch.float16: 8, torch.bfloat16: 8, torch.float32: 4}


@dataclass(frozen=True, slots=True)
class Call:
    """How a block is computed, whatever its tensors."""

    scale: float
    is_causal: bool = False
    mask: Tensor | None = None


Gradients = tuple[Tensor, Tensor, Tensor]
"""Of queries, keys and values."""


class Kernel(Protocol):
    """One way to compute a block."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]: ...

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
    ) -> Gradients: ...


def kernel_for(device_type: str, q: Tensor, k: Tensor, v: Tensor, *, is_masked: bool) -> Kernel:
    """The fastest that takes these on a device. A trace calls CUDA's on fakes."""
    widths = {q.shape[-1], k.shape[-1], v.shape[-1]}
    if device_type == "cpu":
        return CpuFlash() if len(widths) == 1 else Formulas()
    step = _CUDA_WIDTHS.get(q.dtype)
    if step is None or any(width % step for width in widths):
        return Formulas()
    is_flash = q.dtype in _HALF and len(widths) == 1 and max(widths) <= _FLASH_WIDTH
    return CudaFlash() if is_flash and not is_masked else Ungrouped(CudaEfficient())


def merged(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> tuple[Tensor, Tensor]:
    """What two sets of keys give together. Weights and sums are lse's dtype."""
    total = torch.logaddexp(lse, more_lse)
    kept, added = (torch.exp(each - total)[..., None] for each in (lse, more_lse))
    return out * kept + more * added, total


@dataclass(frozen=True, slots=True)
class CpuFlash:
    """A CPU's, in any floating dtype."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        bias = _bias(call.mask, q.dtype)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, call.is_causal, attn_mask=bias, scale=call.scale
        )
        return out, _blind_rows_at_minus_infinity(lse, call.mask)

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
    ) -> Gradients:
        bias = _bias(call.mask, q.dtype)
        found: Gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, call.is_causal, attn_mask=bias, scale=call.scale
        )
        return found


@dataclass(frozen=True, slots=True)
class CudaFlash:
    """Half precision, no mask."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
            q, k, v, 0.0, call.is_causal, False, scale=call.scale
        )
        return out, lse

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
    ) -> Gradients:
        n_queries, n_keys = q.shape[-2], k.shape[-2]
        seed = torch.zeros((2,), dtype=torch.uint64, device=q.device)  # of dropout, of which there is none
        found: Gradients = torch.ops.aten._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, out, lse.contiguous(), None, None, n_queries, n_keys, 0.0, call.is_causal, seed,
            seed, scale=call.scale,
        )  # fmt: skip
        return found


@dataclass(frozen=True, slots=True)
class CudaEfficient:
    """Masks and float32 too, but as many key heads as query heads. Its lse has rows in multiples of 32."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        out, lse, _, _ = torch.ops.aten._scaled_dot_product_efficient_attention(
            q, k, v, self._aligned(q, k, call), True, 0.0, call.is_causal, scale=call.scale
        )
        return out, _blind_rows_at_minus_infinity(lse[..., : q.shape[-2]], call.mask)

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
    ) -> Gradients:
        seed = torch.zeros((), dtype=torch.int64, device=q.device)
        rows = F.pad(lse, (0, -lse.shape[-1] % _LSE_ROWS), value=float("inf"))
        dq, dk, dv, _ = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
            grad, q, k, v, self._aligned(q, k, call), out, rows, seed, seed, 0.0,
            [True, True, True, False], call.is_causal, scale=call.scale,
        )  # fmt: skip
        return dq, dk, dv

    @staticmethod
    def _aligned(q: Tensor, k: Tensor, call: Call) -> Tensor | None:
        """The mask as numbers to add, its rows beginning where the kernel reads 16 bytes at once."""
        bias = _bias(call.mask, q.dtype)
        if bias is None:
            return None
        n_keys = k.shape[-2]
        padded = F.pad(bias, (0, -n_keys % _BIAS_COLUMNS))[..., :n_keys]
        return padded.expand(*q.shape[:-1], n_keys)


@dataclass(frozen=True, slots=True)
class Ungrouped:
    """For a kernel that takes as many key heads as query heads: keys and values are repeated, and their
    gradients summed."""

    kernel: Kernel

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        return self.kernel.forward(q, _repeated(k, q), _repeated(v, q), call)

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
    ) -> Gradients:
        dq, dk, dv = self.kernel.backward(grad, q, _repeated(k, q), _repeated(v, q), out, lse, call)
        return dq, _summed(dk, k), _summed(dv, v)


@dataclass(frozen=True, slots=True)
class Formulas:
    """The formulas above, whole score matrices at once."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        scores = self._scores(q, _repeated(k, q), call)
        lse = scores.logsumexp(-1)
        return (self._weights(scores, lse) @ _repeated(v, q).to(scores.dtype)).to(q.dtype), lse

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
    ) -> Gradients:
        keys, values = _repeated(k, q), _repeated(v, q)
        scores = self._scores(q, keys, call)
        own = scores.dtype
        weights, grad = self._weights(scores, lse), grad.to(own)
        along = (grad * out.to(own)).sum(-1, keepdim=True)
        of_scores = weights * (grad @ values.to(own).transpose(-1, -2) - along) * call.scale
        dq, dk = of_scores @ keys.to(own), of_scores.transpose(-1, -2) @ q.to(own)
        dv = weights.transpose(-1, -2) @ grad
        return dq.to(q.dtype), _summed(dk, k).to(k.dtype), _summed(dv, v).to(v.dtype)

    @staticmethod
    def _scores(q: Tensor, k: Tensor, call: Call) -> Tensor:
        own = torch.promote_types(q.dtype, torch.float32)
        scores = (q.to(own) @ k.to(own).transpose(-1, -2)) * call.scale
        hidden: Tensor | None = None if call.mask is None else ~call.mask
        if call.is_causal:
            hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        return scores if hidden is None else scores.masked_fill(hidden, -torch.inf)

    @staticmethod
    def _weights(scores: Tensor, lse: Tensor) -> Tensor:
        """Of a row without a key, whose lse is -inf, 0."""
        return torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])


def _repeated(each: Tensor, q: Tensor) -> Tensor:
    """A key head for each query head."""
    groups = q.shape[1] // each.shape[1]
    return each if groups == 1 else each.repeat_interleave(groups, 1)


def _summed(gradient: Tensor, like: Tensor) -> Tensor:
    """Over the query heads that share a key head."""
    if gradient.shape[1] == like.shape[1]:
        return gradient
    by_group: Tensor = gradient.unflatten(1, (like.shape[1], -1))
    return by_group.sum(2)


def _bias(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """What is added to scores."""
    if mask is None:
        return None
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, -torch.inf)


def _blind_rows_at_minus_infinity(lse: Tensor, mask: Tensor | None) -> Tensor:
    """Fused kernels give some number where a query sees no key."""
    return lse if mask is None else lse.masked_fill(~mask.any(-1), -torch.inf)
