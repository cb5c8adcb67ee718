"""Looking closer, where something is wrong: both models once more with an eye on every module, and all ranks'
pieces of what differs.

Data-parallel ranks look at their own portions, so a tensor-parallel group finds its own evidence, which the
stages of a pipeline put together; what all must do together they agree on.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch.distributed as dist
from torch import Tensor, nn

from shardwise.core.mesh import STAGES_AXIS, TENSOR_AXIS
from shardwise.parallel.stages import stage_of
from shardwise.step.portion import Portion
from shardwise.verify.accumulated import in_micro_batches
from shardwise.verify.along import unsummed
from shardwise.verify.evidence import Evidence
from shardwise.verify.exchange import gathered
from shardwise.verify.expected import Differences, Unsharded
from shardwise.verify.held import held_over, own_distance, size
from shardwise.verify.observe import Observed, observe
from shardwise.verify.relation import Related, cut_dim, relate
from shardwise.verify.roots import Lacks, Seen
from shardwise.verify.trail import Point, Side, flow
from shardwise.verify.trials import tried
from shardwise.verify.whole_trail import whole_trail


def evidence(
    model: nn.Module, whole_model: nn.Module, expected: Unsharded, differences: Differences, portion: Portion
) -> Evidence:
    """How what the ranks hold relates to the whole: wrong gradients, the logits, and at every point of the
    unsharded model's trail what modules take and give, and what comes back to it."""
    group, batch = portion.tp_group, expected.batches[0]
    whole = whole_trail(whole_model, batch, portion)
    sharded = observe(model, batch, portion, trail=True)
    gradients = _related_gradients(model, sharded, expected, differences, group)
    output, parts = None, {}
    if differences.is_output_wrong and sharded.logits is not None:
        pieces = [each for (each,) in gathered([sharded.logits], group)]
        output = relate(pieces, whole.own_logits, tolerance=expected.tolerance)
    if not differences.is_output_wrong and portion.mesh is not None and portion.mesh.size() > group.size():
        parts = unsummed(model, sharded.gradients, expected, list(gradients), portion)
    found = _pieces(whole.points, sharded.points, group)
    seen = _seen(whole.points, found, expected.tolerance)
    known = Evidence(
        model=model,
        n_ranks=dist.get_world_size(group),
        differences=differences,
        output=output,
        gradients=gradients,
        seen=seen,
        flow=flow(whole_model, whole.points, portion.micro_batches),
        along=parts,
        idle=_idle_ranks(model, sharded, expected, differences),
        counts=_counts(whole.points, sharded.points),
        again=in_micro_batches(model, whole.given, sharded.gradients, expected, differences, portion),
        lacks=_lacking(whole.points, found, expected.tolerance),
    )
    known = _of_all_stages(known, portion)
    return replace(known, trials=tried(known, whole_model, whole, sharded, expected, portion))


def _of_all_stages(known: Evidence, portion: Portion) -> Evidence:
    """What each stage has seen, in one: points and gradients of other layers are seen on other ranks."""
    stage = stage_of(known.model)
    if stage is None or portion.mesh is None:
        return known
    held = {name for name, _ in known.model.named_parameters()}
    own = {name: related for name, related in known.gradients.items() if name in held}
    mine = (known.seen, own, known.output, known.counts)
    every: list[tuple[Sequence[Seen], dict[str, Related], Related | None, dict[str, tuple[int, int]]]]
    every = [((), {}, None, {})] * stage.pipeline.stages
    dist.all_gather_object(every, mine, group=portion.mesh.get_group(STAGES_AXIS))
    seen = list(known.seen)
    for others, *_ in every:
        for at, other in enumerate(others):
            if seen[at].value is None and seen[at].gradient is None:
                seen[at] = other
    return replace(
        known,
        seen=tuple(seen),
        gradients={
            **known.gradients,
            **{name: each for _, found, *_ in every for name, each in found.items()},
        },
        output=next((each for _, _, each, _ in every if each is not None), None),
        counts={name: each for *_, found in every for name, each in found.items()},
    )


def _related_gradients(
    model: nn.Module,
    sharded: Observed,
    expected: Unsharded,
    differences: Differences,
    group: dist.ProcessGroup,
) -> dict[str, Related]:
    names = list(differences.wrong_gradients)
    pieces = gathered(
        [held_over(sharded.gradients.get(name), model, (TENSOR_AXIS,)) for name in names], group
    )
    related = {}
    for at, name in enumerate(names):
        whole = expected.observed.gradients[name]
        assert whole is not None
        own = size(whole)
        tolerance = expected.allowed[name] / own if own else expected.tolerance
        related[name] = relate([each[at] for each in pieces], whole, tolerance=tolerance)
    return related


