"""What several commands' options share: allowed values, and how a wrong one is told."""

from shardwise.core.errors import OptionError
from shardwise.core.plan import suggest

DTYPES = ("float32", "bfloat16", "float64")
RECOMPUTE = ("none", "full")


def check_choice(option: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raises OptionError for a value that isn't offered."""
    if value not in allowed:
        raise OptionError(f'{option} is "{value}".{suggest(value, allowed)} Allowed: {", ".join(allowed)}.')
