"""Pipeline schedules: from each part's forward and backward of one micro-batch to the whole step.

Every schedule is played through, turn by turn, in the order that torch's runs (core/pipeline.py), until it
repeats: a further micro-batch then adds what the busiest stage takes. A part's activation, or its gradient,
reaches the next stage `transfer_s` after it was made.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from shardwise.core.pipeline import Pipeline, Turn


@dataclass(frozen=True, slots=True)
class PartTimes:
    """One part's work on one micro-batch; or all of a stage's."""

    forward_s: float
    backward_s: float

    @property
    def total_s(self) -> float:
        return self.forward_s + self.backward_s


@dataclass(frozen=True, slots=True)
class Pass:
    """A forward or backward of one micro-batch on one part, as the schedule placed it."""

    stage: int
    part: int
    micro_batch: int
    backward: bool
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class Gap:
    """A stage's waiting between two passes, before its first or after its last."""

    stage: int
    start_s: float
    end_s: float


def pipeline_s(
    pipeline: Pipeline, parts: Sequence[PartTimes], micro_batches: int, transfer_s: float
) -> float:
    """Seconds from the first forward to the last backward."""
    p = pipeline.stages
    busiest = max(stage_total_s(pipeline, parts))
    if p == 1:
        return micro_batches * busiest
    rounds = min(micro_batches // p, 4)  # by then the schedule repeats
    played = rounds * p + micro_batches % p
    end_s = max(each.end_s for each in play(pipeline, parts, played, transfer_s))
    return end_s + (micro_batches - played) * busiest


def stage_total_s(pipeline: Pipeline, parts: Sequence[PartTimes]) -> list[float]:
    """What each stage works on one micro-batch."""
    return [sum(parts[part].total_s for part in pipeline.parts_of(stage)) for stage in range(pipeline.stages)]


def play(pipeline: Pipeline, parts: Sequence[PartTimes], micro_batches: int, transfer_s: float) -> list[Pass]:
    """Every pass of all stages."""
    took = {
        (part, backward): times.backward_s if backward else times.forward_s
        for part, times in enumerate(parts)
        for backward in (False, True)
    }
    return replay(pipeline, lambda turn: took[turn.part, turn.backward], micro_batches, transfer_s)


def replay(
    pipeline: Pipeline, took_s: Callable[[Turn], float], micro_batches: int, transfer_s: float
) -> list[Pass]:
    """The same of passes that each take a time of their own."""
    stages = range(pipeline.stages)
    turns = [pipeline.turns(stage, micro_batches) for stage in stages]
    ends: dict[Turn, float] = {}
    free, at, placed = [0.0] * len(stages), [0] * len(stages), []
    left = sum(map(len, turns))
    while left:
        before = left
        for stage in stages:
            while at[stage] < len(turns[stage]):
                turn = turns[stage][at[stage]]
                needs = _needs(turn, pipeline.parts)
                if needs is not None and needs not in ends:
                    break
                crosses = needs is not None and pipeline.stage_of(needs.part) != stage
                ready = ends[needs] + (transfer_s if crosses else 0.0) if needs is not None else 0.0
                start = max(free[stage], ready)
                end = start + took_s(turn)
                ends[turn] = free[stage] = end
                placed.append(Pass(stage, turn.part, turn.micro_batch, turn.backward, start, end))
                at[stage] += 1
                left -= 1
        assert left < before, "the stages wait for one another"
    return placed


def _needs(turn: Turn, parts: int) -> Turn | None:
    """What must have run: the part before, in the backward the part after, and the last part's own
    forward."""
    if not turn.backward:
        return Turn(turn.part - 1, turn.micro_batch, False) if turn.part else None
    if turn.part < parts - 1:
        return Turn(turn.part + 1, turn.micro_batch, True)
    return Turn(turn.part, turn.micro_batch, False)


def gaps(passes: Iterable[Pass], stage: int, end_s: float) -> list[Gap]:
    """The bubble as a stage has it, from 0 to end_s."""
    found, free = [], 0.0
    for each in sorted((each for each in passes if each.stage == stage), key=lambda each: each.start_s):
        if each.start_s > free:
            found.append(Gap(stage, free, each.start_s))
        free = each.end_s
    if end_s > free:
        found.append(Gap(stage, free, end_s))
    return found
