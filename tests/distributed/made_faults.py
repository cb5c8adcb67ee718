"""Faults that are planted in made plans, each by a rule that holds for any plan."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from shardwise.core.held import Held
from shardwise.core.placement import Partial, Replicate, Shard
from shardwise.core.plan import Plan, Rule
from shardwise.core.style import Style, StyleName

WHOLE = Held(Replicate())
SUMMED = Held(Replicate(), gradient=Partial())


@dataclass(frozen=True, slots=True)
class Fault:
    """plan: with one rule changed; pattern: that rule's."""

    what: str
    plan: Plan
    pattern: str

    def is_told_by(self, subject: str, *, is_crash: bool = False) -> bool:
        """Whether a finding's subject is a module that the changed rule is about, or below it; of a crash the
        one around it, too, which takes apart what it gives."""
        names, around = subject.split("."), self.pattern.rpartition(".")[0]
        if is_crash and around and Rule(around, Style(StyleName.REPLICATE)).matches(subject):
            return True
        rule = Rule(self.pattern, Style(StyleName.REPLICATE))
        return any(rule.matches(".".join(names[:n])) for n in range(len(names) + 1))


def faults(plan: Plan) -> Iterator[Fault]:
    """One of each kind that the plan has a place for, those of the rarest ingredients first."""
    for what, change in KINDS.items():
        for at, rule in reversed(list(enumerate(plan.rules))):  # a table comes first, and is cut by itself
            style = change(rule.style)
            if style is not None:
                rules = (*plan.rules[:at], Rule(rule.pattern, style), *plan.rules[at + 1 :])
                yield Fault(what, replace(plan, name=f"{plan.name}, {what}", rules=rules), rule.pattern)
                break


def _held(style: Style, change: Callable[[Held], Held | None]) -> Style | None:
    """The style with the first parameter changed that `change` takes."""
    for at, (name, held) in enumerate(style.parameters):
        changed = change(held)
        if changed is not None:
            others = (*style.parameters[:at], (name, changed), *style.parameters[at + 1 :])
            return replace(style, parameters=others)
    return None


def _as_one(style: Style) -> Style | None:
    if style.pieces and not style.parts:
        return replace(style, pieces=())
    return _held(style, lambda held: Held(held.placement) if held.pieces and not held.parts else None)


def _swapped(style: Style) -> Style | None:
    if len(set(style.pieces)) > 1 and not style.parts:
        return replace(style, pieces=style.pieces[::-1])
    return None


def _shared_cut(style: Style) -> Style | None:
    if style.parts:
        return replace(style, parts=())
    return _held(style, lambda held: replace(held, parts=()) if held.parts else None)


def _not_summed(style: Style) -> Style | None:
    if style.gradient is not None:
        return replace(style, gradient=None)
    if style.name in (StyleName.COLWISE, StyleName.ROWWISE):
        return None
    return _held(style, lambda held: WHOLE if held == SUMMED else None)


def _added_by_all(style: Style) -> Style | None:
    if style.name is not StyleName.ROWWISE and style.output is None:
        return None
    return _held(style, lambda held: SUMMED if held == WHOLE else None)


def _statistics_of_a_part(style: Style) -> Style | None:
    is_over_a_cut = style.name is StyleName.WHOLE and style.input == Shard(-1)
    return replace(style, output=Replicate()) if is_over_a_cut else None


def _seen_as_whole(style: Style) -> Style | None:
    return Style(StyleName.REPLICATE) if style.name is StyleName.SEQUENCE_PARALLEL else None


def _half(style: Style) -> Style | None:
    is_sum = style.name is StyleName.ROWWISE and style.output is not None and not style.parameters
    return Style(StyleName.REPLICATE) if is_sum else None


def _whole_in_a_part(style: Style) -> Style | None:
    is_inside = style.name is StyleName.WHOLE and style.input is None
    return Style(StyleName.SEQUENCE_PARALLEL) if is_inside else None


KINDS: dict[str, Callable[[Style], Style | None]] = {
    "not summed": _not_summed,
    "what all share cut": _shared_cut,
    "pieces swapped": _swapped,
    "pieces cut as one": _as_one,
    "added by all": _added_by_all,
    "a norm's output left whole": _statistics_of_a_part,
    "not gathered": _whole_in_a_part,
    "seen as whole": _seen_as_whole,
    "half of a pair": _half,
}
