"""What stands where a trace's array of events ends."""

import json
from typing import Any

import msgspec


def is_end_of_file(tail: bytes) -> bool:
    """Whether this, behind the events' bracket, is the rest of the header, or nothing more."""
    rest = tail.strip().removeprefix(b",")
    try:
        return not rest or isinstance(msgspec.json.decode(b"{" + rest), dict)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError):
        return False


def objects_among_others(end: bytes) -> tuple[bytes, int] | None:
    """(the last entries that are objects, as JSON with commas between; how many others stand between them);
    None where the array is cut off."""
    try:
        found: tuple[list[Any], int] = json.JSONDecoder().raw_decode("[" + end.decode(errors="replace"))
    except (ValueError, RecursionError):
        return None
    objects = [each for each in found[0] if isinstance(each, dict)]
    return msgspec.json.encode(objects)[1:-1], len(found[0]) - len(objects)
