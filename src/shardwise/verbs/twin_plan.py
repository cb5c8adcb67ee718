"""A plan for a model's small twin, where it names sizes of the model itself: pieces of a weight, counts of
pieces.

What a piece is in the twin a made plan of each tells: the same forward, the same parameter, the same piece.
Sizes that the made plan doesn't have stay as they are, and a proof of the twin then says that they don't fit.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from shardwise.core.argument_cut import ArgumentCut
from shardwise.core.errors import ShardwiseError
from shardwise.core.held import Held, count_of, format_pieces
from shardwise.core.mesh import Mesh
from shardwise.core.plan import Plan, Rule, Style

if TYPE_CHECKING:
    from shardwise.models.model_source import ModelSource

Sizes = tuple[tuple[int, ...], tuple[int, ...]]
"""Pieces, and the parts of each."""


def plan_for_twin(plan: Plan, source: "ModelSource", mesh: Mesh) -> Plan | None:
    """The plan with the sizes of the model's small twin; None where it names none, or there is no twin."""
    if not any(list(_sizes(rule.style)) for rule in plan.rules):
        return None
    try:
        twin = source.small(mesh.tp)
        if twin is None:
            return None
        return _translated(plan, source, twin, mesh)
    except ShardwiseError:
        return None


def _translated(plan: Plan, source: "ModelSource", twin: "ModelSource", mesh: Mesh) -> Plan:
    import torch

    from shardwise.planner.make import Wish, make_plan

    of_model, of_twin = (make_plan(each, Wish(mesh)).plan for each in (source, twin))
    names = [name for name, _ in twin.build(dtype=torch.float32).named_modules()]
    rules = []
    for rule in plan.rules:
        known: dict[Sizes, Sizes] = {}
        for name in names:
            made = [each.rule_for(name) for each in (of_model, of_twin)]
            if plan.rule_for(name) is rule and made[0] is not None and made[1] is not None:
                before, after = dict(_sizes(made[0].style)), dict(_sizes(made[1].style))
                known |= {before[key]: after[key] for key in before if key in after}
                # a twin has heads enough: what ranks share in the model itself is cut plainly there
                known |= {sizes: ((), ()) for key, sizes in before.items() if key not in after and sizes[1]}
        rules.append(Rule(rule.pattern, _changed(rule.style, known)))
    return replace(plan, rules=tuple(rules))


def _sizes(style: Style) -> Iterator[tuple[str, Sizes]]:
    """All that a style names, by where."""
    if style.pieces:
        yield "pieces", (style.pieces, style.parts)
    for name, held in style.parameters:
        if held.pieces:
            yield f"parameters {name}", (held.pieces, held.parts)
    for entry in style.divide:
        name, pieces, parts = count_of(entry)
        if pieces:
            yield f"divide {name}", (pieces, parts)
    for name, how in style.cut:
        if how.every:
            yield f"cut {name}", ((how.every,), ())


def _changed(style: Style, known: dict[Sizes, Sizes]) -> Style:
    pieces, parts = known.get((style.pieces, style.parts), (style.pieces, style.parts))
    return replace(
        style,
        pieces=pieces,
        parts=parts,
        parameters=tuple((name, _held(held, known)) for name, held in style.parameters),
        divide=tuple(_count(entry, known) for entry in style.divide),
        cut=tuple((name, _argument(how, known)) for name, how in style.cut),
    )


def _held(held: Held, known: dict[Sizes, Sizes]) -> Held:
    pieces, parts = known.get((held.pieces, held.parts), (held.pieces, held.parts))
    return replace(held, pieces=pieces, parts=parts)


def _argument(how: ArgumentCut, known: dict[Sizes, Sizes]) -> ArgumentCut:
    (every, *_), _ = known.get(((how.every,), ()), ((how.every,), ()))
    return replace(how, every=every)


def _count(entry: str, known: dict[Sizes, Sizes]) -> str:
    name, *sizes = count_of(entry)
    pieces, parts = known.get((sizes[0], sizes[1]), (sizes[0], sizes[1]))
    return f"{name}: {format_pieces(pieces, parts)}" if pieces else entry
