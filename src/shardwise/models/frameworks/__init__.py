"""Frameworks whose models shard themselves, a file each: the modules beside this one, found by listing them.

Each has FRAMEWORK, a Framework (framework.py), and imports what it is about only when a model is asked for.
"""

import importlib
import pkgutil
from functools import cache

from shardwise.models.frameworks.framework import Framework
from shardwise.models.self_sharded import ShardsItself

_NOUNS = "framework"


@cache
def frameworks() -> tuple[Framework, ...]:
    """All that there are."""
    names = (module.name for module in pkgutil.iter_modules(__path__) if module.name != _NOUNS)
    return tuple(importlib.import_module(f"{__name__}.{name}").FRAMEWORK for name in names)


def find_in_framework(text: str) -> ShardsItself | None:
    """The model of `PREFIX:...`; None for any other name. Raises ModelError where the framework isn't
    installed, or knows no such model."""
    prefix, _, asked = text.partition(":")
    framework = next((each for each in frameworks() if each.prefix == prefix), None)
    return framework.model(asked) if framework is not None else None
