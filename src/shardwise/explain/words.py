"""How explain/ writes sizes and names inside its sentences."""

_MIB, _GIB = 2**20, 2**30
_ALIKE = 0.005


def size(n_bytes: float) -> str:
    """1,234 MiB, 0.125 MiB; from 10 GiB on 12.3 GiB."""
    if n_bytes >= 10 * _GIB:
        return f"{n_bytes / _GIB:,.1f} GiB"
    return f"{n_bytes / _MIB:,.0f} MiB" if n_bytes >= 10 * _MIB else f"{n_bytes / _MIB:,.3g} MiB"


def relation(first: float, second: float) -> str:
    """How much the second is of the first: "1.32 times as much", "68.6 % of that", "about the same" within
    half a percent."""
    ratio = second / first
    if abs(ratio - 1) < _ALIKE:
        return "about the same"
    return f"{ratio:.3g} times as much" if ratio > 1 else f"{100 * ratio:.3g} % of that"
