"""Flex attention where nothing compiles it: on a CPU PyTorch has no kernel for its backward, and refuses. Its
own formula in plain ops has one, in any dtype. And where there is no data, it runs on no device: then its
formula in plain ops is what a trace sees.

What a function on scores captures gets no gradient there: one that trains what it captures is refused.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import FunctionType
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shardwise.torch_private import (
    FLEX_DEVICE_CHECK,
    FLEX_GRAPH,
    FLEX_MASK,
    FLEX_UNCOMPILED,
    changes_nothing,
    masks_nothing,
    without_modes,
)


class _Called(Exception):  # noqa: N818  # no error: it ends a look
    """Flex attention was."""


def calls_flex_attention(model: nn.Module, ids_BS: Tensor) -> bool:
    """Whether a forward comes to it. What follows isn't run, and nothing is compiled for the look."""

    def called(*_: object) -> None:
        raise _Called

    with torch.no_grad(), _as_written(), patch.object(*FLEX_DEVICE_CHECK, called):
        try:
            model(ids_BS)
        except _Called:
            return True
        except Exception:  # who runs it for real will tell
            return False
    return False


@contextmanager
def by_formula() -> Iterator[None]:
    """Flex attention inside runs by its formula on a CPU, and whatever is compiled runs as it is written."""
    with ExitStack() as stack:
        stack.enter_context(_as_written())
        stack.enter_context(patch.object(*FLEX_DEVICE_CHECK, lambda *_: None))
        stack.enter_context(patch.object(*FLEX_UNCOMPILED, True))
        stack.enter_context(patch.object(*FLEX_GRAPH, _checked(getattr(*FLEX_GRAPH))))
        yield


@contextmanager
def without_data() -> Iterator[None]:
    """Flex attention inside comes to the dispatcher as a higher-order op with tensors that hold nothing,
    whatever device its mask was made on."""
    table = "kv_num_blocks"

    def read(mask: Any) -> Tensor:
        with without_modes():
            made: Tensor = vars(mask)[table].to("meta")  # it asks where that lies, and then for nothing of it
        return made

    def write(mask: Any, made: Tensor) -> None:
        vars(mask)[table] = made

    with by_formula(), patch.object(FLEX_MASK, table, property(read, write), create=True):
        yield


@dataclass(frozen=True, slots=True)
class Attended:
    """A call of flex attention as the dispatcher has it: [B, N, S, D], as many heads as there are or fewer
    keys'. by_heads: whether what its functions do may depend on the head."""

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    is_masked: bool
    by_heads: bool
    wants_sums: bool
    wants_most: bool

    @classmethod
    def of(cls, args: Sequence[Any]) -> "Attended":
        """Raises RuntimeError where a function on scores trains what it captures."""
        query, key, value, scores, mask, scale, options = args[:7]
        _check_scores(scores)
        has_heads = mask[_BLOCKS].dim() > 3 and mask[_BLOCKS].shape[1] > 1
        return cls(
            query, key, value, scale,
            is_masked=not masks_nothing(mask[-1]),
            by_heads=has_heads or not changes_nothing(scores),
            wants_sums=bool(options.get("OUTPUT_LOGSUMEXP")),
            wants_most=bool(options.get("OUTPUT_MAX")),
        )  # fmt: skip

    def run(self) -> tuple[Tensor, Tensor, Tensor]:
        """What it gives, by plain ops. A mask is taken for a causal one: of both a trace without data keeps
        that queries and keys must know where they stand."""
        few = self.key.shape[1] < self.query.shape[1]
        given = F.scaled_dot_product_attention(
            self.query, self.key, self.value, is_causal=self.is_masked, scale=self.scale, enable_gqa=few
        )
        nothing = given.new_empty(0)
        if not self.wants_sums and not self.wants_most:
            return given, nothing, nothing
        repeats = self.query.shape[1] // self.key.shape[1]
        key = self.key.repeat_interleave(repeats, 1) if few else self.key
        scores = (self.query @ key.transpose(-2, -1) * self.scale).float()
        sums = scores.logsumexp(-1) if self.wants_sums else nothing
        return given, sums, scores.amax(-1) if self.wants_most else nothing


_BLOCKS = 3
"""Where the blocks of a mask stand in what the dispatcher is given of it: [B, N, blocks, blocks]."""


@contextmanager
def _as_written() -> Iterator[None]:
    """Nothing inside is compiled. The compiler takes a second to import, so it is told once somebody has."""
    with ExitStack() as stack:
        compile_, is_told = torch.compile, False

        def tell() -> None:
            nonlocal is_told
            if not is_told:
                is_told = True
                stack.enter_context(torch.compiler.set_stance("force_eager"))

        def compiled(*args: Any, **kwargs: Any) -> Any:
            tell()
            return compile_(*args, **kwargs)

        if "torch._dynamo" in sys.modules:
            tell()
        stack.enter_context(patch.object(torch, "compile", compiled))
        yield


def _checked(make_graph: Callable[..., Any]) -> Callable[..., Any]:
    def make(score_mod: Callable[..., Any], *args: Any) -> Any:
        _check_scores(score_mod)
        return make_graph(score_mod, *args)

    return make


def _check_scores(score_mod: Callable[..., Any]) -> None:
    if _trains(score_mod, set()):
        raise RuntimeError(
            "flex attention's score_mod trains a tensor that it captures, and without a GPU "
            "PyTorch gives that no gradient."
        )


def _trains(value: object, seen: set[int]) -> bool:
    """Whether a function captures, however deep, a tensor that has a gradient to take."""
    if id(value) in seen:
        return False
    seen.add(id(value))
    match value:
        case Tensor():
            return value.requires_grad
        case nn.Module():
            return any(each.requires_grad for each in value.parameters())
        case FunctionType():
            cells = (cell for cell in value.__closure__ or () if cell.cell_contents is not value)
            return any(_trains(cell.cell_contents, seen) for cell in cells)
        case list() | tuple():
            return any(_trains(each, seen) for each in value)
        case _:
            return any(
                _trains(each, seen)
                for name in ("__self__", "__func__", "func", "args", "fn")
                if (each := getattr(value, name, None)) is not None and not isinstance(each, str)
            )
