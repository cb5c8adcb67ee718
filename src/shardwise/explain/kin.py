"""Findings about collectives that are about one tensor, as the trace has seen it: modules that each gather
what one gather would do for, sums that are made one by one and then added, and what is made whole for
nothing.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from shardwise.core.collective import CollectiveKind, collective_name
from shardwise.core.finding import Finding, FindingKind
from shardwise.core.layer_name import any_layer
from shardwise.core.mesh import TENSOR_AXIS
from shardwise.core.placement import Partial, Replicate, Shard
from shardwise.core.plan import ROOT
from shardwise.core.program import REPLICATED_PARAMETERS, Collective, Item, Op, OpKind, Phase, Program
from shardwise.explain.reasons import carries_out
from shardwise.explain.words import size

# ops that work on each place by itself, or over dims that their shapes tell
_PLAIN = frozenset({OpKind.ELEMENTWISE, OpKind.REDUCTION})


def kin(program: Program, items: Sequence[Item]) -> Iterator[Finding]:
    """All of the module docstring, in its order."""
    gathered, summed = _families(items, _again), _families(items, _added)
    mirrored = {family.modules for family in summed if family.phase is Phase.BACKWARD}
    yield from _gathered_again(program, gathered, mirrored)
    known = {frozenset(family.modules) for family in gathered}
    for phase in (Phase.FORWARD, Phase.BACKWARD):
        apart = [each for each in summed if each.phase is phase and frozenset(each.modules) not in known]
        in_order = apart[::-1] if phase is Phase.BACKWARD else apart
        yield from _summed_apart(program, Counter({family: summed[family] for family in in_order}))
    yield from _made_whole_for_nothing(items)


@dataclass(frozen=True, slots=True)
class _Family:
    """Collectives of one tensor: their modules in order of the model's calls, and what each sends."""

    modules: tuple[str, ...]
    count: int
    kind: CollectiveKind
    phase: Phase
    wire_bytes: float

    @property
    def parent(self) -> str:
        """The innermost module around all of them."""
        first, *others = (module.split(".")[:-1] for module in self.modules)
        for other in others:
            same = (index for index, (a, b) in enumerate(zip(first, other, strict=False)) if a != b)
            first = first[: next(same, min(len(first), len(other)))]
        return ".".join(first)

    def __str__(self) -> str:
        around = f"{self.parent}." if self.parent else ""
        names = ", ".join(module.removeprefix(around) for module in self.modules)
        return f"{names} in {self.parent or 'the model'}"


def _again(collective: Collective) -> int | None:
    is_gather = carries_out(collective) is CollectiveKind.ALL_GATHER and collective.after == Replicate()
    return collective.again if is_gather and collective.phase is Phase.FORWARD else None


def _added(collective: Collective) -> int | None:
    is_of_input = collective.before == Partial() and collective.module != REPLICATED_PARAMETERS
    return collective.added_to if is_of_input else None


def _families(items: Sequence[Item], link: Callable[[Collective], int | None]) -> Counter[_Family]:
    """Collectives over tensors' axis that are linked to an earlier one like them."""
    collectives = [item for item in items if isinstance(item, Collective)]
    family_of: dict[int, list[int]] = {}
    for place, collective in enumerate(collectives):
        back = link(collective)
        first = place - back if back is not None else -1
        if first >= 0 and _are_alike(collective, collectives[first]):
            family = family_of.setdefault(first, [first])
            family.append(place)
            family_of[place] = family
    families = {id(family): [collectives[place] for place in family] for family in family_of.values()}
    return Counter(map(_family, families.values()))


def _are_alike(one: Collective, other: Collective) -> bool:
    def of(each: Collective) -> object:
        return each.call.kind, each.call.axis, each.call.payload_bytes, each.phase, each.before, each.after

    return one.call.axis == TENSOR_AXIS and of(one) == of(other)


def _family(members: list[Collective]) -> _Family:
    names = [any_layer(member.module) for member in members]
    ordered = names if members[0].phase is not Phase.BACKWARD else names[::-1]
    first = members[0]
    modules = tuple(dict.fromkeys(ordered))
    return _Family(modules, len(members), carries_out(first), first.phase, first.call.wire_bytes)


def _gathered_again(
    program: Program, families: Counter[_Family], mirrored: set[tuple[str, ...]]
) -> Iterator[Finding]:
    if not families:
        return
    back = (
        ", and as much again in the backward, where each sums its own part of the gradient"
        if any(family.modules in mirrored for family in families)
        else ""
    )
    yield Finding(
        FindingKind.COLLECTIVES_REPEAT,
        ", ".join(_parents(families)),
        f"each gathers the same input for itself ({'; '.join(map(str, families))}): "
        f"{_against(program, families)} in the forward, {_extra(families)} more on the wire per rank and "
        f"step{back}",
        advice=f"Gather once for all: {_at_the_entrance(program, families)}.",
    )


