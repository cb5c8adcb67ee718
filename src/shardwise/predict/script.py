"""A traced step's storages as a script for an allocator: what comes, what goes, which is which, in the sizes
of a setup. Equal layers are unfolded, for what an allocator has free differs from layer to layer.

A storage that goes is found by what it is (kind, maker, module) and which of those alike it was
(MemoryChange.nth). One of which only the end is here, such as what another stage made, is passed over.
"""

from collections import defaultdict
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from enum import IntEnum

from shardwise.core.layer_name import layer_index, moved_name
from shardwise.core.prediction import Precision, Setup
from shardwise.core.program import (
    BACKWARDS,
    ONCE,
    Block,
    Item,
    MemoryChange,
    MemoryKind,
    Op,
    OpKind,
    Phase,
    Program,
)
from shardwise.predict.changes import Place, counts, fused_loss, scales_of
from shardwise.predict.groups import further_shards
from shardwise.predict.stage_memory import STATES, StagePart

NOWHERE = -1  # the number of what this setup or stage doesn't have


class Section(IntEnum):
    """Of a traced step: a micro-batch's forward and backward, and what runs once."""

    FORWARD = 0
    BACKWARD = 1
    END = 2


class Act(IntEnum):
    """What happens. COMES: a storage; GRADIENT: a parameter's; SHARED: one that serves all micro-batches that
    are in flight, such as parameters that FSDP has gathered. STAYS: one of these goes, but with the last
    micro-batch. MATMUL: the section's first one; OPTIMIZER: its first op."""

    COMES = 0
    GRADIENT = 1
    SHARED = 2
    GOES = 3
    STAYS = 4
    MATMUL = 5
    OPTIMIZER = 6


Event = tuple[Act, int, int, int]
"""(what happens, a storage's number in the script, its bytes, the stream that it is made on); 0 where it has
none. Plain tuples: a replay goes through hundreds of thousands."""


@dataclass(frozen=True, slots=True)
class Script:
    """Events by section."""

    sections: tuple[list[Event], ...] = field(default_factory=lambda: tuple([] for _ in Section))


def script_of(program: Program, setup: Setup, part: StagePart | None = None) -> Script:
    """part: only what this stage has."""
    return _Writer(program, setup, part).written()


class _Writer:
    def __init__(self, program: Program, setup: Setup, part: StagePart | None) -> None:
        self._program, self._setup, self._part = program, setup, part
        self._prefix = program.layers[0] if program.layers is not None else None
        self._scales = scales_of(program, setup)
        if setup.precision is Precision.MASTER:  # states are kept elsewhere, and all the time
            self._scales |= dict.fromkeys(STATES, 0.0)
        self._shards = 1 / further_shards(program, setup)
        self._fused = fused_loss(program) if setup.compiled_loss else {}
        self._script = Script()
        self._section = Section.FORWARD
        self._marks: set[tuple[Section, Act]] = set()
        self._living: defaultdict[Hashable, list[int]] = defaultdict(list)
        self._count = 0

    def written(self) -> Script:
        for place, block in enumerate(self._program.blocks):
            order = self._part.in_order(block) if self._part is not None else range(len(block.items))
            rows = [
                (at, item, self._layer(item), self._what(item))
                for at, item in ((at, block.items[at]) for at in order)
                if not isinstance(item, MemoryChange) or counts(item, self._setup)
            ]
            for repeat, shares in enumerate(self._shares_of(block)):
                for at, item, layer, what in rows:
                    share = 1.0 if shares is None else shares[at]
                    by = 0 if layer is None else layer + repeat * block.stride
                    self._add((place, at), item, (by, what), share)
        return self._script

    def _shares_of(self, block: Block) -> Iterator[list[float] | None]:
        """For each repeat, how much of each item is here; None: all."""
        if self._part is None:
            yield from [None] * block.times
            return
        for shares, times in self._part.stretches(block):
            yield from [shares.tolist()] * times

    def _layer(self, item: Item) -> int | None:
        return layer_index(item.module, self._prefix)

    def _what(self, item: Item) -> Hashable:
        """Of a change, whatever its layer and size: its storage's maker."""
        if not isinstance(item, MemoryChange):
            return None
        index = self._layer(item)
        module = item.module if index is None else moved_name(item.module, self._prefix, -index)
        return item.kind, item.phase, module, item.maker, item.stream

    def _add(self, place: Place, item: Item, key: Hashable, share: float) -> None:
        if not isinstance(item, MemoryChange):
            self._note(item)
            return
        if item.n_bytes < 0:
            alike = self._living[key]
            if alike:
                at = item.nth if -len(alike) <= item.nth < len(alike) else 0
                number = alike.pop(at)
                if number >= 0:
                    stays = self._part is not None and self._part.stays(item)
                    is_kept = stays and self._section is not Section.FORWARD
                    self._events.append((Act.STAYS if is_kept else Act.GOES, number, 0, 0))
            return
        self._enter(item.phase)
        n_bytes = int(self._fused.get(place, item.n_bytes) * self._scale(item) * share)
        if n_bytes <= 0:  # not here, but counted among those alike
            self._living[key].append(NOWHERE)
            return
        if self._part is not None and self._part.is_gathered(item):
            act = Act.SHARED
        else:
            act = Act.GRADIENT if item.kind is MemoryKind.GRADIENT else Act.COMES
        self._events.append((act, self._count, n_bytes, item.stream))
        self._living[key].append(self._count)
        self._count += 1

    def _scale(self, change: MemoryChange) -> float:
        return self._scales.get(change.kind, self._shards if change.is_shard else 1.0)

    @property
    def _events(self) -> list[Event]:
        return self._script.sections[self._section]

    def _note(self, item: Item) -> None:
        self._enter(item.phase)
        if not isinstance(item, Op):
            return
        if item.phase is Phase.OPTIMIZER:
            self._mark(Act.OPTIMIZER)
        elif item.kind is OpKind.MATMUL:
            self._mark(Act.MATMUL)

    def _mark(self, act: Act) -> None:
        """Once a section."""
        if (self._section, act) not in self._marks:
            self._marks.add((self._section, act))
            self._events.append((act, 0, 0, 0))

    def _enter(self, phase: Phase) -> None:
        """Sections follow one another: a module's forward that runs again is in the backward."""
        section = (
            Section.END if phase in ONCE else Section.BACKWARD if phase in BACKWARDS else Section.FORWARD
        )
        self._section = max(self._section, section)
