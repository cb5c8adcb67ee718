"""Shardwise: how to shard a PyTorch model over devices, and the proof."""

import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shardwise.api import Result as Result
    from shardwise.api import calibrate as calibrate
    from shardwise.api import case as case
    from shardwise.api import check_tokens as check_tokens
    from shardwise.api import compare as compare
    from shardwise.api import diff as diff
    from shardwise.api import dims as dims
    from shardwise.api import explain as explain
    from shardwise.api import export as export
    from shardwise.api import look_up as look_up
    from shardwise.api import plan as plan
    from shardwise.api import predict as predict
    from shardwise.api import search as search
    from shardwise.api import sweep as sweep
    from shardwise.api import tokens as tokens
    from shardwise.api import verify as verify
    from shardwise.core.case import Case as Case
    from shardwise.core.plan import Plan as Plan
    from shardwise.measure.profile import record_profile as record_profile
    from shardwise.models.self_sharded import SelfSharded as SelfSharded
    from shardwise.parallel.apply import loss_of as loss_of
    from shardwise.parallel.apply import parallelize as parallelize
    from shardwise.parallel.builtin import builtin_plan as builtin_plan
    from shardwise.watch.sentinel import watch as watch

__version__ = "0.1.0"

_API = (
    "Result",
    "calibrate",
    "case",
    "check_tokens",
    "compare",
    "diff",
    "dims",
    "explain",
    "export",
    "look_up",
    "plan",
    "predict",
    "search",
    "sweep",
    "tokens",
    "train",
    "verify",
)
_LAZY = {
    **dict.fromkeys(_API, "shardwise.api"),
    "Case": "shardwise.core.case",
    "Plan": "shardwise.core.plan",
    "SelfSharded": "shardwise.models.self_sharded",
    "builtin_plan": "shardwise.parallel.builtin",
    "loss_of": "shardwise.parallel.apply",
    "parallelize": "shardwise.parallel.apply",
    "record_profile": "shardwise.measure.profile",
    "watch": "shardwise.watch.sentinel",
}
__all__ = [
    "Case",
    "Plan",
    "Result",
    "SelfSharded",
    "builtin_plan",
    "calibrate",
    "case",
    "check_tokens",
    "compare",
    "diff",
    "dims",
    "explain",
    "export",
    "look_up",
    "loss_of",
    "parallelize",
    "plan",
    "predict",
    "record_profile",
    "search",
    "sweep",
    "tokens",
    "train",
    "verify",
    "watch",
]


def __getattr__(name: str) -> object:
    """Public names load on first use, so that commands that need no torch start at once."""
    if name not in _LAZY:
        raise AttributeError(f"module 'shardwise' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)


class _Package(ModuleType):
    """Some rooms are called as the verbs are: shardwise.explain is the verb, whatever was imported before."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _LAZY and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
