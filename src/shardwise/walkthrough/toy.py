"""The toys of the walk-throughs: a small module of each kind, and the numbers that go in.

Only these numbers are chosen, so that people can recognise them: row 5 of a table is 50, 51, 52, 53. All are
float32.

Suffixes: T ranks, S sequence (a batch of one), H hidden, V vocabulary.
"""

from collections.abc import Sequence
from enum import Enum, auto

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from shardwise.parallel.loss import IGNORED
from shardwise.walkthrough.subject import Subject

VOCABULARY = 8
# a word that comes twice on one rank, one that comes on two, and on every rank some of another's
IDS = (5, 2, 5, 1, 7, 2, 0, 5, 3, 6, 6, 1)
LABELS = (5, 2, IGNORED, 7, 1, 0, 4, 3)
DTYPE = torch.float32


class Rows(Enum):
    """What the rows of a tensor are. ITEMS: a parameter's own, such as a table's ids. ONE: it has one."""

    TOKENS = auto()
    ITEMS = auto()
    ONE = auto()


class Toy:
    """A module on T ranks, its input, and its output's gradient. A subclass for each kind of module."""

    tokens_per_rank = 2
    vocabulary: int | None = None
    features: int | None = None
    parameter_rows = Rows.ITEMS
    output_rows = Rows.TOKENS

    def __init__(self, subject: Subject, ranks: int) -> None:
        self.subject = subject
        self.ranks = ranks
        self.hidden = 6 if ranks == 3 else 4
        self.sequence = self.tokens_per_rank * ranks

    @property
    def width(self) -> int:
        """Columns of the parameter."""
        return self.hidden

    def module(self) -> nn.Module:
        raise NotImplementedError

    def input(self) -> Tensor:
        """[1, S, H], or [1, S] ids."""
        raise NotImplementedError

    def output_gradient(self) -> Tensor:
        """[1, S, H]."""
        return _grid(self.sequence, self.hidden, row=10, first=10).unsqueeze(0)

    def items(self) -> Sequence[int | None] | None:
        """The item of each token (its id, its label); None where tokens have none."""
        return None

    def block_rows(self, block: Tensor) -> Tensor:
        """A block as it travels, as rows."""
        return block


class EmbeddingToy(Toy):
    tokens_per_rank = 3
    vocabulary = VOCABULARY

    def module(self) -> nn.Module:
        table = _grid(VOCABULARY, self.hidden, row=10)
        return _with_weight(skip_init(nn.Embedding, VOCABULARY, self.hidden, dtype=DTYPE), table)

    def input(self) -> Tensor:
        return torch.tensor([IDS[: self.sequence]])

    def output_gradient(self) -> Tensor:
        """100, 101, 102, 103 for token 0, and so on."""
        return _grid(self.sequence, self.hidden, row=100, first=100).unsqueeze(0)

    def items(self) -> Sequence[int | None]:
        return IDS[: self.sequence]


class LinearToy(Toy):
    def __init__(self, subject: Subject, ranks: int) -> None:
        super().__init__(subject, ranks)
        self.features = self.hidden

    def module(self) -> nn.Module:
        return _linear(_grid(self.hidden, self.hidden, row=10, first=10))

    def input(self) -> Tensor:
        S = self.sequence
        return torch.arange(1, S + 1, dtype=DTYPE).view(1, S, 1).expand(1, S, self.hidden).contiguous()


class NormToy(Toy):
    parameter_rows = Rows.ONE

    def module(self) -> nn.Module:
        norm = nn.RMSNorm(self.hidden, eps=1e-5, dtype=DTYPE)
        return _with_weight(norm, torch.arange(1, self.hidden + 1, dtype=DTYPE))

    def input(self) -> Tensor:
        signs = torch.tensor([1.0, -1.0], dtype=DTYPE).repeat(self.hidden // 2)
        return (_grid(self.sequence, self.hidden, row=1, first=1) * signs).unsqueeze(0)


class LossToy(Toy):
    """A head over one-hot tokens: its weight is the table of logits, which is the parameter here."""

    vocabulary = VOCABULARY
    parameter_rows = Rows.TOKENS
    output_rows = Rows.ONE

    @property
    def width(self) -> int:
        return VOCABULARY

    def module(self) -> nn.Module:
        logits = [
            [(3 * token + 5 * item) % 7 for item in range(VOCABULARY)] for token in range(self.sequence)
        ]
        return _linear(torch.tensor(logits, dtype=DTYPE).T)

    def input(self) -> Tensor:
        return torch.eye(self.sequence, dtype=DTYPE).unsqueeze(0)

    def labels(self) -> Tensor:
        return torch.tensor([LABELS[: self.sequence]])

    def items(self) -> Sequence[int | None]:
        return [None if label == IGNORED else label for label in LABELS[: self.sequence]]

    def block_rows(self, block: Tensor) -> Tensor:
        """[2, S] statistics travel; a token's two numbers are a row."""
        return block.view(2, -1).T


TOYS: dict[str, type[Toy]] = {
    "embedding": EmbeddingToy,
    "linear": LinearToy,
    "norm": NormToy,
    "loss": LossToy,
}


def _linear(weight: Tensor) -> nn.Module:
    features, inputs = weight.shape
    return _with_weight(skip_init(nn.Linear, inputs, features, bias=False, dtype=DTYPE), weight)


def _with_weight(module: nn.Module, weight: Tensor) -> nn.Module:
    """The module, made by skip_init so that no random number is drawn, with this weight."""
    with torch.no_grad():
        module.get_parameter("weight").copy_(weight)
    return module


def _grid(rows: int, columns: int, *, row: int, first: int = 0) -> Tensor:
    """Row r, column c: first + row x r + c."""
    return first + row * torch.arange(rows, dtype=DTYPE).unsqueeze(1) + torch.arange(columns, dtype=DTYPE)