def _idle_ranks(
    model: nn.Module, sharded: Observed, expected: Unsharded, differences: Differences
) -> dict[str, tuple[int, ...]]:
    """Of the wrong gradients those that are zero on some ranks of the mesh, and right on all the others: on
    which."""
    names = list(differences.wrong_gradients)
    mine = [_state(model, name, sharded, expected) for name in names]
    every: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(every, mine)
    idle = {}
    for at, name in enumerate(names):
        states = [each[at] for each in every]
        if set(states) - {_ELSEWHERE} == {_RIGHT, _ZERO}:
            idle[name] = tuple(rank for rank, state in enumerate(states) if state == _ZERO)
    return idle


_RIGHT, _ZERO, _WRONG, _ELSEWHERE = "right", "zero", "wrong", "elsewhere"


def _state(model: nn.Module, name: str, sharded: Observed, expected: Unsharded) -> str:
    """What this rank has of a gradient."""
    whole = expected.observed.gradients[name]
    assert whole is not None
    if name not in sharded.gradients:
        return _ELSEWHERE
    found = own_distance(sharded.gradients[name], whole, model, name)
    if found is None:
        return _WRONG
    off, own, has_any = found
    if off <= expected.allowed[name]:
        return _RIGHT
    return _ZERO if own and not has_any else _WRONG


Pieces = dict[tuple[str, Side, int], tuple[list[Tensor | None], list[Tensor | None]]]
"""By point, what each rank of the group has: values, and gradients."""


def _pieces(whole: Sequence[Point], sharded: Sequence[Point], group: dist.ProcessGroup) -> Pieces:
    """For each point of the whole model's trail that all ranks have, and whose module is called as often."""
    others = {point.key: point for point in sharded}
    counts = _counts(whole, sharded)
    mine = {point.key for point in whole if point.key in others and point.module not in counts}
    every: list[set[object]] = [set()] * group.size()
    dist.all_gather_object(every, mine, group=group)
    known = [point.key for point in whole if all(point.key in each for each in every)]
    pairs = [(others[key].value, others[key].gradient) for key in known]
    on_ranks = gathered([each for pair in pairs for each in pair], group)
    return {
        key: ([each[2 * at] for each in on_ranks], [each[2 * at + 1] for each in on_ranks])
        for at, key in enumerate(known)
    }


def _seen(whole: Sequence[Point], pieces: Pieces, tolerance: float) -> tuple[Seen, ...]:
    """For each point of the whole model's trail."""
    seen = []
    for point in whole:
        values, gradients = pieces.get(point.key, ([None], []))
        value = gradient = None
        if point.value is not None and all(each is not None for each in values):
            value = relate(values, point.value, tolerance=tolerance)
            if point.gradient is not None:
                gradient = relate(gradients, point.gradient, tolerance=_OF_GRADIENTS * tolerance)
        seen.append(Seen(point.module, point.side, value, gradient))
    return tuple(seen)


_OF_GRADIENTS = 10  # those that are far smaller than the largest are rounding


def _lacking(whole: Sequence[Point], pieces: Pieces, tolerance: float) -> Lacks:
    """See roots.py. A rank that has a part of the gradient has it from its own part of the sum."""

    def missing(at: int) -> list[Tensor] | None:
        """What each rank's part is off the sum."""
        point, (_, parts) = whole[at], pieces.get(whole[at].key, ([], []))
        if point.gradient is None or not parts or any(each is None for each in parts):
            return None
        return [each - point.gradient.double() for each in parts if each is not None]

    def lacks(at: int, parts: Sequence[int]) -> bool:
        expected, (_, held) = whole[at].gradient, pieces.get(whole[at].key, ([], []))
        lacking = [each for part in parts if (each := missing(part)) is not None]
        if expected is None or not held or len(lacking) < len(parts):
            return False
        if any(each[0].shape != expected.shape for each in lacking):
            return False
        bound = _OF_GRADIENTS * tolerance * size(expected)
        off = [sum(each[rank] for each in lacking) + expected.double() for rank in range(len(held))]
        return all(
            piece is not None
            and (own := _own_part(each, held, rank)) is not None
            and size(piece - own) <= bound
            for rank, (piece, each) in enumerate(zip(held, off, strict=True))
        )

    return lacks


def _own_part(whole: Tensor, held: Sequence[Tensor | None], rank: int) -> Tensor | None:
    """Of a tensor that stands for the whole, what rank has where the ranks hold tensors like these; None
    where they aren't its chunks."""
    shapes = [each.shape for each in held if each is not None]
    if shapes[rank] == whole.shape:
        return whole
    dim = cut_dim(shapes, whole.shape)
    return whole.split([each[dim] for each in shapes], dim)[rank] if dim is not None else None


def _counts(whole: Sequence[Point], sharded: Sequence[Point]) -> dict[str, tuple[int, int]]:
    """Modules that are called more often than unsharded, or less often: (sharded, unsharded)."""
    of_whole, of_sharded = ({each.module: each.call + 1 for each in points} for points in (whole, sharded))
    return {
        name: (count, of_whole[name])
        for name, count in of_sharded.items()
        if name in of_whole and count != of_whole[name]
    }
