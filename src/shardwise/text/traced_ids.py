"""The token ids that a traced step meets: what explain and predict share."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from shardwise.core.case import StepSettings, TextSource

if TYPE_CHECKING:
    from torch import Tensor

    from shardwise.models.source import ModelSource
    from shardwise.text.stream import TokenStream


def token_ids(
    source: "ModelSource",
    settings: StepSettings,
    needs_text: bool,
    text: TextSource,
    progress: Callable[[str], None],
) -> "Tensor | None":
    """Ids [B, S] of real text where it is needed (the plan decides by them) or the user gave some; None:
    the tracer draws uniform ones."""
    if not text.files and (text.random_ids or not needs_text):
        return None
    import torch

    from shardwise.models.source import vocab_size_of
    from shardwise.text.batches import Batches

    vocab_size = source.vocab_size or vocab_size_of(source.build(dtype=torch.float32))
    stream = stream_of(text, vocab_size, settings.seed, progress)
    return Batches(stream, settings.batch, settings.seq).at(0).ids_BS


def why_no_text(text: TextSource, vocab_size: int) -> str | None:
    """Why ids are random though nobody asked for that; None where they aren't. For text files that the user
    names there is no way out: load_tokens() says what it needs."""
    from shardwise.text.tokenizer import BYTE_ALPHABET

    if text.random_ids or text.files or text.tokenizer is not None or vocab_size >= BYTE_ALPHABET:
        return None
    has = f"and the model has {vocab_size}"
    return f"Token ids are random: a tokenizer of bytes needs {BYTE_ALPHABET} ids, {has}."


def stream_of(text: TextSource, vocab_size: int, seed: int, progress: Callable[[str], None]) -> "TokenStream":
    """The text as ids below vocab_size; random ones where why_no_text() has a reason. Raises TextError and
    OptionError."""
    from shardwise.text.stream import load_tokens

    if (why := why_no_text(text, vocab_size)) is not None:
        progress(why)
        text = TextSource(random_ids=True)
    return load_tokens(
        vocab_size=vocab_size,
        files=[Path(name) for name in text.files],
        tokenizer=None if text.tokenizer is None else Path(text.tokenizer),
        text_key=text.text_key,
        end_token=text.end_token,
        random_ids=text.random_ids,
        seed=seed,
        progress=progress,
    )
