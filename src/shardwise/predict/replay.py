"""Storages of a traced step, born and gone in the caching allocator, step after step until it takes no more:
what it reserves.

    start      parameters: each rank fills its shards, or Shardwise's own ranks whole ones (Filling)
    step       gradients of the last step go; forward and backward of each micro-batch, two of them, for later
               ones do the same (of a stage: its turns in the schedule); what runs once
    first step the optimizer's state comes at its first op: of each parameter a step's number and the moments
    matmuls    the thread of the forward and the one of the backward each have a handle of the library, and a
               handle has a workspace from its first matmul on

Sources: torch.optim.AdamW; PyTorch's aten/src/ATen/cuda/CublasHandlePool.cpp (a handle a thread, a workspace
a handle and stream); torch.distributed.fsdp's FSDPParam (a shard is a copy, and the whole goes once its group
is through). What it doesn't know: what allocator.py doesn't.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import prod

from shardwise.core.dtype import DTYPE_BYTES
from shardwise.core.layer_name import layer_index
from shardwise.core.mesh import SHARDS_AXIS, Mesh, Role, role_of
from shardwise.core.pipeline import Pipeline
from shardwise.core.placement import Shard
from shardwise.core.plan import NO_ENGINE
from shardwise.core.prediction import Filling, Precision, Setup
from shardwise.core.program import Holding, MemoryKind, Program
from shardwise.predict.allocator import CachingAllocator, Piece
from shardwise.predict.changes import scales_of
from shardwise.predict.groups import group_of
from shardwise.predict.script import Act, Event, Script, Section, script_of
from shardwise.predict.stage_memory import StagePart

MOST_STEPS = 8
OUTSIDE = 10**9  # of the layers: FSDP's last unit
DRAWN = 4  # bytes of an entry of what is drawn in float32
MASTER = 2  # bytes in float32 for each traced one of half precision

_Shared = tuple[Piece, set[int]]  # a storage, and the micro-batches that use it
_Pass = tuple[int, int, Section]


@dataclass(frozen=True, slots=True)
class Replayed:
    """Bytes that the allocator holds at most, and has in use (rounded) in the last step; how often a step
    finds the device full and gives back what is free; whether it lacks room even then."""

    reserved_bytes: int
    active_bytes: int
    given_back: int
    is_short: bool


def replayed(
    program: Program,
    setup: Setup,
    part: StagePart | None = None,
    *,
    workspace_bytes: float = 0.0,
    capacity_bytes: float | None = None,
) -> Replayed:
    """part: of a pipeline; None: all of the model. workspace_bytes: of a handle of the library that
    multiplies. capacity_bytes: of the device, for tensors; None: without end."""
    run = _Run(program, setup, part, int(workspace_bytes), capacity_bytes)
    allocator = run.allocator
    run.start()
    before, retries = -1, 0
    for number in range(MOST_STEPS):
        retries = allocator.retries
        allocator.peak_active_bytes = allocator.active_bytes
        run.step()
        if number and allocator.reserved_bytes == before:
            break
        before = allocator.reserved_bytes
    return Replayed(
        allocator.peak_reserved_bytes,
        allocator.peak_active_bytes,
        allocator.retries - retries,
        bool(allocator.overdrawn),
    )


class _Run:
    """Of one rank."""

    def __init__(
        self,
        program: Program,
        setup: Setup,
        part: StagePart | None,
        workspace_bytes: int,
        capacity_bytes: float | None,
    ) -> None:
        self.allocator = CachingAllocator(setup.allocator, capacity_bytes)
        self._program, self._setup, self._part = program, setup, part
        self._scales = scales_of(program, setup)
        self._workspace_bytes = workspace_bytes
        self._holdings = [each for each in program.holdings if part is None or part.holds(each)]
        self._scripts, self._passes = _passes(program, setup, part)
        self._last = max(micro_batch for _, micro_batch, _ in self._passes)
        self._has_state = False
        self._with_workspace: set[Section] = set()
        self._gradients: list[Piece] = []
        self._live: defaultdict[tuple[int, int], dict[int, Piece]] = defaultdict(dict)
        self._shared: defaultdict[int, dict[int, _Shared]] = defaultdict(dict)
        self._held: set[tuple[int, int]] = set()

    def start(self) -> None:
        """What lives from step to step, and what is made on the way to it."""
        shards = self._bytes_of(MemoryKind.PARAMETER)
        if self._setup.filled is Filling.WHOLE:
            _fill(self.allocator, self._program, list(zip(self._holdings, shards, strict=True)))
        else:
            for n_bytes in shards:
                self._keep(n_bytes)
        for kind in (MemoryKind.BUFFER, MemoryKind.INPUT):
            self._keep(self._program.held(kind))
        if self._setup.precision is Precision.MASTER:
            for kind, pieces in ((MemoryKind.GRADIENT, 1), (MemoryKind.OPTIMIZER, 3)):
                for holding in self._holdings:
                    for _ in range(pieces):
                        self._keep(self._size(holding.parameter_bytes * MASTER, kind))
            self._has_state = True
        if self._part is not None and self._part.received_bytes:
            count = self._setup.micro_batches
            for _ in range(count):
                self._keep(self._part.received_bytes // count)

    def step(self) -> None:
        for piece in self._gradients:
            self.allocator.free(piece)
        self._gradients, self._held = [], set()
        for n_bytes in self._found_gradients():
            self._gradients.append(self.allocator.allocate(n_bytes))
        for chunk, micro_batch, section in self._passes:
            self._play(self._scripts[chunk].sections[section], section, chunk, micro_batch)
        for live in self._live.values():
            for piece in live.values():
                self.allocator.free(piece)
        for shared in self._shared.values():
            for piece, _ in shared.values():
                self.allocator.free(piece)
        self._live.clear()
        self._shared.clear()

    def _found_gradients(self) -> Iterator[int]:
        """Of a tied parameter, the other end's; and where FSDP reduces once, whole ones."""
        if self._part is not None and self._part.tied_bytes:
            yield self._part.tied_bytes
        settings = self._program.settings
        if self._setup.micro_batches > 1 and settings.reduce_once:
            ranks = group_of(SHARDS_AXIS, self._program, self._setup).size
            width = DTYPE_BYTES[settings.reduced_dtype] / DTYPE_BYTES[settings.dtype]
            for holding in self._holdings:
                yield max(1, int(self._size(holding.gradient_bytes, MemoryKind.GRADIENT) * ranks * width))

    def _play(self, events: Sequence[Event], section: Section, chunk: int, micro_batch: int) -> None:
        allocate, free = self.allocator.allocate, self.allocator.free
        live, shared = self._live[chunk, micro_batch], self._shared[chunk]
        for act, number, n_bytes, stream in events:
            if act is Act.COMES:
                live[number] = allocate(n_bytes, stream)
            elif act is Act.GOES:
                if number in shared:
                    self._let_go(shared, number, micro_batch)
                elif number in live:
                    free(live.pop(number))
            elif act is Act.GRADIENT:
                piece = allocate(n_bytes, stream)
                if (chunk, number) in self._held:  # it is added to what is there
                    free(piece)
                else:
                    self._held.add((chunk, number))
                    self._gradients.append(piece)
            elif act is Act.SHARED:
                if number not in shared:
                    shared[number] = allocate(n_bytes, stream), set()
                shared[number][1].add(micro_batch)
            elif act is Act.STAYS:
                if micro_batch == self._last:
                    free(shared.pop(number)[0])
            elif act is Act.MATMUL:
                if section not in self._with_workspace:
                    self._with_workspace.add(section)
                    self._keep(self._workspace_bytes)
            else:
                self._make_state()

    def _let_go(self, shared: dict[int, _Shared], number: int, micro_batch: int) -> None:
        piece, users = shared[number]
        users.discard(micro_batch)
        if not users:
            del shared[number]
            self.allocator.free(piece)

    def _make_state(self) -> None:
        if self._has_state:
            return
        self._has_state = True
        for holding in self._holdings:
            n_bytes, each = holding.optimizer_bytes, holding.parameter_bytes
            moments, rest = divmod(n_bytes, each) if each else (0, 0)
            self._keep(rest)
            for _ in range(moments):
                self._keep(self._size(each, MemoryKind.OPTIMIZER))

    def _bytes_of(self, kind: MemoryKind) -> list[int]:
        return [self._size(holding.parameter_bytes, kind) for holding in self._holdings]

    def _size(self, n_bytes: float, kind: MemoryKind) -> int:
        return int(n_bytes * self._scales.get(kind, 1.0))

    def _keep(self, n_bytes: int) -> None:
        if n_bytes:
            self.allocator.allocate(n_bytes)


