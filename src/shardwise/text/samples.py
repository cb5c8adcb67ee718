"""What training reads: sequences by one number, the position; a pure function of it, the same on every
rank.

Shapes: B sequences in the batch, S tokens in a sequence. The tokens are cut into windows as batches.py
does it: window w is ids[wS : wS + S], its labels are ids[wS + 1 : wS + S + 1]. The last `held_out` of
them are for validation alone. All others are an epoch, each read once, in a seeded order that is another
one each epoch.

The position is the number of sequences read since the start, over all epochs and ranks. A batch is the
sequences from a position on, so whoever knows the position goes on with the same sequences, however many
ranks there are and whatever the batch is; a rank that wants its part alone asks for that part of the
positions."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from shardwise.core.errors import OptionError, TextError
from shardwise.text.batches import IGNORED, Batch
from shardwise.text.permutation import Permutation
from shardwise.text.tokens import Tokens


@dataclass(frozen=True, slots=True, eq=False)
class Samples:
    """Tokens as sequences of `seq`: `windows` in an epoch, and `held_out` for validation."""

    text: Tokens
    seq: int
    seed: int
    windows: int
    held_out: int

    @classmethod
    def of(cls, text: Tokens, seq: int, seed: int = 0, held_out: int = 0) -> "Samples":
        """held_out: how many sequences at the tokens' end are for validation. Raises OptionError for
        numbers that can't be, TextError where the text is too short for one sequence to train on."""
        for name, value, least in (("seq", seq, 1), ("seed", seed, 0), ("held-out sequences", held_out, 0)):
            if value < least:
                raise OptionError(f"{name}: {value}. Use {least} or more.")
        tokens = text.summary.tokens
        windows = (tokens - 1) // seq - held_out
        if windows < 1:
            wanted = f"1 sequence of {seq} needs {seq + 1}"
            advice = "or use shorter sequences"
            if held_out:
                sequences = held_out + 1
                wanted = (
                    f"{sequences} sequences of {seq}, {held_out} of them held out, need {sequences * seq + 1}"
                )
                advice = "use shorter sequences, or hold out fewer"
            raise TextError(
                f"{text.summary.source} has {tokens} tokens, and {wanted}. Give more text, {advice}."
            )
        return cls(text, seq, seed, windows, held_out)

    @property
    def tokens(self) -> int:
        return self.text.summary.tokens

    @property
    def digest(self) -> str:
        """Of the token ids in their order: what a checkpoint compares. seq, seed and held_out are not in
        it."""
        return self.text.summary.digest

    def at(self, position: int, count: int) -> Batch:
        """The `count` sequences from a position on; they may lie in several epochs."""
        assert position >= 0, position
        assert count >= 1, count
        position_B = position + np.arange(count, dtype=np.int64)
        epoch_B, place_B = np.divmod(position_B, self.windows)
        window_B = np.empty_like(place_B)
        for epoch in range(int(epoch_B[0]), int(epoch_B[-1]) + 1):
            here_B = epoch_B == epoch
            window_B[here_B] = Permutation(self.windows, self.seed, epoch).at(place_B[here_B])
        return self._batch(window_B)

    def held_out_at(self, index: int, count: int) -> Batch:
        """The `count` sequences held out from number `index` on. Beyond the last one sequences are of id
        0 and without labels, so that a mean over labels is exact in batches of any size."""
        assert index >= 0, index
        assert count >= 1, count
        number_B = index + np.arange(count, dtype=np.int64)
        is_beyond_B = torch.from_numpy(number_B >= self.held_out)
        batch = self._batch(self.windows + np.minimum(number_B, self.held_out - 1))
        batch.ids_BS[is_beyond_B] = 0
        batch.labels_BS[is_beyond_B] = IGNORED
        return batch

    def _batch(self, window_B: NDArray[np.int64]) -> Batch:
        return Batch.of(self.text.read(window_B * self.seq, self.seq + 1))
