"""How explain/ writes sizes and names inside its sentences."""

from shardwise.core.collective import CollectiveKind

_MIB = 2**20


def mib(n_bytes: float) -> str:
    """12,345 MiB; three digits where it is small."""
    return f"{n_bytes / _MIB:,.0f} MiB" if n_bytes >= 10 * _MIB else f"{n_bytes / _MIB:,.3g} MiB"


def named(kind: CollectiveKind) -> str:
    """all-gather, as people write it."""
    return str(kind).replace("_", "-")
