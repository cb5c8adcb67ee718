"""What the text room's readers need of token ids, wherever they lie: in memory (stream.py) or in files
that are mapped (shards).

Shapes: N pieces, L ids in a piece.
"""

import hashlib
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from shardwise.core.measurement import TextSummary


class Tokens(Protocol):
    """Token ids in one order, that never change."""

    @property
    def summary(self) -> TextSummary: ...

    @property
    def documents_digest(self) -> str:
        """Of where documents end."""
        ...

    def read(self, starts_N: NDArray[np.int64], length: int) -> NDArray[np.int64]:
        """The ids [N, L] of N pieces of `length` ids, one from each start on; all lie within the tokens."""
        ...

    def ends_between(self, first: int, last: int) -> NDArray[np.int64]:
        """Where documents end, from `first` on and before `last`, ascending: an end is the place after its
        document's last token."""
        ...


def digest_of_ends(ends: NDArray[np.int64]) -> str:
    """blake2b, 16 bytes in hex, of the ends as little-endian int64."""
    return hashlib.blake2b(ends.astype("<i8", copy=False).tobytes(), digest_size=16).hexdigest()
