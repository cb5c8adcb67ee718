"""What training reads: sequences by one number, the position; a pure function of it, the same on every
rank.

Shapes: B sequences in the batch, S tokens in a sequence. The tokens are cut into windows as batches.py
does it: window w is ids[wS : wS + S], its labels are ids[wS + 1 : wS + S + 1]. The last `held_out` of
them are for validation alone. All others are an epoch, each read once, in a seeded order that is another
one each epoch.

Documents follow each other without gaps, and a window may hold several: attention goes across their ends.
Where they are `masked`, no label does: the label of a document's last token is IGNORED.

The position is the number of sequences read since the start, over all epochs and ranks. A batch is the
sequences from a position on, so whoever knows the position goes on with the same sequences, however many
ranks there are and whatever the batch is; a rank that wants its part alone asks for that part of the
positions."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from shardwise.core.case import DOCUMENTS, MASKED, PACKED
from shardwise.core.errors import OptionError, TextError
from shardwise.core.option import check_choice
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
    documents: str = PACKED

    @classmethod
    def of(
        cls, text: Tokens, seq: int, seed: int = 0, held_out: int = 0, documents: str = PACKED
    ) -> "Samples":
        """held_out: how many sequences at the tokens' end are for validation. documents: PACKED or
        MASKED. Raises OptionError for numbers that can't be, TextError where the text is too short for
        one sequence to train on."""
        check_choice("--documents", documents, DOCUMENTS)
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
        if documents == MASKED and text.summary.documents == tokens:
            raise TextError(
                f"{text.summary.source} has {tokens} documents of one token each: with --documents {MASKED} "
                f"there is nothing to learn. Use --documents {PACKED}, or longer documents."
            )
        return cls(text, seq, seed, windows, held_out, documents)

    @property
    def tokens(self) -> int:
        return self.text.summary.tokens

    @property
    def digest(self) -> str:
        """Of the token ids in their order, and of where documents end if labels are masked there: what a
        checkpoint compares. seq, seed and held_out are not in it."""
        digest = self.text.summary.digest
        return digest if self.documents == PACKED else f"{digest}-{self.text.documents_digest}"

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
        starts_B = window_B * self.seq
        batch = Batch.of(self.text.read(starts_B, self.seq + 1))
        if self.documents == MASKED:
            batch.labels_BS[torch.from_numpy(self._is_of_another_document(starts_B))] = IGNORED
        return batch

    def _is_of_another_document(self, starts_B: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which labels [B, S] are the first token of a document. The label at place i is token start + 1
        + i, and a document's end is the place of the next one's first token."""
        is_first_BS = np.zeros((starts_B.size, self.seq), dtype=np.bool_)
        for row, start in enumerate(starts_B.tolist()):
            ends = self.text.ends_between(start + 1, start + 1 + self.seq)
            is_first_BS[row, ends - start - 1] = True
        return is_first_BS
