"""How far a sharded run of a loop is off the one of a single process, and how far it may be.

The single process runs the loop twice, once with its matmuls summed in parts (noise.py), so each number of
each step has its own noise, with all that earlier steps make of it. A value v with noise n may be off by

    max(8 eps G, min(max(1000 n, least |v|), MOST_TOLERANCE |v|))

as in expected.py; G is the norm of all of its kind together. Weights are measured by how far the steps have
moved them, so a small learning rate hides nothing; one whose noise is above MOST_NOISE of that is not told.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shardwise.core.errors import RunError
from shardwise.verify.exchange import all_agree, largest
from shardwise.verify.expected import LEAST_TOLERANCE, MOST_TOLERANCE
from shardwise.verify.held import distances, local, relative, size
from shardwise.verify.loop.record import Record, StepRecord, Tensors

LEAST_OF_WEIGHTS = 1e-6
MOST_NOISE = 1e-3


@dataclass(frozen=True, slots=True)
class Allowed:
    """How far each may be off: losses, norms relative, by step; gradients absolute, by step and parameter;
    weights and states absolute, those that can be told. tolerance: the least of all, relative."""

    tolerance: float
    numbers: list[tuple[float, float]]
    gradients: list[dict[str, float]]
    weights: dict[str, float]
    states: dict[str, dict[str, float]]


@dataclass(frozen=True, slots=True)
class OffAtStep:
    """Relative: loss and norm, None where the step returns none; raw and given gradients, those that are
    wrong; raw is None where no backward was seen."""

    loss: float | None
    norm: float | None
    raw: dict[str, float] | None
    given: dict[str, float]


@dataclass(frozen=True, slots=True)
class Off:
    """All that is wrong, relative. steps: all of them, those that are right too."""

    steps: list[OffAtStep]
    weights: dict[str, float]
    states: dict[str, dict[str, float]]
    buffers: dict[str, float]


def allowed(whole: Record, split: Record, dtype: torch.dtype) -> Allowed:
    """split: the same with its matmuls split. Raises RunError where the loop itself isn't finite."""
    least, eps = LEAST_TOLERANCE[dtype], torch.finfo(dtype).eps
    numbers, gradients = [], []
    for one, other in zip(whole.steps, split.steps, strict=True):
        numbers.append((_of_number(one.loss, other.loss, least), _of_number(one.norm, other.norm, least)))
        gradients.append(_of_tensors(one.gradients, other.gradients, least, eps))
    weights = {}
    for name, after in whole.after.items():
        moved = size(local(after).double() - whole.before[name].double())
        off = size(local(split.after[name]).double() - local(after).double())
        if moved and off <= MOST_NOISE * moved:
            weights[name] = min(max(1000 * off, LEAST_OF_WEIGHTS * moved), MOST_TOLERANCE * moved)
    states = {}
    for kind, tensors in whole.states.items():
        other_tensors = split.states.get(kind, {})
        told = {name: each for name, each in tensors.items() if name in other_tensors and name in weights}
        states[kind] = _of_tensors(told, other_tensors, max(least, LEAST_OF_WEIGHTS), eps)
    return Allowed(least, numbers, gradients, weights, states)


def _of_number(one: float | None, other: float | None, least: float) -> float:
    if one is None or other is None:
        return 0.0
    if not isfinite(one):
        raise RunError(f"its loss or gradient norm is {one}.")
    return min(max(1000 * abs(other - one) / (abs(one) or 1.0), least), MOST_TOLERANCE)


def _of_tensors(
    whole: Mapping[str, Tensor | None], split: Mapping[str, Tensor | None], least: float, eps: float
) -> dict[str, float]:
    sizes = {name: size(each) for name, each in whole.items() if each is not None}
    total = sum(each**2 for each in sizes.values()) ** 0.5
    if not isfinite(total):
        raise RunError("its gradients are not finite.")
    found = {}
    for name, own in sizes.items():
        one, other = whole[name], split.get(name)
        assert one is not None
        off = own if other is None else size(other.double() - one.double())
        found[name] = max(8 * eps * total, min(max(1000 * off, least * own), MOST_TOLERANCE * own))
    return found


