"""Starts and watches ranks on this machine, or joins torchrun's. Knows nothing of what they do."""

from shardwise.launch.context import RankContext
from shardwise.launch.ranks import Interrupted, run_ranks
from shardwise.launch.torchrun import from_main, is_main, is_restart, joined
from shardwise.launch.warm import warm_ranks

__all__ = [
    "Interrupted",
    "RankContext",
    "from_main",
    "is_main",
    "is_restart",
    "joined",
    "run_ranks",
    "warm_ranks",
]
