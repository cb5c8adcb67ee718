"""Which rows and columns of a whole tensor a rank has, and the matrix that a record makes of them.

Tensors are called by what a Run calls them; a gradient lies as what it is of.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from torch import Tensor

from shardwise.core.walkthrough import Content, Matrix, Role, Row
from shardwise.parallel.chunks import chunk_sizes
from shardwise.parallel.ownership import RowOwnership
from shardwise.walkthrough.subject import Cut
from shardwise.walkthrough.toy import Rows, Toy


@dataclass(frozen=True, slots=True)
class Place:
    """Of a matrix in its whole tensor: its rows' tokens and items, and its columns, as far as numbered."""

    tokens: Sequence[int] | None = None
    items: Sequence[int | None] | None = None
    columns: Sequence[int] = ()
    are_columns_owned: bool = False

    @property
    def height(self) -> int:
        numbered = self.items if self.tokens is None else self.tokens
        return 1 if numbered is None else len(numbered)


class Layout:
    """Of all tensors of a toy. tokens, columns and items: of each rank, where a tensor is cut that way."""

    def __init__(self, toy: Toy) -> None:
        self.toy = toy
        self.cut = toy.subject.cut
        n_tokens, n_items = toy.tokens_per_rank, toy.vocabulary or toy.hidden
        self.all_tokens = range(toy.sequence)
        self.all_items = range(n_items)
        self.tokens = [range(rank * n_tokens, (rank + 1) * n_tokens) for rank in range(toy.ranks)]
        ends = list(accumulate(chunk_sizes(toy.width, toy.ranks), initial=0))
        self.columns = [range(start, end) for start, end in pairwise(ends)]
        style = toy.subject.style
        assert style is not None
        ownership = RowOwnership(n_items, toy.ranks, style.ownership)
        self.items = [[int(item) for item in ownership.ids_of(rank)] for rank in range(toy.ranks)]
        self._column_owner = _owners(self.columns)
        self._item_owner = _owners(self.items) if self.cut.get("parameter") is Cut.ROWS else {}

    def of(self, tensor: str, rank: int | None) -> Place:
        """Where a rank's part of a tensor lies; rank None has all of it."""
        base = _base(tensor)
        tokens: Sequence[int] = self.all_tokens
        items: Sequence[int] = self.all_items
        columns = range(self.toy.width if base == "parameter" else self.toy.hidden)
        if rank is not None:
            match self.cut.get(base):
                case Cut.ROWS:
                    tokens, items = self.tokens[rank], self.items[rank]
                case Cut.COLUMNS:
                    columns = self.columns[rank]
        # an embedding's output has the columns of its table
        owned = self.cut.get("parameter" if self.toy.subject.kind == "embedding" else base) is Cut.COLUMNS
        match self._rows(base):
            case Rows.TOKENS:
                return self.of_tokens(tokens, columns, owned)
            case Rows.ITEMS:
                return Place(None, items, columns, owned)
            case Rows.ONE:
                return Place(columns=columns if base == "parameter" else ())

    def of_tokens(
        self, tokens: Sequence[int], columns: Sequence[int] = (), are_columns_owned: bool = False
    ) -> Place:
        items = self.toy.items()
        items_of_tokens = None if items is None else [items[token] for token in tokens]
        return Place(tokens, items_of_tokens, columns, are_columns_owned)

    def is_cut(self, tensor: str) -> bool:
        return _base(tensor) in self.cut

    def part(self, tensor: str, whole: Tensor, rank: int) -> Tensor:
        """What a rank should have of a whole tensor."""
        base = _base(tensor)
        match self.cut.get(base):
            case Cut.ROWS:
                return whole[self.items[rank] if self._rows(base) is Rows.ITEMS else list(self.tokens[rank])]
            case Cut.COLUMNS:
                return whole[:, list(self.columns[rank])]
            case None:
                return whole

    def matrix(
        self,
        content: Content,
        values: Tensor | Sequence[Sequence[float | None]],
        roles: Role | Sequence[Role],
        place: Place,
        peer: int | None = None,
    ) -> Matrix:
        if isinstance(values, Tensor):
            values = (values.reshape(place.height, -1) if values.numel() else values).tolist()
        rows = []
        for index, numbers in enumerate(values):
            item = None if place.items is None else place.items[index]
            role = roles if isinstance(roles, Role) else roles[index]
            token = None if place.tokens is None else place.tokens[index]
            owner = None if item is None else self._item_owner.get(item)
            rows.append(Row(tuple(numbers), role, token, item, owner))
        owners = (self._column_owner[column] for column in place.columns) if place.are_columns_owned else ()
        return Matrix(content, tuple(place.columns), tuple(rows), peer, tuple(owners))

    def _rows(self, base: str) -> Rows:
        return {"parameter": self.toy.parameter_rows, "output": self.toy.output_rows}.get(base, Rows.TOKENS)


def _base(tensor: str) -> str:
    return "parameter" if tensor == "gradient" else tensor.removesuffix("_gradient")


def _owners(parts: Sequence[Sequence[int]]) -> dict[int, int]:
    return {number: rank for rank, numbers in enumerate(parts) for number in numbers}