def _passes(
    program: Program, setup: Setup, part: StagePart | None
) -> tuple[dict[int, Script], tuple[_Pass, ...]]:
    """Scripts by chunk, and (chunk, micro-batch, section) in order."""
    if part is None:
        scripts = {0: script_of(program, setup)}
        each = [
            (0, number, section)
            for number in range(min(2, setup.micro_batches))
            for section in (Section.FORWARD, Section.BACKWARD)
        ]
        return scripts, (*each, (0, each[-1][1], Section.END))
    pipeline = setup.pipeline()
    parts = pipeline.parts_of(part.stage)
    scripts = {
        chunk: script_of(program, setup, part.of_chunk(chunk, at, pipeline.parts))
        for chunk, at in enumerate(parts)
    }
    turns = pipeline.turns(part.stage, _enough(pipeline, setup.micro_batches))
    passes = [
        (parts.index(turn.part), turn.micro_batch, Section.BACKWARD if turn.backward else Section.FORWARD)
        for turn in turns
    ]
    chunk, micro_batch, _ = passes[-1]
    return scripts, (*passes, (chunk, micro_batch, Section.END))


def _enough(pipeline: Pipeline, micro_batches: int) -> int:
    """Micro-batches after which a stage does nothing new; of a schedule that runs all forwards first, all."""
    fewer = 2 * pipeline.stages
    return fewer if fewer < micro_batches and pipeline.is_steady and pipeline.runs(fewer) else micro_batches


