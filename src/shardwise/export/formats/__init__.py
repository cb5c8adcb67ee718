"""The formats that a plan is exported in, one file each: the modules beside this one, found by listing them.

A format has ABOUT (what its files are, in a line) and `write(job) -> Written`; it raises PlanError or
OptionError for what it can neither say nor come near to. See export/job.py.
"""

import importlib
import pkgutil
from typing import TYPE_CHECKING

from shardwise.core.errors import OptionError
from shardwise.core.plan import suggest
from shardwise.core.shown import shown

if TYPE_CHECKING:
    from shardwise.export.job import Format


def formats() -> tuple[str, ...]:
    """Their names."""
    return tuple(module.name for module in pkgutil.iter_modules(__path__))


def format_named(name: str) -> "Format":
    """Raises OptionError for one that there isn't."""
    if name not in formats():
        raise OptionError(
            f'--as is "{shown(name)}".{suggest(name[:80], formats())} Allowed: {", ".join(formats())}.'
        )
    made: Format = importlib.import_module(f"{__name__}.{name}")
    return made
