"""Shardwise: how to shard a PyTorch model over devices, and the proof."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shardwise.core.plan import Plan as Plan
    from shardwise.measure.profile import record_profile as record_profile
    from shardwise.parallel.apply import loss_of as loss_of
    from shardwise.parallel.apply import parallelize as parallelize
    from shardwise.parallel.builtin import builtin_plan as builtin_plan

__version__ = "0.1.0"

_LAZY = {
    "Plan": "shardwise.core.plan",
    "builtin_plan": "shardwise.parallel.builtin",
    "loss_of": "shardwise.parallel.apply",
    "parallelize": "shardwise.parallel.apply",
    "record_profile": "shardwise.measure.profile",
}
__all__ = ["Plan", "builtin_plan", "loss_of", "parallelize", "record_profile"]


def __getattr__(name: str) -> object:
    """Public names load on first use, so that commands that need no torch start at once."""
    if name not in _LAZY:
        raise AttributeError(f"module 'shardwise' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)