def _fill(allocator: CachingAllocator, program: Program, shards: Sequence[tuple[Holding, int]]) -> None:
    """As step/build.py does: one whole parameter after the other, drawn in float32 and cast, of which a rank
    of other axes than FSDP's keeps a copy of its part; then FSDP, layer by layer, makes its shards."""
    filled = [(_filled(allocator, program, holding), holding, n_bytes) for holding, n_bytes in shards]
    if Mesh(program.axes).fsdp == 1:
        return
    prefix = program.layers[0] if program.layers is not None else None

    def layer_of(row: tuple[Piece, Holding, int]) -> int:
        index = layer_index(row[1].name, prefix)
        return OUTSIDE if index is None else index

    for _, group in groupby(sorted(filled, key=layer_of), layer_of):
        unit = list(group)
        for _, _, n_bytes in unit:
            if n_bytes:
                allocator.allocate(n_bytes)
        for whole, _, _ in unit:
            allocator.free(whole)


def _filled(allocator: CachingAllocator, program: Program, holding: Holding) -> Piece:
    """What a parameter is before FSDP cuts it."""
    entries, width = prod(holding.shape), DTYPE_BYTES[holding.dtype]
    drawn = width if len(holding.shape) < 2 else DRAWN
    whole = allocator.allocate(max(1, entries * drawn))
    if drawn != width:
        cast = allocator.allocate(max(1, entries * width))
        allocator.free(whole)
        whole = cast
    if program.engine == NO_ENGINE:
        return whole
    ranks = prod(
        size
        for (name, size), placement in zip(program.axes, holding.placement, strict=False)
        if isinstance(placement, Shard) and role_of(name) is not Role.SHARDS_PARAMETERS
    )
    part = allocator.allocate(max(1, entries * width // ranks))
    allocator.free(whole)
    return part
