"""What a verb's room offers for its result, and which room a result belongs to: rooms are the packages beside this one that have ROOMS."""

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from shardwise.report.common.table import Report


@dataclass(frozen=True, slots=True)
class Room:
    """result: the noun. name: of its page and tables in a run folder; document: of its JSON file. report: its tables and words; page: all of it."""

    result: type
    name: str
    document: str
    report: Callable[[Any], Report]
    page: Callable[[Any], str]


@cache
def rooms() -> dict[type, Room]:
    """Of every room under report/."""
    import shardwise.report

    found: dict[type, Room] = {}
    for package in pkgutil.iter_modules(shardwise.report.__path__, "shardwise.report."):
        for room in getattr(importlib.import_module(package.name), "ROOMS", ()):
            found[room.result] = room
    return found


def room_of(result: object) -> Room:
    return rooms()[type(result)]
