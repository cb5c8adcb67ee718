"""The formats that a result is written in, one file each: the modules beside this one, found by listing them.

A format has `files(room, result, **page)`: the texts that it makes, by file name; `page` is what only a page
needs. On a terminal they are written one after another; a format that draws for a console has `show(room,
result, console)`.
"""

import importlib
import pkgutil
from types import ModuleType


def formats() -> tuple[str, ...]:
    """Their names."""
    return tuple(module.name for module in pkgutil.iter_modules(__path__))


def format_named(name: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{name}")
