"""Text from a user's files without power over whoever shows it."""

import unicodedata

from shardwise.core.case import FUSED, StepSettings
from shardwise.core.shown import shown

NAME_CHARACTERS = 96
SENTENCE_CHARACTERS = 700

_INVISIBLE = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})


def plain(text: str) -> str:
    """`text` with control, format and surrogate characters as visible escapes, on one line."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        character.encode("unicode_escape").decode("ascii")
        if unicodedata.category(character) in _INVISIBLE
        else character
        for character in text
    )


def name(text: str, empty: str = "(model)") -> str:
    """A module's, parameter's or plan's name on one line; long ones cut, and the root's empty one in
    words."""
    return shown(text, NAME_CHARACTERS) or empty


def sentence(text: str) -> str:
    """A reason, advice or note: as it is, but for control characters and for what nobody would read to its
    end."""
    return shown(text, SENTENCE_CHARACTERS)


def step_text(settings: StepSettings, *more: str) -> str:
    """`batch 4 x sequence 2,048 = 8,192 tokens a step · float32`, and what else there is to say."""
    tokens = f"batch {settings.batch:,} x sequence {settings.seq:,} = {settings.tokens:,} tokens a step"
    return " · ".join((tokens, name(settings.precision, "(dtype)"), *more))


def recompute_text(settings: StepSettings) -> str:
    """`full`, or `full (20 layers)`."""
    of = "" if settings.recompute_layers is None else f" ({settings.recompute_layers:,} layers)"
    return name(settings.recompute) + of


def repeats(settings: StepSettings) -> list[str]:
    """Micro-batches, recompute, and what FSDP and AdamW do in another way than by default, where there are
    any."""
    said = {
        f"{settings.accumulation} micro-batches": settings.accumulation > 1,
        "gradients reduced once": settings.reduce_once,
        "parameters kept after the forward": not settings.reshard_after_forward,
        f"recompute {recompute_text(settings)}": settings.recompute != "none",
        f"AdamW {name(settings.optimizer_kernel)}": settings.optimizer_kernel != FUSED,
    }
    return [text for text, holds in said.items() if holds]
