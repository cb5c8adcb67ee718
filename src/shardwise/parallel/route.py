"""Route: what one rank sends and receives where data decides it: rows of a table to the ranks whose tokens
have the word (ownership.py), or tokens to the ranks that hold the experts that a router chose
(experts.py)."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Route:
    """send_rows: own rows to send, sorted by destination; send_splits[d]: how many go to rank d.
    receive_splits[s]: how many come from rank s. expand: for every use of a row its place among those that
    come: for every token of the own part, flattened, or for every choice of every token, [N, K], when what
    was made of the rows is back."""

    send_rows: Tensor
    send_splits: tuple[int, ...]
    receive_splits: tuple[int, ...]
    expand: Tensor

    def rows_sent_to_others(self, rank: int) -> int:
        return sum(self.send_splits) - self.send_splits[rank]
