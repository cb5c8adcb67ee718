"""What a rank of a shared sequence computes: each pair of a query and a key that it may see, once; and what a
block gives, against the whole."""

import pytest
import torch

from shardwise.core.batch_part import BatchPart
from shardwise.parallel.context.blocks import block_of, blocks_of
from shardwise.parallel.context.kernels import (
    Call,
    CpuFlash,
    CudaEfficient,
    CudaFlash,
    Formulas,
    Kernel,
    Ungrouped,
    kernel_for,
    merged,
)

CHUNK = 3


def places(rank: int, ranks: int) -> list[int]:
    """The place in its sequence of each token of a rank."""
    part = BatchPart(chunks=(rank, 2 * ranks - 1 - rank), n_chunks=2 * ranks)
    return list(part.positions(2 * ranks * CHUNK))


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_every_query_meets_every_key_that_it_may_see_once(ranks: int) -> None:
    for rank in range(ranks):
        met = []
        for block in blocks_of(rank, ranks, 2 * CHUNK, is_causal=True):
            for source in block.sources:
                pairs = [
                    (query, key)
                    for query in places(rank, ranks)[block.queries]
                    for key in places(source, ranks)[block.keys]
                ]
                met += [pair for pair in pairs if pair[0] >= pair[1]] if block.is_diagonal else pairs
        expected = [(query, key) for query in places(rank, ranks) for key in range(query + 1)]
        assert sorted(met) == sorted(expected)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_ranks_have_the_same_work_and_half_of_all_pairs(ranks: int) -> None:
    length = 2 * CHUNK
    work = {
        sum(block.n_pairs for block in blocks_of(rank, ranks, length, is_causal=True))
        for rank in range(ranks)
    }
    assert work == {length * length * ranks // 2}


def test_a_ring_computes_the_same_a_source_at_a_time() -> None:
    for rank in range(4):
        together = sum(block.n_pairs for block in blocks_of(rank, 4, 6, is_causal=True))
        assert together == sum(block_of(rank, source, 6, is_causal=True).n_pairs for source in range(4))


@pytest.mark.parametrize("kernel", [CpuFlash(), Ungrouped(CpuFlash()), Formulas()], ids=str)
@pytest.mark.parametrize("is_masked", [False, True])
def test_two_blocks_of_keys_give_together_what_all_keys_give(kernel: Kernel, is_masked: bool) -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    q, k, v, grad = random(2, 4, 5, 8), random(2, 2, 12, 8), random(2, 2, 12, 8), random(2, 4, 5, 8)
    seen = torch.rand(2, 1, 5, 12, generator=generator) > 0.4
    seen[0, 0, 1, :7] = False  # a query that sees no key of the first block
    seen[..., 11] = True

    def call(keys: slice) -> Call:
        return Call(0.3, mask=seen[..., keys] if is_masked else None)

    halves = (slice(0, 7), slice(7, 12))
    parts = [kernel.forward(q, k[:, :, keys], v[:, :, keys], call(keys)) for keys in halves]
    out, lse = merged(*parts[0], *parts[1])
    back = [kernel.backward(grad, q, k[:, :, keys], v[:, :, keys], out, lse, call(keys)) for keys in halves]
    leaf_q, leaf_k, leaf_v = (each.clone().requires_grad_() for each in (q, k, v))
    whole = torch.nn.functional.scaled_dot_product_attention(
        leaf_q, leaf_k, leaf_v, attn_mask=seen if is_masked else None, scale=0.3, enable_gqa=True
    )
    whole.backward(grad)
    torch.testing.assert_close(out, whole, rtol=0, atol=1e-13)
    dq, dk, dv = leaf_q.grad, leaf_k.grad, leaf_v.grad
    torch.testing.assert_close(back[0][0] + back[1][0], dq, rtol=0, atol=1e-13)
    torch.testing.assert_close(torch.cat((back[0][1], back[1][1]), 2), dk, rtol=0, atol=1e-13)
    torch.testing.assert_close(torch.cat((back[0][2], back[1][2]), 2), dv, rtol=0, atol=1e-13)


@pytest.mark.parametrize("kernel", [CpuFlash(), Formulas()], ids=str)
def test_a_causal_square_is_torch_s(kernel: Kernel) -> None:
    q, k, v = torch.randn(3, 1, 2, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    out, _ = kernel.forward(q, k, v, Call(8**-0.5, is_causal=True))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-14)


def test_what_no_fused_kernel_takes_the_formulas_do() -> None:
    def chosen(device: str, dtype: torch.dtype, width: int = 8, *, is_masked: bool = False) -> Kernel:
        q, v = torch.empty(1, 2, 4, 8, dtype=dtype), torch.empty(1, 2, 4, width, dtype=dtype)
        return kernel_for(device, q, q, v, is_masked=is_masked)

    assert isinstance(chosen("cpu", torch.float64), CpuFlash)
    assert isinstance(chosen("cpu", torch.float64, 4), Formulas)
    assert isinstance(chosen("cuda", torch.float64), Formulas)
    assert isinstance(chosen("cuda", torch.bfloat16), CudaFlash)
    assert isinstance(chosen("cuda", torch.bfloat16, 4), Formulas)
    assert chosen("cuda", torch.float32) == Ungrouped(CudaEfficient())
    assert chosen("cuda", torch.bfloat16, 16) == Ungrouped(CudaEfficient())
    assert chosen("cuda", torch.bfloat16, is_masked=True) == Ungrouped(CudaEfficient())
