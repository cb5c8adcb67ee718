"""Pipeline schedules: from each stage's forward and backward of one micro-batch to the whole step.

    1F1B (PipeDream-flush)  stage s runs p - s forwards, then one backward and one forward in turns, then the
                            backwards that are left
    interleaved             each stage holds v chunks of layers: the bubble shrinks to 1/v of (p - 1)
                            micro-batches

Source: Narayanan et al. 2021 (arXiv 2104.04473), sections 2.2.1 and 2.2.2. 1F1B is played through, event by
event, until it repeats; interleaved is the paper's formula. An activation reaches the next stage `transfer_s`
after it was made.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StageTimes:
    """One stage's work on one micro-batch."""

    forward_s: float
    backward_s: float

    @property
    def total_s(self) -> float:
        return self.forward_s + self.backward_s


@dataclass(frozen=True, slots=True)
class Pass:
    """A forward or backward of one micro-batch on one stage, as the schedule placed it."""

    stage: int
    micro_batch: int
    backward: bool
    start_s: float
    end_s: float


def pipeline_s(stages: Sequence[StageTimes], micro_batches: int, transfer_s: float, chunks: int = 1) -> float:
    """Seconds from the first forward to the last backward."""
    busiest = max(stage.total_s for stage in stages)
    p = len(stages)
    if p == 1:
        return micro_batches * busiest
    if chunks > 1:
        mean_s = sum(stage.total_s for stage in stages) / p
        return micro_batches * busiest + (p - 1) * (mean_s / chunks + 2 * transfer_s)
    played = min(micro_batches, 4 * p)  # by then each further micro-batch adds what the busiest stage takes
    end_s = max(each.end_s for each in one_f_one_b(stages, played, transfer_s))
    return end_s + (micro_batches - played) * busiest


def one_f_one_b(stages: Sequence[StageTimes], micro_batches: int, transfer_s: float) -> list[Pass]:
    """Every pass of a 1F1B schedule."""
    p, m = len(stages), micro_batches
    orders = []
    for stage in range(p):
        ahead = min(m, p - stage)
        order = [(False, index) for index in range(ahead)]
        for index in range(m):
            order.append((True, index))
            if ahead + index < m:
                order.append((False, ahead + index))
        orders.append(order)
    ends: dict[tuple[int, bool, int], float] = {}
    free, at, placed = [0.0] * p, [0] * p, []
    left = sum(len(order) for order in orders)
    while left:
        for stage in range(p):
            while at[stage] < len(orders[stage]):
                backward, index = orders[stage][at[stage]]
                needs = _needs(stage, backward, index, p)
                if needs is not None and needs not in ends:
                    break
                crosses = needs is not None and needs[0] != stage
                ready = ends[needs] + (transfer_s if crosses else 0.0) if needs is not None else 0.0
                start = max(free[stage], ready)
                end = start + (stages[stage].backward_s if backward else stages[stage].forward_s)
                ends[stage, backward, index] = free[stage] = end
                placed.append(Pass(stage, index, backward, start, end))
                at[stage] += 1
                left -= 1
    return placed


def _needs(stage: int, backward: bool, index: int, p: int) -> tuple[int, bool, int] | None:
    if not backward:
        return (stage - 1, False, index) if stage else None
    return (stage + 1, True, index) if stage < p - 1 else (stage, False, index)


def layers_of_stages(n_layers: int, stages: int) -> list[tuple[int, int]]:
    """(first layer, number) of each stage: even, and what is left over goes to the middle, since the ends
    hold embedding and head."""
    base, extra = divmod(n_layers, stages)
    order = sorted(range(stages), key=lambda stage: abs(stage - (stages - 1) / 2))
    counts = [base + (stage in order[:extra]) for stage in range(stages)]
    firsts = [sum(counts[:stage]) for stage in range(stages)]
    return list(zip(firsts, counts, strict=True))
