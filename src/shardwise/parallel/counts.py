"""Integer attributes that count what is cut (`num_heads`): each module that reads one gets its value for the
local part.

A dotted name goes through modules as they are, and through anything else (a configuration that many modules
share) on a shallow copy that this module alone then has. `sizes[1]` is an entry of a list or a tuple.
"""

import copy
import re
from typing import Any

from torch import nn

from shardwise.core.errors import PlanError
from shardwise.core.held import count_of, size_on_a_rank, why_not_shared
from shardwise.core.plan import suggest
from shardwise.parallel.sharder import Assignment, divisors


def check_counts(assignment: Assignment, tp: int) -> None:
    """Raises PlanError for a name that isn't there, isn't a count, can't be set or doesn't divide by tp."""
    for entry in assignment.style.divide:
        name, pieces, parts = count_of(entry)
        where = f"rule {assignment.rule}: divide names {name} of {assignment.shown}"
        owner: Any = assignment.module
        *path, last = name.split(".")
        for step in path:
            _refuse_unknown(owner, step, where)
            owner = getattr(owner, step)
        attribute, place = _entry_of(last)
        _refuse_unknown(owner, attribute, where)
        held = getattr(owner, attribute)
        if place is not None and not (isinstance(held, list | tuple) and place < len(held)):
            raise PlanError(f"{where}, and {attribute} is {held!r:.40}. Name an entry of a list or a tuple.")
        count = held if place is None else held[place]
        if not _is_count(count):
            raise PlanError(f"{where}, which is {count!r:.40}. Name an integer that counts what is cut.")
        if pieces and sum(pieces) != count:
            raise PlanError(f"{where}, which is {count}, and its pieces are {sum(pieces)} together.")
        why_not = why_not_shared(pieces, parts, tp)
        if why_not is not None:
            raise PlanError(f"{where}, and {why_not}. Use a tp size that fits.")
        if not pieces and count % tp:
            raise PlanError(f"{where}, {count} over tp={tp}. Use tp in {divisors(count)}.")
        try:
            set_count(owner if isinstance(owner, nn.Module) else copy.copy(owner), attribute, held)
        except Exception as error:
            raise PlanError(f"{where}, which can't be set: {str(error).splitlines()[0]:.80}") from None


def _refuse_unknown(owner: Any, step: str, where: str) -> None:
    if not hasattr(owner, step):
        known = [key for key, value in _attributes(owner).items() if _is_count(value)]
        raise PlanError(
            f"{where}, and {type(owner).__name__} has no {step}.{suggest(step, known)} Its counts: "
            f"{', '.join(sorted(known)) or 'none'}."
        )


def _entry_of(step: str) -> tuple[str, int | None]:
    """`sizes[1]` -> the attribute and the entry's place in it; None where there is none."""
    told = re.fullmatch(r"([^\[\]]+)\[(\d{1,9})\]", step)
    return (told[1], int(told[2])) if told else (step, None)


def divide_counts(assignment: Assignment, tp: int) -> None:
    """Sets them, after check_counts()."""
    copies: dict[tuple[int, str], Any] = {}
    for entry in assignment.style.divide:
        owner: Any = assignment.module
        name, pieces, parts = count_of(entry)
        *path, last = name.split(".")
        for step in path:
            inner = getattr(owner, step)
            if not isinstance(inner, nn.Module):
                key = (id(owner), step)
                if key not in copies:
                    copies[key] = copy.copy(inner)
                    set_count(owner, step, copies[key])
                inner = copies[key]
            owner = inner
        attribute, place = _entry_of(last)
        held = getattr(owner, attribute)
        count = held if place is None else held[place]
        local = size_on_a_rank(pieces, parts, tp) if pieces else count // tp
        if place is not None:
            local = type(held)((*held[:place], local, *held[place + 1 :]))
        set_count(owner, attribute, local)


def set_count(owner: Any, name: str, value: Any) -> None:
    """Sets an attribute, of a frozen dataclass too."""
    try:
        setattr(owner, name, value)
    except AttributeError:
        if not hasattr(owner, "__dataclass_fields__"):
            raise
        object.__setattr__(owner, name, value)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _attributes(owner: object) -> dict[str, object]:
    fields = getattr(owner, "__dataclass_fields__", ())
    return {**getattr(owner, "__dict__", {}), **{name: getattr(owner, name, None) for name in fields}}
