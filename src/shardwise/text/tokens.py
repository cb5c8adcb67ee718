"""What the text room's readers need of token ids, wherever they lie: in memory (stream.py) or in files
that are mapped (shards).

Shapes: N pieces, L ids in a piece.
"""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from shardwise.core.measurement import TextSummary


class Tokens(Protocol):
    """Token ids in one order, that never change."""

    @property
    def summary(self) -> TextSummary: ...

    def read(self, starts_N: NDArray[np.int64], length: int) -> NDArray[np.int64]:
        """The ids [N, L] of N pieces of `length` ids, one from each start on; all lie within the tokens."""
        ...