def differences(model: nn.Module, sharded: Record, whole: Record, may_be: Allowed, parts: int) -> Off:
    """model: the sharded one, under its own names. parts: of the batch, over which losses may be dealt out.
    All ranks call it, and come to the same."""
    steps = [
        _at_step(model, one, other, may_be.gradients[at], may_be.numbers[at], parts)
        for at, (one, other) in enumerate(zip(sharded.steps, whole.steps, strict=True))
    ]
    moved = {
        name: size(local(each).double() - whole.before[name].double()) for name, each in whole.after.items()
    }
    told = {name: whole.after[name] for name in may_be.weights}
    far = distances(model, sharded.after, told)
    weights = {name: off / moved[name] for name, off in far.items() if not off <= may_be.weights[name]}
    states = {}
    for kind, limits in may_be.states.items():
        if all_agree(kind in sharded.states):
            expected = {name: whole.states[kind][name] for name in limits}
            far = distances(model, sharded.states[kind], expected)
            states[kind] = {
                name: off / (size(expected[name]) or 1.0)
                for name, off in far.items()
                if not off <= limits[name]
            }
    return Off(steps, weights, states, _buffers(sharded, whole))


def _at_step(
    model: nn.Module,
    one: StepRecord,
    other: StepRecord,
    limits: Mapping[str, float],
    numbers: tuple[float, float],
    parts: int,
) -> OffAtStep:
    given = _wrong(model, one.gradients, other.gradients, limits)
    raw = None
    if all_agree(one.raw is not None and other.raw is not None):
        assert one.raw is not None
        assert other.raw is not None
        # what clipping has scaled may be off by as much as it was before it
        scale = _size(other.raw) / (_size(other.gradients) or 1.0)
        wider = {name: limit * max(1.0, scale) for name, limit in limits.items()}
        raw = _wrong(model, one.raw, other.raw, wider)
    loss = _number_off(one.loss, other.loss, numbers[0], parts)
    return OffAtStep(loss, _number_off(one.norm, other.norm, numbers[1], 1), raw, given)


def _wrong(
    model: nn.Module, tensors: Tensors, whole: Tensors, limits: Mapping[str, float]
) -> dict[str, float]:
    far = distances(model, tensors, whole)
    found = {}
    for name, off in far.items():
        expected = whole[name]
        own = size(expected) if expected is not None else 0.0
        if not off <= limits.get(name, 0.0):
            found[name] = off / own if own else float("inf")
    return found


def _size(tensors: Tensors) -> float:
    return float(sum(size(each) ** 2 for each in tensors.values() if each is not None) ** 0.5)


def _number_off(value: float | None, whole: float | None, limit: float, parts: int) -> float | None:
    """How far off, relative, where it is wrong, and 0.0 where it is right. Each rank may have the whole, or
    what all ranks' have as their mean, or their sum over the parts of the batch."""
    if not all_agree(value is not None and whole is not None):
        return None
    assert value is not None
    assert whole is not None
    scale = abs(whole) or 1.0
    every: list[float] = [0.0] * dist.get_world_size()
    dist.all_gather_object(every, value)
    mean = sum(every) / len(every)
    offs = [max(abs(each - whole) for each in every) / scale]
    if parts > 1:
        offs += [abs(mean - whole) / scale, abs(mean * parts - whole) / scale]
    off = largest(min(offs))
    return 0.0 if off <= limit else off


def _buffers(sharded: Record, whole: Record) -> dict[str, float]:
    """Those of the whole one's shape that have other values; relative."""
    found = {}
    for name, expected in whole.buffers.items():
        held = sharded.buffers.get(name)
        is_comparable = held is not None and local(held).shape == expected.shape
        off = relative(local(held), expected) if is_comparable and held is not None else 0.0
        off = largest(off)
        if off > MOST_NOISE:
            found[name] = off
    return found
