"""Flex attention where nothing compiles it: on a CPU PyTorch has no kernel for its backward, and refuses. Its
own formula in plain ops has one, in any dtype.

What a function on scores captures gets no gradient there: one that trains what it captures is refused.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FunctionType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from shardwise.torch_private import FLEX_DEVICE_CHECK, FLEX_GRAPH, FLEX_UNCOMPILED


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
        if _trains(score_mod, set()):
            raise RuntimeError(
                "flex attention's score_mod trains a tensor that it captures, and without a GPU "
                "PyTorch gives that no gradient."
            )
        return make_graph(score_mod, *args)

    return make


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
