"""How PyTorch's caching allocator is set up: what PYTORCH_ALLOC_CONF says. Standard library only."""

from dataclasses import dataclass

from shardwise.core.errors import OptionError
from shardwise.core.shown import shown

MIB = 2**20
_ADVICE = (
    "Use what PYTORCH_ALLOC_CONF takes, such as expandable_segments:True; simulated are expandable_segments "
    "(True or False), max_split_size_mb (21 or more) and roundup_power2_divisions (a power of two)."
)


@dataclass(frozen=True, slots=True)
class AllocatorSettings:
    """expandable_segments: a stream's memory is one segment that grows by pages, rather than segments of the
    sizes that were asked for. max_split_bytes: larger blocks are never split; None: any is.
    roundup_divisions: requests are rounded up to one of so many sizes between powers of two; 1: to 512 bytes
    alone."""

    expandable_segments: bool = False
    max_split_bytes: int | None = None
    roundup_divisions: int = 1

    def __str__(self) -> str:
        said = ["expandable_segments:True"] if self.expandable_segments else []
        if self.max_split_bytes is not None:
            said.append(f"max_split_size_mb:{self.max_split_bytes // MIB}")
        if self.roundup_divisions > 1:
            said.append(f"roundup_power2_divisions:{self.roundup_divisions}")
        return ",".join(said)


PYTORCHS = AllocatorSettings()
"""PyTorch's defaults."""


def allocator_settings(said: str) -> AllocatorSettings:
    """`expandable_segments:True,max_split_size_mb:512`; empty: the defaults. Raises OptionError."""
    found: dict[str, str] = {}
    for part in filter(None, (each.strip() for each in said.split(","))):
        key, _, value = part.partition(":")
        found[key.strip()] = value.strip()
    expandable, split = found.pop("expandable_segments", "False"), found.pop("max_split_size_mb", None)
    divisions = found.pop("roundup_power2_divisions", "1")
    size = int(split) if split is not None and split.isdecimal() and len(split) < 10 else None
    count = int(divisions) if divisions.isdecimal() and len(divisions) < 4 else 0
    wrong = (
        found
        or expandable not in ("True", "False")
        or (split is not None and (size is None or size < 21))
        or count < 1
        or count & (count - 1)
    )
    if wrong:
        raise OptionError(f'--allocator is "{shown(said)}". {_ADVICE}')
    return AllocatorSettings(expandable == "True", size * MIB if size is not None else None, count)
