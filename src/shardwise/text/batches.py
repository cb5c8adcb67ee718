"""The text room's last stage: batches of a token stream, a pure function of the step, the same on every
rank.

Shapes: B sequences in the batch, S tokens in a sequence. The stream is cut into windows of S ids, each with
the id that follows it: window w is ids[wS : wS + S], its labels are ids[wS + 1 : wS + S + 1]. Step n takes
windows nB to nB + B - 1 and starts over after the last whole window, so no sequence is short and no label
crosses from the stream's end to its start.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray

from shardwise.core.errors import OptionError, TextError
from shardwise.text.stream import TokenStream

IGNORED = -100
"""The label of a token from which nothing is learnt: torch's cross_entropy ignores it, and so do our losses
(parallel/loss.py)."""


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Ids and the labels that follow them, torch.int64 on the CPU, both [B, S]."""

    ids_BS: torch.Tensor  # noqa: N815
    labels_BS: torch.Tensor  # noqa: N815

    @classmethod
    def of(cls, ids_BT: NDArray[np.int64]) -> Self:
        """Of pieces of T = S + 1 ids: each id but the last, and the one that follows it."""
        both_BT = torch.from_numpy(ids_BT)
        # of one sequence contiguous() gives views of the same memory
        ids_BS, labels_BS = (
            part.clone(memory_format=torch.contiguous_format) for part in (both_BT[:, :-1], both_BT[:, 1:])
        )
        return cls(ids_BS, labels_BS)


@dataclass(frozen=True, slots=True)
class Batches:
    """A stream seen as batches of `batch` sequences of `seq` tokens."""

    stream: TokenStream
    batch: int
    seq: int

    def __post_init__(self) -> None:
        if self.batch < 1 or self.seq < 1:
            raise OptionError(f"batch={self.batch}, seq={self.seq} is no batch. Use 1 or more for both.")
        tokens = self.stream.summary.tokens
        if tokens < self.seq + 1:
            raise TextError(
                f"{self.stream.summary.source} has {tokens} tokens, and a sequence of {self.seq} needs "
                f"{self.seq + 1}. "
                f"Give more text, or use seq <= {tokens - 1}."
            )

    def at(self, step: int) -> Batch:
        """The whole batch of one step, counted from 0."""
        assert step >= 0, step
        windows = (self.stream.summary.tokens - 1) // self.seq
        window_B = (step * self.batch + np.arange(self.batch)) % windows
        return Batch.of(self.stream.read(window_B.astype(np.int64) * self.seq, self.seq + 1))
