"""ModelSource: what a command knows of a model before it is built, whoever makes it."""

from typing import Protocol

import torch
from torch import nn

from shardwise.core.plan import Family


class ModelSource(Protocol):
    """What a command knows of a model before it is built."""

    @property
    def name(self) -> str:
        """As the user named it."""

    @property
    def about(self) -> str:
        """What it is, in one line."""

    @property
    def vocab_size(self) -> int | None:
        """None where only the built model tells: vocab_size_of(model)."""

    @property
    def max_seq(self) -> int | None:
        """The longest sequence that it has positions for; None where it has no limit that is known."""

    @property
    def family(self) -> Family:
        """Whose module names a built-in plan speaks of; where they aren't the model's, the plan's rules match
        nothing and it is refused."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of results must know: dropout that is on, parts that are left out. A sentence
        each."""

    @property
    def initialises(self) -> bool:
        """Whether build() on a real device gives weights to begin a training with; else they are
        initial_parameter()'s."""

    @property
    def default_plan(self) -> str | None:
        """The name of the plan that shards it where none is named; None where the source doesn't know."""

    def small(self, tp: int) -> "ModelSource | None":
        """A model of the same modules at sizes that run anywhere, also sharded over tp ranks; None where
        nobody knows one."""

    def build(self, *, dtype: torch.dtype, device: torch.device | str = "meta") -> nn.Module:
        """model(ids [B, S]) gives plain logits [B, S, V]. On the meta device it holds no weights. Raises
        ModelError."""
