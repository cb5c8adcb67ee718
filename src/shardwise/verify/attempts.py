"""In which ways a proof tries to run a model, one after the other: float64 says most, and not every model
runs in it, or is exact enough to be told from a wrong one."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch

from shardwise.models.flex_attention import by_formula
from shardwise.verify.unrounded import Unrounded

BY_FORMULA = "flex attention by its formula in plain ops, and what is compiled as it is written"
UNROUNDED = "without the model's own casts to shorter dtypes"


@dataclass(frozen=True, slots=True)
class Attempt:
    """dtype: of the parameters. by_formula: see models/flex_attention.py. unrounded: see unrounded.py."""

    dtype: str
    by_formula: bool = False
    unrounded: bool = False

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def otherwise(self) -> tuple[str, ...]:
        """What of the model runs otherwise than it is written."""
        told = ((BY_FORMULA, self.by_formula), (UNROUNDED, self.unrounded))
        return tuple(what for what, is_so in told if is_so)

    def __str__(self) -> str:
        return f"in {', '.join((self.dtype, *self.otherwise))}"

    @contextmanager
    def entered(self) -> Iterator[None]:
        """As the model is to be run, sharded or not."""
        with ExitStack() as stack:
            if self.by_formula:
                stack.enter_context(by_formula())
            if self.unrounded:
                stack.enter_context(Unrounded())
            yield


def attempts(dtype: str | None) -> tuple[Attempt, ...]:
    """The best first. dtype: the only one that is asked for."""
    plain = tuple(Attempt(each) for each in ([dtype] if dtype else ["float64", "float32"]))
    return (*plain, Attempt("float64", unrounded=True)) if dtype != "float32" else plain
