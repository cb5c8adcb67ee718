"""Pipelines: which layers each part of a model has, and in which order a stage runs its passes. Standard
library only.

A stage is a rank along the axis that cuts depth; it holds `chunks` parts of the model's row of layers: of p
stages, stage s holds the parts s, s + p, s + 2p, ... in the model's order. A turn is one part's forward or
backward of one micro-batch.

    gpipe        all forwards, then all backwards
    1f1b         stage s runs p - s forwards, then one backward and one forward in turns, then the backwards
                 that are left
    interleaved  the same over several parts: (v - 1) r + 2 (p - s - 1) forwards of its v parts first, r
                 micro-batches of a part before the next part's; then one forward and one backward in turns

Sources: Huang et al. 2019 (GPipe), Narayanan et al. 2021 (arXiv 2104.04473), section 2.2; the orders are
those of torch.distributed.pipelining's ScheduleGPipe, Schedule1F1B and ScheduleInterleaved1F1B.

Where r of a model's l layers run again in the backward, they are the first ones of each part: of a part with
k layers ceil(k r / l), so that parts of equal length do equal work. Without stages the model is one part.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import assert_never

from shardwise.core.errors import OptionError

EVEN, BALANCED = "even", "balanced"


class Schedule(StrEnum):
    """The order in which a stage runs its passes."""

    GPIPE = "gpipe"
    ONE_F_ONE_B = "1f1b"
    INTERLEAVED = "interleaved"


@dataclass(frozen=True, slots=True)
class Span:
    """`count` layers in a row, from `first` on."""

    first: int
    count: int

    @property
    def stop(self) -> int:
        return self.first + self.count

    @property
    def indices(self) -> range:
        return range(self.first, self.stop)

    def __contains__(self, layer: object) -> bool:
        return layer in self.indices


@dataclass(frozen=True, slots=True)
class Turn:
    """One part's forward or backward of one micro-batch."""

    part: int
    micro_batch: int
    backward: bool


