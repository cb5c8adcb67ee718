"""The token ids that a traced step meets: what explain and predict share."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from shardwise.core.case import StepSettings

if TYPE_CHECKING:
    from torch import Tensor

    from shardwise.models.source import ModelSource


def token_ids(
    source: "ModelSource",
    settings: StepSettings,
    needs_text: bool,
    progress: Callable[[str], None],
    *,
    files: Sequence[Path] = (),
    tokenizer: Path | None = None,
    random_ids: bool = False,
) -> "Tensor | None":
    """Ids [B, S] of real text where it is needed (the plan decides by them) or the user gave some; None: the tracer
    draws uniform ones."""
    if not files and (random_ids or not needs_text):
        return None
    import torch

    from shardwise.models.source import vocab_size_of
    from shardwise.text.batches import Batches
    from shardwise.text.stream import load_tokens

    stream = load_tokens(
        vocab_size=source.vocab_size or vocab_size_of(source.build(dtype=torch.float32)),
        files=files,
        tokenizer=tokenizer,
        random_ids=random_ids,
        seed=settings.seed,
        progress=progress,
    )
    return Batches(stream, settings.batch, settings.seq).at(0).ids_BS
