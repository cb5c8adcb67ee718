"""The token ids that a traced step meets: what explain and predict share."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from shardwise.core.case import StepSettings, TextSource
from shardwise.core.errors import OptionError

if TYPE_CHECKING:
    from torch import Tensor

    from shardwise.models.source import ModelSource
    from shardwise.text.stream import TokenStream

MOST_TRACED = 2**25
"""Ids that a traced step meets at most. They are real: tracing a step of 2**26 took 3 GB."""


def check_traced(batch: int, seq: int) -> None:
    """Raises OptionError for more tokens than a trace meets."""
    if batch * seq > MOST_TRACED:
        raise OptionError(
            f"{batch:,} sequences of {seq:,} tokens at a time: a traced step meets at most {MOST_TRACED:,} "
            "ids. Use a smaller --batch, --micro-batches or --seq, or more --accumulation."
        )


def token_ids(
    source: "ModelSource",
    settings: StepSettings,
    needs_text: bool,
    text: TextSource,
    progress: Callable[[str], None],
) -> "Tensor | None":
    """Ids [B, S] of real text where it is needed (the plan decides by them) or the user gave some; None:
    the tracer draws uniform ones. Raises OptionError for more ids than a trace meets."""
    check_traced(settings.batch, settings.seq)
    if not text.files and (text.random_ids or not needs_text):
        return None
    import torch

    from shardwise.models.source import vocab_size_of
    from shardwise.text.batches import Batches

    vocab_size = source.vocab_size or vocab_size_of(source.build(dtype=torch.float32))
    stream = stream_of(text, vocab_size, settings.seed, progress)
    return Batches(stream, settings.batch, settings.seq).at(0).ids_BS


def stream_of(text: TextSource, vocab_size: int, seed: int, progress: Callable[[str], None]) -> "TokenStream":
    """The text as ids in memory, as tokens_of() has it; of written tokens the first ones."""
    from shardwise.text.reading import tokens_of
    from shardwise.text.stream import TokenStream

    tokens = tokens_of(text, vocab_size, seed, progress)
    return tokens if isinstance(tokens, TokenStream) else tokens.first()