@dataclass(frozen=True, slots=True)
class Pipeline:
    """How a step runs over stages. layers: of each part, in the model's order; empty: as even as can be."""

    stages: int
    chunks: int = 1
    schedule: Schedule = Schedule.ONE_F_ONE_B
    layers: tuple[int, ...] = ()

    @property
    def parts(self) -> int:
        return self.stages * self.chunks

    def parts_of(self, stage: int) -> tuple[int, ...]:
        """Those that a stage holds."""
        return tuple(range(stage, self.parts, self.stages))

    def stage_of(self, part: int) -> int:
        return part % self.stages

    def spans(self, n_layers: int, model: str = "the model") -> tuple[Span, ...]:
        """The layers of each part. Raises OptionError for what can't be."""
        counts = self.layers or even_counts(n_layers, self.parts)
        cut = f"{self.stages} stages" + (f" of {self.chunks} chunks" if self.chunks > 1 else "")
        if self.parts > n_layers:
            raise OptionError(
                f"pp={self.stages}: {model} has {n_layers} layers, and can't be cut into {cut}. Use at most "
                f"pp={n_layers // self.chunks}."
            )
        if len(counts) != self.parts or sum(counts) != n_layers or min(counts) < 1:
            even = ",".join(map(str, even_counts(n_layers, self.parts)))
            raise OptionError(
                f"--stages {','.join(map(str, counts))}: {cut} of {n_layers} layers are {self.parts} counts "
                f"of at least 1 that add up to {n_layers}. Use {EVEN}, or such as {even}."
            )
        firsts = [sum(counts[:part]) for part in range(self.parts)]
        return tuple(Span(first, count) for first, count in zip(firsts, counts, strict=True))

    @property
    def is_steady(self) -> bool:
        """Whether forwards and backwards take turns once a stage has begun, so that more micro-batches hold
        no more."""
        return self.schedule is not Schedule.GPIPE

    @property
    def wants(self) -> str:
        """Which numbers of micro-batches the schedule runs, in words."""
        match self.schedule:
            case Schedule.GPIPE:
                return "any number of micro-batches"
            case Schedule.ONE_F_ONE_B:
                return "at least as many micro-batches as stages"
            case Schedule.INTERLEAVED:
                return "micro-batches that equal rounds of about as many as stages can be made of"
            case _:
                assert_never(self.schedule)

    def runs(self, micro_batches: int) -> bool:
        """Whether the schedule runs so many micro-batches over several stages, as torch's do."""
        match self.schedule:
            case Schedule.GPIPE:
                return True
            case Schedule.ONE_F_ONE_B:
                return micro_batches >= self.stages
            case Schedule.INTERLEAVED:
                return micro_batches % self._rounds(micro_batches) == 0
            case _:
                assert_never(self.schedule)

    def _rounds(self, micro_batches: int) -> int:
        return max(1, micro_batches // self.stages)

    def check(self, micro_batches: int) -> None:
        """Raises OptionError for a number of micro-batches that the schedule can't run."""
        p, m = self.stages, micro_batches
        if p == 1:
            if self.chunks > 1 or self.layers:
                option = f"--chunks {self.chunks}" if self.chunks > 1 else "--stages"
                raise OptionError(
                    f"{option}: chunks of layers are of a pipeline's stages. Use a mesh with pp=2 or more."
                )
            return
        if self.runs(m):
            return
        if self.schedule is Schedule.ONE_F_ONE_B:
            raise OptionError(
                f"--schedule {self.schedule}: {p} stages need at least as many micro-batches, and "
                f"--accumulation is {m}. Use --accumulation {p} or more, or --schedule {Schedule.GPIPE}."
            )
        rounds = self._rounds(m)
        raise OptionError(
            f"--schedule {self.schedule}: takes micro-batches in rounds of {p} stages, and {m} can't be "
            f"dealt to {rounds} equal ones. Use --accumulation {rounds * p} or {(rounds + 1) * p}."
        )

    def turns(self, stage: int, micro_batches: int) -> tuple[Turn, ...]:
        """What a stage runs, in order."""
        if self.schedule is Schedule.INTERLEAVED:
            return tuple(self._interleaved(stage, micro_batches))
        ahead = micro_batches
        if self.schedule is Schedule.ONE_F_ONE_B:
            ahead = min(micro_batches, self.stages - stage)
        turns = [Turn(stage, index, False) for index in range(ahead)]
        for index in range(micro_batches):
            turns.append(Turn(stage, index, True))
            if ahead + index < micro_batches:
                turns.append(Turn(stage, ahead + index, False))
        return tuple(turns)

    def _interleaved(self, stage: int, micro_batches: int) -> Iterator[Turn]:
        p, v, m = self.stages, self.chunks, micro_batches
        in_a_row = m // max(1, m // p)
        ahead = min((v - 1) * in_a_row + 2 * (p - 1 - stage), m * v)
        done: Counter[tuple[int, bool]] = Counter()

        def turn(chunk: int, backward: bool) -> Turn:
            key = (chunk, backward)
            done[key] += 1
            return Turn(chunk * p + stage, done[key] - 1, backward)

        for step in range(m * v + ahead):
            if step < m * v:
                yield turn(step // in_a_row % v, False)
            if step >= ahead:
                yield turn(v - 1 - (step - ahead) // in_a_row % v, True)


def even_counts(n_layers: int, parts: int) -> tuple[int, ...]:
    """Layers of each part: even, and what is left over goes to the middle, since the ends hold embedding and
    head."""
    base, extra = divmod(n_layers, parts)
    order = sorted(range(parts), key=lambda part: abs(part - (parts - 1) / 2))
    return tuple(base + (part in order[:extra]) for part in range(parts))


def recomputed_spans(
    spans: Sequence[Span], recomputed: int | None, model: str = "the model"
) -> tuple[Span, ...]:
    """The layers of each part that run again in the backward, where `recomputed` of all layers do (None: all
    of them). Raises OptionError for more layers than there are."""
    n_layers = sum(span.count for span in spans)
    if recomputed is None:
        return tuple(spans)
    if not 1 <= recomputed <= n_layers:
        raise OptionError(
            f"--recompute-layers {recomputed}: {model} has {n_layers} layers. Use 1 to {n_layers}, or leave "
            "it out for all of them."
        )
    return tuple(Span(span.first, -(-span.count * recomputed // n_layers)) for span in spans)


@lru_cache(65536)
def fewest_recomputed(pipeline: Pipeline, n_layers: int, at_least: int, stage: int | None = None) -> int:
    """The fewest of a model's layers that can be asked for (recomputed_spans()), so that at least so many run
    again: of the model's, or of a stage's. All of them, where no fewer do."""
    spans = pipeline.spans(n_layers)
    parts = range(len(spans)) if stage is None else pipeline.parts_of(stage)

    def again(recomputed: int) -> int:
        found = recomputed_spans(spans, recomputed)
        return sum(found[part].count for part in parts)

    return 1 + bisect_left(range(1, n_layers), at_least, key=again)


def recomputed_of_fewer(recomputed: int | None, n_layers: int, fewer: int) -> int | None:
    """In a model of `fewer` layers that stands for one of n_layers: the same share, and both kinds of layers
    where there are both."""
    if recomputed is None or fewer >= n_layers:
        return recomputed
    if recomputed >= n_layers:
        return fewer
    return max(1, min(-(-fewer * recomputed // n_layers), fewer - 1))


def most_in_flight(turns: Sequence[Turn]) -> int:
    """Micro-batches of its parts of which a stage holds activations at once, at most."""
    held = most = 0
    for turn in turns:
        held += -1 if turn.backward else 1
        most = max(most, held)
    return most


def counts_of(stages: str) -> tuple[int, ...]:
    """`3,5,5,3`; empty for a rule's name. Raises OptionError."""
    if stages in (EVEN, BALANCED):
        return ()
    counts = [part.strip() for part in stages.split(",")]
    if not all(part.isdecimal() for part in counts):
        raise OptionError(
            f'--stages is "{stages[:80]}". Use {EVEN}, {BALANCED}, or a count of layers for each stage, such '
            "as 3,5,5,3."
        )
    return tuple(int(part) for part in counts)
