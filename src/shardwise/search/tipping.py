"""What decides: by how much a constant of the machine must change before another of the found plans wins.

Each is predicted again on machines with one kind of constants scaled; between two factors the lead is
taken to change evenly with their logarithm."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace

from shardwise.core.machine import CollectiveRate, KernelRate, Link, Machine, Points
from shardwise.core.program import Program
from shardwise.core.search import Tipping
from shardwise.predict.predict import step_s
from shardwise.search.problem import Answer

FACTORS = (2**0.5, 2.0, 4.0)
"""Those that are tried, and one over each."""
Scaled = Callable[[Machine, float], Machine]


def tippings(
    machine: Machine, answers: Sequence[tuple[Answer, Program]], memory_bytes: float
) -> tuple[Tipping, ...]:
    """Of each kind of constants, for the best of `answers` against the others, each with its Program."""
    if len(answers) < 2:
        return ()
    found = [_first_tipping(words, machine, scaled, answers) for words, scaled in CONSTANTS.items()]
    return (*found, _of_memory([answer for answer, _ in answers], memory_bytes))


def _first_tipping(
    words: str, machine: Machine, scaled: Scaled, plans: Sequence[tuple[Answer, Program]]
) -> Tipping:
    """The factor nearest to 1, up or down, at which another plan takes no longer than the best."""
    nearest: tuple[float, int] | None = None
    for up in (True, False):
        before = [(0.0, answer.prediction.step_s) for answer, _ in plans]
        for factor in FACTORS:
            log = math.log(factor) if up else -math.log(factor)
            if nearest is not None and abs(log) / 2 > abs(nearest[0]):
                break
            now = [
                (log, step_s(program, scaled(machine, math.exp(log)), answer.prediction.setup))
                for answer, program in plans
            ]
            crossed = list(_crossed(before, now))
            if crossed:
                at, winner = min(crossed, key=lambda pair: abs(pair[0]))
                if nearest is None or abs(at) < abs(nearest[0]):
                    nearest = at, winner
                break
            before = now
    if nearest is None:
        return Tipping(words, None)
    return Tipping(words, math.exp(nearest[0]), nearest[1])


def _crossed(
    before: Sequence[tuple[float, float]], now: Sequence[tuple[float, float]]
) -> Iterator[tuple[float, int]]:
    """(logarithm of the factor, plan) of those that the best loses to between two factors."""
    (log0, best0), (log1, best1) = before[0], now[0]
    for index in range(1, len(now)):
        lead0, lead1 = math.log(before[index][1] / best0), math.log(now[index][1] / best1)
        if lead1 <= 0 < lead0:
            yield log0 + (log1 - log0) * lead0 / (lead0 - lead1), index


def _of_memory(answers: Sequence[Answer], memory_bytes: float) -> Tipping:
    """How little memory makes the best not fit."""
    needed = [answer.prediction.memory.device_bytes for answer in answers]
    smaller = [index for index in range(1, len(needed)) if needed[index] < needed[0]]
    return Tipping("memory of a device", needed[0] / memory_bytes, smaller[0] if smaller else None)


def _faster_points(points: Points, factor: float) -> Points:
    return tuple((size, seconds / factor) for size, seconds in points)


def _link(link: Link | None, factor: float) -> Link | None:
    if link is None:
        return None
    rates = tuple((kind, tuple(_collective(rate, factor) for rate in each)) for kind, each in link.rates)
    return replace(link, bytes_per_s=link.bytes_per_s * factor, rates=rates)


def _collective(rate: CollectiveRate, factor: float) -> CollectiveRate:
    return replace(rate, bytes_per_s=rate.bytes_per_s * factor, points=_faster_points(rate.points, factor))


def _kernel(rate: KernelRate, factor: float) -> KernelRate:
    return replace(
        rate,
        bytes_per_s=rate.bytes_per_s * factor,
        elements_per_s=rate.elements_per_s * factor,
        points=_faster_points(rate.points, factor),
    )


def _within(machine: Machine, factor: float) -> Machine:
    link = _link(machine.within, factor)
    assert link is not None
    return replace(machine, within=link)


def _between(machine: Machine, factor: float) -> Machine:
    return replace(machine, between=_link(machine.between, factor))


def _matmuls(machine: Machine, factor: float) -> Machine:
    scaled = tuple(
        (dtype, replace(rate, peak_flops=rate.peak_flops * factor)) for dtype, rate in machine.matmuls
    )
    return replace(machine, matmuls=scaled)


def _attention(machine: Machine, factor: float) -> Machine:
    scaled = tuple(
        (
            dtype,
            replace(
                rate, forward_flops=rate.forward_flops * factor, backward_flops=rate.backward_flops * factor
            ),
        )
        for dtype, rate in machine.attentions
    )
    return replace(machine, attentions=scaled)


def _kernels(machine: Machine, factor: float) -> Machine:
    return replace(machine, kernels=tuple((name, _kernel(rate, factor)) for name, rate in machine.kernels))


def _launches(machine: Machine, factor: float) -> Machine:
    """A larger factor is a slower host."""
    known = {each.name: getattr(machine.launch, each.name) for each in fields(machine.launch)}
    scaled = {name: seconds * factor for name, seconds in known.items() if seconds is not None}
    return replace(machine, launch=replace(machine.launch, **scaled))


CONSTANTS: dict[str, Scaled] = {
    "rate of the link within a node": _within,
    "rate of the link between nodes": _between,
    "rate of matmuls": _matmuls,
    "rate of attention": _attention,
    "rate of kernels that memory bounds": _kernels,
    "time to launch a kernel": _launches,
}
