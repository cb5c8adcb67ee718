"""One phase of a step as a row of modules with the collectives between them: before the layers, in each
layer, after the layers.

The collectives stand in the order of the step. Between them stand the modules that have parameters, in the
order in which the model lists them: an Explanation doesn't say when a module runs, so a module that the model
lists after the last that communicates is left out, and where that order contradicts the collectives', no
modules are drawn but those that the collectives name.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from shardwise.core.collective import CollectiveKind
from shardwise.core.explanation import CollectiveGroup, Explanation
from shardwise.core.placement import Shard
from shardwise.core.program import Phase
from shardwise.report.explain.rows import LAYER_PHASES


@dataclass(frozen=True, slots=True)
class Stop:
    """A module at work (group is None), or a collective that `module` caused."""

    module: str
    label: str
    group: CollectiveGroup | None = None


@dataclass(frozen=True, slots=True)
class Band:
    """One phase, in the order of the step: the backward begins with what comes after the layers. layers: how
    many there are, or None."""

    phase: Phase
    first: tuple[Stop, ...]
    layer: tuple[Stop, ...]
    last: tuple[Stop, ...]
    layers: int | None


def bands(explanation: Explanation) -> tuple[Band, ...]:
    """A band for each of forward, backward and recompute that has collectives."""
    by_phase = (
        (phase, [group for group in explanation.collectives if group.phase == phase])
        for phase in LAYER_PHASES
    )
    return tuple(_band(explanation, phase, groups) for phase, groups in by_phase if groups)


def largest_wire_bytes(drawn: Sequence[Band]) -> float:
    """The most that one collective of these bands sends."""
    stops = (stop for band in drawn for stop in (*band.first, *band.layer, *band.last))
    return max((stop.group.wire_bytes for stop in stops if stop.group is not None), default=0.0)


def _band(explanation: Explanation, phase: Phase, groups: list[CollectiveGroup]) -> Band:
    heads, children, tails = _modules(explanation)
    if phase is Phase.BACKWARD:
        heads, children, tails = tails[::-1], children[::-1], heads[::-1]
    prefix = None if explanation.layers is None else f"{explanation.layers[0]}.*"
    in_layer = [index for index, group in enumerate(groups) if prefix and _is_in(group.module, prefix)]
    if not in_layer or explanation.layers is None:
        return Band(phase, _stops((*heads, *tails), groups, phase, ""), (), (), None)
    start = in_layer[0]
    inside = [groups[index] for index in in_layer]
    # a collective of another module between two of a layer's, such as one on a shared embedding, is drawn
    # after them
    after = [group for index, group in enumerate(groups) if index >= start and index not in set(in_layer)]
    return Band(
        phase,
        _stops(heads, groups[:start], phase, ""),
        _stops(children, inside, phase, f"{prefix}."),
        _stops(tails, after, phase, ""),
        explanation.layers[1],
    )


def _modules(explanation: Explanation) -> tuple[list[str], list[str], list[str]]:
    """Modules with parameters, as the model lists them: before the layers, a layer's own children, after the
    layers."""
    prefix = None if explanation.layers is None else f"{explanation.layers[0]}.*"
    heads: list[str] = []
    children: list[str] = []
    tails: list[str] = []
    for holding in explanation.holdings:
        module = holding.name.rpartition(".")[0]
        if prefix and _is_in(module, prefix):
            child = module[len(prefix) + 1 :].partition(".")[0]
            if child:
                children.append(f"{prefix}.{child}")
        elif module:
            (tails if children else heads).append(module)
    used = [group.module for group in explanation.collectives if group.phase in LAYER_PHASES]
    return _up_to_last_used(heads, used), _up_to_last_used(children, used), _up_to_last_used(tails, used)


def _up_to_last_used(modules: list[str], used: list[str]) -> list[str]:
    distinct = list(dict.fromkeys(modules))
    last = max(
        (index for index, module in enumerate(distinct) if any(_is_in(one, module) for one in used)),
        default=-1,
    )
    return distinct[: last + 1]


def _stops(
    modules: Sequence[str], groups: Sequence[CollectiveGroup], phase: Phase, prefix: str
) -> tuple[Stop, ...]:
    owners = [next((module for module in modules if _is_in(group.module, module)), None) for group in groups]
    placed: list[CollectiveGroup] = []
    stops: list[Stop] = []

    def add(group: CollectiveGroup) -> None:
        placed.append(group)
        stops.append(Stop(group.module, group.module.removeprefix(prefix), group))

    owned = [index for index, owner in enumerate(owners) if owner is not None]
    for group in groups[: owned[0]] if owned else ():
        add(group)
    for module in modules:
        mine = [group for group, owner in zip(groups, owners, strict=True) if owner == module]
        for group in mine:
            if _is_before(group, phase):
                add(group)
        stops.append(Stop(module, module.removeprefix(prefix)))
        for group in mine:
            if not _is_before(group, phase):
                add(group)
    for index, group in enumerate(groups):
        if owners[index] is None and (not owned or index > owned[0]):
            add(group)
    if placed == list(groups):
        return tuple(stops)
    return tuple(Stop(group.module, group.module.removeprefix(prefix), group) for group in groups)


def _is_before(group: CollectiveGroup, phase: Phase) -> bool:
    """Whether a module has to wait for it: for its whole input, or in backward for the gradient of its
    output."""
    if group.carries_out is CollectiveKind.ALL_TO_ALL:
        return phase is Phase.BACKWARD
    # a dim behind batch and sequence is one of features: what the module itself made, not what it takes in
    gathers_features = isinstance(group.before, Shard) and group.before.dim not in (0, 1)
    return group.carries_out is CollectiveKind.ALL_GATHER and not gathers_features


def _is_in(module: str, around: str) -> bool:
    return module == around or module.startswith(f"{around}.")
