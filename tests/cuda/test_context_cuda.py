"""Attention over shared sequences on GPUs: the kernels that CUDA has, against the formulas; and real ranks on
NCCL."""

import msgspec
import pytest
import torch

from shardwise.launch import run_ranks
from shardwise.parallel.context.kernels import Call, CudaEfficient, CudaFlash, Formulas, kernel_for, merged
from tests.distributed.context_attention_workers import Answer

GPUS = torch.cuda.device_count()
ONE = pytest.mark.skipif(GPUS < 1, reason="CUDA's kernels need a GPU; this machine has none")
TWO = pytest.mark.skipif(GPUS < 2, reason=f"2 ranks on NCCL need 2 GPUs; this machine has {GPUS}")
# of values around 1, in what a kernel computes in
CLOSE = {torch.bfloat16: 4e-2, torch.float32: 2e-3}


@ONE
@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize(("rows", "keys"), [(96, 96), (40, 120)])
def test_a_gpu_s_kernels_give_what_the_formulas_do(
    dtype: torch.dtype, is_masked: bool, rows: int, keys: int
) -> None:
    """Two blocks of keys, put together, forward and backward; the second mask hides all keys of a query."""
    generator = torch.Generator("cuda").manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", dtype=dtype, generator=generator)

    q, grad = random(2, 4, rows, 64), random(2, 4, rows, 64)
    blocks = [(random(2, 2, keys, 64), random(2, 2, keys, 64)) for _ in range(2)]
    seen = torch.rand(2, 1, rows, keys, device="cuda", generator=generator) > 0.5
    seen[..., 0] = True
    hidden = seen.clone()
    hidden[0, 0, 3] = False
    masks = (seen, hidden) if is_masked else (None, None)
    assert not isinstance(kernel_for("cuda", q, *blocks[0], is_masked=is_masked), Formulas)

    def both(cast: torch.dtype) -> list[torch.Tensor]:
        calls = [Call(0.125, mask=mask) for mask in masks]
        given = [(k.to(cast), v.to(cast)) for k, v in blocks]
        mine = kernel_for("cuda", q.to(cast), *given[0], is_masked=is_masked)
        parts = [mine.forward(q.to(cast), k, v, call) for (k, v), call in zip(given, calls, strict=True)]
        out, lse = merged(*parts[0], *parts[1])
        out = out.to(cast)
        found = [out]
        for (k, v), call in zip(given, calls, strict=True):
            found += mine.backward(grad.to(cast), q.to(cast), k, v, out, lse, call)
        return found

    for ours, expected in zip(both(dtype), both(torch.float64), strict=True):
        assert (ours.double() - expected).abs().max() <= CLOSE[dtype] * max(1.0, float(expected.abs().max()))


@ONE
def test_a_causal_square_takes_flash_in_half_precision() -> None:
    q = torch.randn(1, 4, 128, 64, device="cuda", dtype=torch.bfloat16)
    assert isinstance(kernel_for("cuda", q, q, q, is_masked=False), CudaFlash)
    out, _ = CudaFlash().forward(q, q, q, Call(0.125, is_causal=True))
    other, _ = CudaEfficient().forward(q, q, q, Call(0.125, is_causal=True))
    torch.testing.assert_close(out, other, rtol=0, atol=4e-2)


@TWO
def test_a_shared_sequence_attends_as_on_one_gpu() -> None:
    worker = "tests.distributed.context_attention_workers:run"
    for each in run_ranks(worker, b"", world_size=2, device_type="cuda", timeout_s=120):
        errors = msgspec.json.decode(each, type=Answer).errors
        assert {name: error for name, error in errors.items() if not error <= 1e-12} == {}
