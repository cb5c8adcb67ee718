"""What a verb's room offers for its result, and which room a result belongs to: rooms are the packages beside
this one that have ROOMS."""

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from shardwise.report.common.table import Report


@dataclass(frozen=True, slots=True)
class Room:
    """result: the noun. name: of its page and its Markdown in a run folder; document: of its JSON file.

    report_of, page_of: `module:function` of the result, imported when they are asked for.
    """

    result: type
    name: str
    document: str
    report_of: str
    page_of: str

    def report(self, result: object) -> Report:
        """Its tables and words."""
        made = _function(self.report_of)(result)
        assert isinstance(made, Report)
        return made

    def page(self, result: object, **more: object) -> str:
        """The HTML page. more: what only the page needs."""
        return str(_function(self.page_of)(result, **more))


@cache
def _rooms() -> dict[type, Room]:
    import shardwise.report

    rooms: dict[type, Room] = {}
    for package in pkgutil.iter_modules(shardwise.report.__path__, "shardwise.report."):
        for room in getattr(importlib.import_module(package.name), "ROOMS", ()):
            rooms[room.result] = room
    return rooms


def room_of(result: object) -> Room:
    return _rooms()[type(result)]


def _function(name: str) -> Callable[..., Any]:
    module, _, function = name.partition(":")
    called: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return called
