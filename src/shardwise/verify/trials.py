"""What is tried where a run first goes wrong: another cut of what is sharded, sums with something added once
too often, a module alone on parts of its input, gradients of some tokens alone. Who is right then was wrong
for that reason."""

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from shardwise.parallel.stages import stage_of
from shardwise.step.portion import Portion
from shardwise.torch_private import StridedShard
from shardwise.verify.evidence import Added, Evidence, Recut, Trials
from shardwise.verify.exchange import all_agree, gathered, smallest
from shardwise.verify.expected import Unsharded
from shardwise.verify.held import local
from shardwise.verify.noise import NoDropout
from shardwise.verify.observe import Observed, observe
from shardwise.verify.relation import Relation, cut_apart, relate
from shardwise.verify.trail import Point, Side
from shardwise.verify.whole_trail import of_own_tokens, whole_trail


def tried(
    known: Evidence,
    whole_model: nn.Module,
    whole: Observed,
    sharded: Observed,
    expected: Unsharded,
    portion: Portion,
) -> Trials:
    """All ranks call it. What was wrong first they agree on; where they don't, nothing is tried."""
    if not known.differences.is_output_wrong:
        return Trials(kept=_kept(known, whole_model, sharded, expected, portion))
    first = known.roots.first_wrong
    at = smallest(first if first is not None else -1)
    if at < 0 or not all_agree(at == first) or stage_of(known.model) is not None:
        return Trials()
    weights = {name: parameter.detach() for name, parameter in whole_model.named_parameters()}
    recut = _recut(known, weights, whole.points, expected, at, portion)
    added = _added(known, weights, whole.points, sharded.points, expected.tolerance, at, portion)
    return Trials(recut, added, _normalises(known, whole_model, whole.points, at))


# ------------------------------------------------------------------------------------------- other cuts


def _recut(
    known: Evidence,
    weights: Mapping[str, Tensor],
    points: Sequence[Point],
    expected: Unsharded,
    at: int,
    portion: Portion,
) -> Recut | None:
    """Cuts each sharded parameter of the modules around the first wrong value in another way, and looks
    whether the value is then right."""
    group, target = portion.tp_group, points[at]
    n, rank = dist.get_world_size(group), dist.get_rank(group)
    for name, parameter in _around(known, at):
        dim = _cut_dim(parameter)
        if dim is None or name not in weights or target.value is None:
            continue
        kept = local(parameter).detach()
        for parts in (2, 3, 1):
            if weights[name].shape[dim] % (parts * n):
                continue
            trial = cut_apart(weights[name], dim, parts, n, rank)
            if trial.shape != kept.shape or all_agree(torch.equal(trial, kept)):
                continue
            before = kept.clone()
            kept.copy_(trial)
            found = observe(known.model, expected.batches[0], portion, trail=True).points
            kept.copy_(before)
            value = next((each.value for each in found if each.key == target.key), None)
            pieces = [each for (each,) in gathered([value], group)]
            if all_agree(relate(pieces, target.value, tolerance=expected.tolerance).relation in _AS_MEANT):
                return Recut(name, parts)
    return None


_AS_MEANT = frozenset({Relation.WHOLE, Relation.SHARDED})