def _summed_apart(program: Program, families: Counter[_Family]) -> Iterator[Finding]:
    if not families:
        return
    phase = next(iter(families)).phase
    is_backward = phase is Phase.BACKWARD
    what = "each sums the gradient of the same input by itself" if is_backward else "each sums what it gives"
    yield Finding(
        FindingKind.SUMMED_APART,
        ", ".join(_parents(families)),
        f"{what} ({'; '.join(map(str, families))}), and the sums are added: {_against(program, families)} in "
        f"the {phase}, {_extra(families)} more on the wire per rank and step",
        advice=f"Sum once for all: {_at_the_entrance(program, families)}."
        if is_backward
        else "Add what each rank has first, and sum that once over the ranks.",
    )


def _parents(families: Counter[_Family]) -> list[str]:
    return list(dict.fromkeys(family.parent or ROOT for family in families))


def _against(program: Program, families: Counter[_Family]) -> str:
    """ "5 all-gathers per layer against 2", in all where that isn't even."""
    layers = program.layers[1] if program.layers is not None else 1
    made = sum(family.count * times for family, times in families.items())
    enough = sum(families.values())
    kinds = " and ".join(dict.fromkeys(f"{collective_name(family.kind)}s" for family in families))
    if layers > 1 and made % layers == enough % layers == 0:
        return f"{made // layers} {kinds} per layer against {enough // layers}"
    return f"{made} {kinds} against {enough}"


def _extra(families: Counter[_Family]) -> str:
    return size(sum((family.count - 1) * family.wire_bytes * times for family, times in families.items()))


def _at_the_entrance(program: Program, families: Counter[_Family]) -> str:
    """How the module around them exchanges once, by who carries the plan out."""
    parents = _parents(families)
    if program.engine == "transformers":
        return (
            "transformers' plans have no style for that; a plan that `shardwise plan` makes of this model "
            "has gather_input"
        )
    if not program.rules:
        around = " and ".join("the model" if parent == ROOT else parent for parent in parents)
        return (
            f"PrepareModuleInput around {around} with desired_input_layouts=Replicate() hands one DTensor to "
            "all, whose gradient is summed on its way out; no input_layouts below it"
        )
    quoted = " and ".join(f'"{parent}"' for parent in parents)
    return f"give {quoted} the style gather_input, and leave input out below it"


def _made_whole_for_nothing(items: Sequence[Item]) -> Iterator[Finding]:
    """What gathers a dim of its input and cuts its output along it again, and does nothing along it between.
    That it is cut again shows in the backward: its gradient is gathered along the same dim."""
    gathers = [item for item in items if isinstance(item, Collective) and _is_gather(item)]
    back = {_of_gather(gather) for gather in gathers if gather.phase is Phase.BACKWARD}
    spare = [gather for gather in gathers if gather.phase is Phase.FORWARD and _of_gather(gather) in back]
    plain = {module for module in {gather.module for gather in spare} if _is_plain(module, spare, items)}
    wasted = [gather for gather in gathers if gather.module in plain and _of_gather(gather) in back]
    if not wasted:
        return
    names = list(dict.fromkeys(any_layer(gather.module) for gather in wasted))
    dims = " and ".join(dict.fromkeys(f"dim {gather.before.dim}" for gather in wasted))  # type: ignore[union-attr]
    yield Finding(
        FindingKind.GATHERED_FOR_NOTHING,
        ", ".join(names),
        f"gathers {dims} of what it takes, and what it gives is cut along it again, though nothing in it "
        f"works along that dim: {len(wasted)} all-gathers a step, forward and backward, "
        f"{size(sum(gather.call.wire_bytes for gather in wasted))} on the wire per rank",
        advice="Let it run on each rank's part. Each rank then finds a part of its weights' gradients: as "
        "DTensors (Replicate) they are summed.",
    )


def _is_gather(collective: Collective) -> bool:
    is_to_whole = isinstance(collective.before, Shard) and collective.after == Replicate()
    is_gather = carries_out(collective) is CollectiveKind.ALL_GATHER
    return is_to_whole and is_gather and collective.call.axis == TENSOR_AXIS and bool(collective.module)


def _of_gather(gather: Collective) -> tuple[object, ...]:
    return gather.module, gather.before, gather.call.payload_bytes


def _is_plain(module: str, gathers: Sequence[Collective], items: Sequence[Item]) -> bool:
    """Whether all that a module computes in the forward keeps the gathered dim as it is."""
    befores = (gather.before for gather in gathers if gather.module == module)
    dims = {before.dim for before in befores if isinstance(before, Shard)}
    ops = (each for each in items if isinstance(each, Op) and each.module == module)
    moved = (OpKind.COPY, OpKind.FILL)
    forward = [op for op in ops if op.phase is Phase.FORWARD and op.kind not in moved]
    return bool(forward) and all(_keeps(op, dim) for op in forward for dim in dims)


def _keeps(op: Op, dim: int) -> bool:
    """By its shapes: none of its dims goes, and this one has the size that it had."""
    if not op.inputs or not op.outputs:
        return False
    longest = max(op.inputs, key=lambda spec: len(spec.shape)).shape
    if op.kind is OpKind.NORM:
        normed = max((len(spec.shape) for spec in op.inputs[1:]), default=len(longest))
        return dim % len(longest) < len(longest) - normed
    return (
        op.kind in _PLAIN
        and dim < len(longest)
        and all(len(spec.shape) == len(longest) and spec.shape[dim] == longest[dim] for spec in op.outputs)
    )
