"""A grouped matmul as one product: which rows meet which group's matrix is data, so load is taken to be
balanced: of R rows and G groups min(G, R) are met, by the same number of rows each. Standard library only.

    a [R, K], b [G, K, N]    rows of each group times its matrix (forward, and the rows' gradient)
    a [G, M, K], b [K, R]    each group's matrix times its columns
    a [M, R], b [R, N]       a sum over each group's rows -> [G, M, N]       (the matrices' gradient)
    a [G, M, K], b [G, K, N] a batch of matmuls

Source: PyTorch's torch.nn.functional.grouped_mm.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from shardwise.core.program import TensorSpec

GROUPED = "aten::_grouped_mm"
"""The dispatcher's name of it: a, b, and where each group ends."""


def load_words(expert_load: float) -> str:
    """What a reader of a Program, or of what is made of it, must know. expert_load: see StepSettings."""
    unknown = "Which expert a token meets is data"
    if expert_load == 1:
        return (
            f"{unknown}: each expert is taken to meet equally many tokens. A rank whose experts meet more "
            "takes longer, and holds more (--expert-load)."
        )
    return (
        f"{unknown}: the experts of the first rank are taken to meet {expert_load:g} times as many tokens as "
        "the mean rank's. It sets the pace, and holds most."
    )


@dataclass(frozen=True, slots=True)
class GroupedProduct:
    """met: groups that some row meets. m, n, k: of one of them, its share of the rows rounded up. flops: of
    all rows. matrix_share: of the groups' matrices, those that are read."""

    met: int
    m: int
    n: int
    k: int
    flops: int
    matrix_share: float


def grouped_product(inputs: Sequence[TensorSpec]) -> GroupedProduct:
    """Of its operands and, where rows are grouped, the groups' ends."""
    a, b, *ends = (spec.shape for spec in inputs)
    if len(a) == len(b) == 3:
        return GroupedProduct(a[0], a[1], b[2], a[2], 2 * prod(a) * b[2], 1.0)
    (groups,), rows = ends[0], a[0] if len(b) == 3 else b[1] if len(a) == 3 else b[0]
    met = max(1, min(groups, rows))
    each = -(-rows // met)
    share = met / groups if groups else 1.0
    if len(b) == 3:
        return GroupedProduct(met, each, b[2], b[1], 2 * prod(a) * b[2], share)
    if len(a) == 3:
        return GroupedProduct(met, a[1], each, a[2], 2 * a[1] * a[2] * rows, share)
    return GroupedProduct(met, a[0], b[1], each, 2 * prod(a) * b[1], share)