def _around(known: Evidence, at: int) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters that the value is computed from, and those of the modules that give what it is made of."""
    held = dict(known.model.named_parameters(remove_duplicate=False))
    names = known.roots.parameters_in(at)
    near = [at, *(each for each in known.roots.made_of(at) if known.seen[each].side is Side.GIVES)]
    for module in dict.fromkeys(known.seen[each].module for each in near):
        names += [name for name in held if name.rpartition(".")[0] == module]
    for name in dict.fromkeys(names):
        if name in held:
            yield name, held[name]


def _cut_dim(parameter: nn.Parameter) -> int | None:
    """The dim along which tp alone cuts it."""
    if not isinstance(parameter, DTensor) or len(parameter.placements) != 1:
        return None
    (placement,) = parameter.placements
    if not placement.is_shard() and not isinstance(placement, StridedShard):
        return None
    return placement.dim  # type: ignore[attr-defined, no-any-return]


# --------------------------------------------------------------------------------------------- sums


def _added(
    known: Evidence,
    weights: Mapping[str, Tensor],
    points: Sequence[Point],
    sharded: Sequence[Point],
    tolerance: float,
    at: int,
    portion: Portion,
) -> Added | None:
    """What every rank has whole, and that is in the first wrong value n times, or the n-th of it: a bias, or
    what goes past, added on every rank before a sum."""
    target = points[at]
    own = next((each.value for each in sharded if each.key == target.key), None)
    found = None
    if own is not None and target.value is not None and own.shape == target.value.shape:
        candidates: dict[str | int, Tensor] = {
            name: weights[name] for name in known.roots.parameters_in(at) if name in weights
        }
        candidates |= {
            each: value
            for each in known.roots.made_of(at)
            if (value := points[each].value) is not None and value.shape == target.value.shape
        }
        difference, bound = own.double() - target.value.double(), tolerance * float(target.value.norm())
        n = dist.get_world_size(portion.tp_group)
        fitting = (_times(what, each.double(), difference, bound, n) for what, each in candidates.items())
        found = next((each for each in fitting if each is not None), None)
    return found if all_agree(found is not None) else None


def _times(what: str | int, added: Tensor, difference: Tensor, bound: float, n: int) -> Added | None:
    """How often it is in a value that is off by `difference`, if that is all that it is off by."""
    try:
        whole = added.expand_as(difference)
    except RuntimeError:
        return None
    for times in (float(n), 1 / n, 0.0):
        if float((difference - (times - 1) * whole).norm()) <= bound:
            return Added(what, times)
    return None


# -------------------------------------------------------------------------------------------- statistics


@torch.no_grad()
def _normalises(known: Evidence, whole_model: nn.Module, points: Sequence[Point], at: int) -> bool:
    """Whether the module that gives the first wrong value takes statistics over all of what each rank has a
    part of: unsharded it gives the same for twice its input, and another thing for a part of it."""
    target = points[at]
    taken = next((each for each in points if each.key == (target.module, Side.TAKES, target.call)), None)
    if target.side is not Side.GIVES or taken is None or taken.value is None or target.value is None:
        return False
    place = known.seen[points.index(taken)].value
    if place is None or place.relation is not Relation.SHARDED or place.dim is None:
        return False
    module = whole_model.get_submodule(target.module)
    first = taken.value.narrow(place.dim, 0, taken.value.shape[place.dim] // known.n_ranks)
    part = torch.zeros_like(taken.value)
    part.narrow(place.dim, 0, first.shape[place.dim]).copy_(first)
    try:
        with NoDropout():
            given, doubled, of_part = (module(each) for each in (taken.value, 2 * taken.value, part))
        own = of_part.narrow(place.dim, 0, first.shape[place.dim])
        whole = given.narrow(place.dim, 0, first.shape[place.dim])
        return _is_near(doubled, given) and not _is_near(own, whole)
    except (RuntimeError, TypeError, AttributeError, IndexError):  # it wants more than one tensor
        return False


def _is_near(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).norm() <= 1e-2 * other.norm())


# ------------------------------------------------------------------------------------------ shared sequences


def _kept(
    known: Evidence, whole_model: nn.Module, sharded: Observed, expected: Unsharded, portion: Portion
) -> frozenset[int]:
    """Where ranks share sequences: the points, next to where gradients are right, at which each rank has what
    its own tokens alone give back."""
    if not portion.part.cuts_sequence or not known.gradients:
        return frozenset()
    sources = [known.roots.source(name, related) for name, related in known.gradients.items()]
    last = max(sources, key=lambda each: each.last)
    points = sorted({at for each in sources if each.right == last.right for at in each.points})
    seq = expected.batches[0][0].shape[1]
    own = of_own_tokens(portion, seq)
    alone = whole_trail(whole_model, expected.batches[0], portion, dict.fromkeys(last.right, own)).points
    held = {each.key: each.gradient for each in sharded.points}
    pieces = gathered([held.get(alone[at].key) for at in points], portion.tp_group)
    kept = []
    for number, at in enumerate(points):
        gradient = alone[at].gradient
        if gradient is not None:
            related = relate([each[number] for each in pieces], gradient, tolerance=10 * expected.tolerance)
            kept += [at] if related.is_right else []
    return frozenset(kept)
