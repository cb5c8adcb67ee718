"""The nearest plan that a format can say, and what of the plan that was asked for it leaves out.

A rule that the format can't say gets another style, where the format names one that does the same work in
another way; else the block around it (its gather_input) is run whole on every rank. Decided by styles and
their arguments alone."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from shardwise.core.export import LeftOut
from shardwise.core.placement import Placement, Replicate, Shard
from shardwise.core.plan import Plan, Rule, Style, StyleName
from shardwise.export.job import Job, refuse
from shardwise.parallel.sharder import Assignment


@dataclass(frozen=True, slots=True)
class Unsaid:
    """why: in a sentence without its end. instead: a style that can be said; None: there is none."""

    why: str
    instead: Style | None = None


CanSay = Callable[[Assignment], Unsaid | None]


def nearest(job: Job, form: str, can_say: CanSay) -> tuple[Job, tuple[LeftOut, ...]]:
    """The job under the nearest plan of which can_say() says nothing, and what it leaves out. Raises
    PlanError where nothing is near."""
    left_out: list[LeftOut] = []
    while job.plan is not None:
        found = next(
            ((each, unsaid) for each in job.assignments if (unsaid := can_say(each)) is not None), None
        )
        if found is None:
            break
        assignment, unsaid = found
        plan, said = _changed(job, form, assignment, unsaid)
        left_out.append(said)
        job = job.under(plan)
    return job, tuple(left_out)


def _changed(job: Job, form: str, assignment: Assignment, unsaid: Unsaid) -> tuple[Plan, LeftOut]:
    plan, rule = job.plan, assignment.rule
    assert plan is not None
    asked = str(rule) if not rule.style.arguments else f"{rule} ({rule.style.arguments})"
    if unsaid.instead is not None and unsaid.instead != rule.style:
        rules = tuple(replace(each, style=unsaid.instead) if each == rule else each for each in plan.rules)
        return replace(plan, rules=rules), LeftOut(asked, str(unsaid.instead), f"{unsaid.why}.")
    block = _block_around(job, assignment)
    if block is None:
        raise refuse(job, form, asked, unsaid.why)
    whole = Style(StyleName.WHOLE, input=_input(block), output=_input(block))
    pattern = block.rule.pattern
    rules = tuple(
        replace(each, style=whole) if each.pattern == pattern else each
        for each in plan.rules
        if not each.pattern.startswith(f"{pattern}.")
    )
    return replace(plan, rules=rules), LeftOut(asked, f"{pattern} whole on every rank", f"{unsaid.why}.")


def _block_around(job: Job, assignment: Assignment) -> Assignment | None:
    """The nearest module around it, or it itself, that makes its input whole for what it holds."""
    by_name = {each.name: each for each in job.assignments}
    parts = assignment.name.split(".")
    for depth in range(len(parts), 0, -1):
        around = by_name.get(".".join(parts[:depth]))
        if around is not None and around.style.name is StyleName.GATHER_INPUT:
            return around
    return None


def _input(assignment: Assignment) -> Placement:
    return assignment.sharder.input_of(assignment.style)


def without_sequence(plan: Plan) -> tuple[Plan, bool]:
    """The same plan with activations whole between blocks, for a format that can't cut them along the
    sequence; and whether that is another plan. Rules that only cut or gather the sequence go."""
    rules = tuple(new for rule in plan.rules if (new := _whole_between(rule)) is not None)
    changed = replace(plan, rules=rules)
    return changed, changed != plan


def _whole_between(rule: Rule) -> Rule | None:
    style = rule.style
    match style.name:
        case StyleName.SEQUENCE_PARALLEL:
            return replace(rule, style=Style(StyleName.REPLICATE))
        case StyleName.SPLIT_INPUT if not style.parameters and not style.divide:
            return None
        case StyleName.ROUTED | StyleName.REPLICATED | StyleName.COLWISE | StyleName.ROWWISE:
            return replace(rule, style=_table_or_layer(style))
    return replace(rule, style=replace(style, input=_no_cut(style.input), output=_no_cut(style.output)))


def _table_or_layer(style: Style) -> Style:
    """A table's default output is cut along the sequence; a layer's is not."""
    if style.name is StyleName.ROUTED:
        return Style(StyleName.ROWWISE, output=Replicate())
    return replace(style, input=_no_cut(style.input), output=_no_cut(style.output))


def _no_cut(placement: Placement | None) -> Placement | None:
    return Replicate() if placement == Shard(1) else placement
