"""Where a step is: its phase, and the module that asks for what runs.

In the forward that is the innermost module whose call runs (its hooks included), in the backward the module
in whose forward the running autograd node was made (by the node's sequence number), in a recomputed forward
the module again.
"""

from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from torch import nn

from shardwise.core.program import LOSS_MODULE, Phase
from shardwise.torch_private import NO_SEQUENCE, current_node, next_sequence, sequence_of

_RAISED_IN = "_shardwise_raised_in"


class Place:
    """step_phase: what the step said last; `phase` knows of recomputing too."""

    def __init__(self, model: nn.Module) -> None:
        self.step_phase = Phase.FORWARD
        self._recomputing = 0
        self._stack: list[str] = []
        # whose call ran from which sequence number on
        self._starts = [-1]
        self._modules = [""]
        modules = model.named_modules(remove_duplicate=False)
        self._names = {id(module): name for name, module in modules if name}
        self._owners = {id(p): name.rpartition(".")[0] for name, p in model.named_parameters()}

    @property
    def phase(self) -> Phase:
        return Phase.RECOMPUTE if self._recomputing else self.step_phase

    @property
    def module(self) -> str:
        """Its name; empty where none asks."""
        if self._recomputing or self.step_phase is not Phase.BACKWARD:
            return self._innermost()
        node = current_node()
        if node is None:
            return ""
        sequence = sequence_of(node)
        if sequence >= NO_SEQUENCE:
            return self._owners.get(id(getattr(node, "variable", None)), "")
        return self._modules[bisect_right(self._starts, sequence) - 1]

    def enter_phase(self, phase: Phase) -> None:
        """Told by the step as each phase begins."""
        self.step_phase = phase
        self._stack[:] = [LOSS_MODULE] if phase is Phase.LOSS else []
        self._mark()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Follows every module's call."""
        original = nn.Module.__call__

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            name = self._names.get(id(module))
            if name is None:
                return original(module, *args, **kwargs)
            again = self.step_phase is Phase.BACKWARD
            self._recomputing += again
            self._stack.append(name)
            self._mark()
            try:
                return original(module, *args, **kwargs)
            except Exception as error:
                # on the error itself: held here, it would hold the tensors of its frames
                if not hasattr(error, _RAISED_IN):
                    setattr(error, _RAISED_IN, name)
                raise
            finally:
                self._stack.pop()
                self._mark()
                self._recomputing -= again

        with patch.object(nn.Module, "__call__", call):
            yield

    def _innermost(self) -> str:
        return self._stack[-1] if self._stack else ""

    def _mark(self) -> None:
        self._starts.append(next_sequence())
        self._modules.append(self._innermost())


def raised_in(error: Exception) -> str | None:
    """The innermost module out of whose call an error came; None where no call saw it."""
    name: str | None = getattr(error, _RAISED_IN, None)
    return name
