"""What verify measures of a model's own rounding, and the ways in which it runs one that rounds too much."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

from shardwise.models.flex_attention import by_formula
from shardwise.verify.noise import SplitMatmuls
from shardwise.verify.unrounded import Unrounded

ENDS = torch.tensor([3, 3, 40, 64], dtype=torch.int32)
ROWS, INNER, OUTER = 64, 48, 32


def drawn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


def rows_by_matrices() -> Tensor:
    return grouped_mm(drawn(ROWS, INNER), drawn(len(ENDS), INNER, OUTER), offs=ENDS)


def matrices_gradient() -> Tensor:
    return grouped_mm(drawn(INNER, ROWS), drawn(ROWS, OUTER), offs=ENDS)


def batch_of_matmuls() -> Tensor:
    return grouped_mm(drawn(len(ENDS), ROWS, INNER), drawn(len(ENDS), INNER, OUTER))


@pytest.mark.parametrize("product", [rows_by_matrices, matrices_gradient, batch_of_matmuls])
@pytest.mark.parametrize("parts", [2, 3])
def test_a_grouped_matmul_summed_in_parts_is_off_by_its_rounding(
    product: Callable[[], Tensor], parts: int
) -> None:
    whole = product()
    with SplitMatmuls(parts):
        split = product()
    assert split.shape == whole.shape
    off = (split.double() - whole.double()).norm() / whole.double().norm()
    assert 0 < off < 0.02


def rounding(rows: Tensor, matrices: Tensor) -> Tensor:
    """A mixture's experts as torchtitan computes them: in bfloat16, whatever the model is in."""
    made = grouped_mm(rows.bfloat16(), matrices.to(torch.bfloat16), offs=ENDS)
    return torch.softmax(made.type_as(rows), -1, dtype=torch.float32).to(rows.dtype)


def test_without_its_casts_a_model_that_rounds_computes_in_its_own_dtype() -> None:
    rows = drawn(ROWS, INNER, dtype=torch.float64).requires_grad_()
    matrices = drawn(len(ENDS), INNER, OUTER, dtype=torch.float64).requires_grad_()
    starts = [0, *ENDS.tolist()[:-1]]
    parts = zip(starts, ENDS.tolist(), matrices, strict=True)
    expected = torch.softmax(torch.cat([rows[start:end] @ matrix for start, end, matrix in parts]), -1)
    gradients = torch.autograd.grad(expected.square().sum(), (rows, matrices))
    with Unrounded():
        made = rounding(rows, matrices)
        own = torch.autograd.grad(made.square().sum(), (rows, matrices))
    torch.testing.assert_close(made, expected)
    torch.testing.assert_close(own, gradients)
    assert (rounding(rows, matrices) - expected).abs().max() > 1e-4


def test_without_casts_what_is_made_longer_is_made_so() -> None:
    short = torch.ones(2, dtype=torch.bfloat16)
    with Unrounded():
        assert short.double().dtype is torch.float64
        assert short.to(torch.float32).dtype is torch.float32
        assert torch.ones(2, dtype=torch.int64).to(torch.bfloat16).dtype is torch.bfloat16


OF_THE_COMPILER = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")


@OF_THE_COMPILER
def test_flex_attention_by_its_formula_has_the_gradients_of_plain_attention() -> None:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def causal(_: Tensor, __: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query >= key

    mask = create_block_mask(causal, None, None, 8, 8, device="cpu")
    q, k, v = (drawn(1, heads, 8, 4, dtype=torch.float64).requires_grad_() for heads in (4, 2, 2))
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    expected = torch.autograd.grad(plain.square().sum(), (q, k, v))
    with pytest.raises(NotImplementedError, match="backward on CPU"):
        flex_attention(q, k, v, block_mask=mask, enable_gqa=True)
    with by_formula(), SplitMatmuls(2):
        made = torch.compile(flex_attention)(q, k, v, block_mask=mask, enable_gqa=True)
        own = torch.autograd.grad(made.square().sum(), (q, k, v))
    torch.testing.assert_close(made, plain)
    torch.testing.assert_close(own, expected)


@OF_THE_COMPILER
def test_a_score_function_that_trains_what_it_captures_is_refused() -> None:
    from torch.nn.attention.flex_attention import flex_attention

    slope = torch.ones((), requires_grad=True)

    def sloped(score: Tensor, _: Tensor, __: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score + slope * (key - query)

    q = drawn(1, 1, 8, 4, dtype=torch.float32).requires_grad_()
    with by_formula(), pytest.raises(RuntimeError, match="score_mod trains a tensor that it captures"):
        flex_attention(q, q, q, score_mod=sloped)
