"""Program: what one rank runs in one training step, as data: ops, collectives and changes of memory, in
order. Standard library only.

A program is a row of blocks. A block that stands for several equal layers holds the items of one of them;
`items()` gives the whole step. Its parameters and optimizer state exist before the first item: the step is
one after the first.

    FLOPs         a matmul of [m, k] and [k, n] counts 2 m k n; attention counts its two (backward: five)
                  matmuls, half where causal; a triangular solve of [n, n] and [n, k] counts n n k; all else
                  counts 0, being bound by memory
    read, write   bytes of the tensors that an op takes and makes, each once; a look-up reads the rows that it
                  takes, not the table
    memory        bytes of storages as tensors hold them, and of what an op that is several kernels makes in
                  between (trace/inner.py); what else a kernel needs for itself while it runs is not seen

What this file does not know: time, and what an allocator adds (rounding, fragmentation).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum

from shardwise.core.case import StepSettings
from shardwise.core.collective import CollectiveCall
from shardwise.core.dtype import DTYPE_BYTES
from shardwise.core.layer_name import moved_name
from shardwise.core.placement import Placement
from shardwise.core.rule import ModuleKind, RuleRef

LOSS_MODULE = "(loss)"
"""What stands for a module where the loss asked."""
REPLICATED_PARAMETERS = "replicated parameters"
"""What stands for a module where the gradients of all parameters that every rank holds whole are summed in
one go."""


class Phase(StrEnum):
    """What a step is doing. recompute: a forward that runs again in the backward; reduce: gradients over
    whole replicas."""

    FORWARD = "forward"
    LOSS = "loss"
    BACKWARD = "backward"
    RECOMPUTE = "recompute"
    REDUCE = "reduce"
    CLIP = "clip"
    OPTIMIZER = "optimizer"


AFTER_THE_BACKWARD = "what is called after the backward"
"""Phase.REDUCE in words, where something fails in it."""
# the parts of a step: a micro-batch's passes, what runs once for all of them, and where layers run
FORWARDS = (Phase.FORWARD, Phase.LOSS)
BACKWARDS = (Phase.BACKWARD, Phase.RECOMPUTE)
ONCE = (Phase.REDUCE, Phase.CLIP, Phase.OPTIMIZER)
IN_LAYERS = (Phase.FORWARD, *BACKWARDS)


class OpKind(StrEnum):
    """What bounds an op: matmul and attention by arithmetic, the others by memory. unknown: not in the
    catalogue of ops."""

    MATMUL = "matmul"
    ATTENTION = "attention"
    EMBEDDING = "embedding"
    NORM = "norm"
    SOFTMAX = "softmax"
    ELEMENTWISE = "elementwise"
    REDUCTION = "reduction"
    INDEX = "index"
    COPY = "copy"
    FILL = "fill"
    OPTIMIZER = "optimizer"
    UNKNOWN = "unknown"


class MemoryKind(StrEnum):
    """What a storage is for. activation: made in forward or loss and needed by the backward; temporary:
    everything else that comes and goes; workspace: what a library keeps for itself, which a forecast knows
    and no trace sees."""

    PARAMETER = "parameter"
    GRADIENT = "gradient"
    OPTIMIZER = "optimizer"
    BUFFER = "buffer"
    INPUT = "input"
    ACTIVATION = "activation"
    TEMPORARY = "temporary"
    WORKSPACE = "workspace"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor as one rank sees it."""

    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


@dataclass(frozen=True, slots=True)
class Op:
    """One kernel launch, or one call that makes several. `on_host`: works on tensors that lie on the host
    although the device is another."""

    name: str
    kind: OpKind
    phase: Phase
    module: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    flops: int
    read_bytes: int
    write_bytes: int
    on_host: bool = False


@dataclass(frozen=True, slots=True)
class ByData:
    """Wire bytes of a collective whose splits the data decides: over all ranks for this batch, and the most
    that any batch could need. expert_load: a router decides, of which a trace knows nothing, and the busiest
    rank's experts are taken to get so many times the mean rank's tokens (1: all get equally many); it takes
    or sends max_bytes."""

    mean_bytes: float
    max_bytes: float
    max_rank: int
    bound_bytes: float
    expert_load: float | None = None


@dataclass(frozen=True, slots=True)
class Collective:
    """One collective: the call, the module that caused it and what that is, the rule there, and the change of
    placement.

    None: nobody told. by_data is None where shapes alone decide what is sent. reason: what its style says of
    it, where the placements don't say all. again: so many collectives before it the same tensor was gathered
    (1: by the one right before). added_to: so many before it is the one to whose sum its own is added, before
    anything is computed with either.
    """

    call: CollectiveCall
    module: str
    rule: RuleRef | None = None
    before: Placement | None = None
    after: Placement | None = None
    by_data: ByData | None = None
    module_kind: ModuleKind | None = None
    reason: str | None = None
    again: int | None = None
    added_to: int | None = None

    @property
    def phase(self) -> Phase:
        return Phase(self.call.phase)

    @property
    def is_many(self) -> bool:
        """Whether it is about more than one number, as a loss or a norm is."""
        return self.call.payload_bytes > DTYPE_BYTES.get(self.call.dtype, 8)


@dataclass(frozen=True, slots=True)
class MemoryChange:
    """A storage that comes (n_bytes > 0) or goes (n_bytes < 0). maker: the op, collective or call that made
    it, in `module`. stream: that it was made on, numbered as they were first used; 0 is the one that
    computes. nth: of one that goes, which of those that live and are alike but for their sizes: counted from
    the eldest (0), or from the youngest (-1), where that is nearer. is_shard: as large as what this rank has
    of FSDP's shards, and so smaller where more ranks share them. is_gathered: parameters that FSDP gathered,
    which all micro-batches that are in flight use."""

    n_bytes: int
    kind: MemoryKind
    phase: Phase
    module: str
    maker: str
    stream: int = 0
    nth: int = 0
    is_shard: bool = False
    is_gathered: bool = False


Item = Op | Collective | MemoryChange


@dataclass(frozen=True, slots=True)
class Block:
    """Items, standing for `times` equal stretches: each further one is `stride` layers of `prefix` away
    (`layers.1`, `layers.2`, ...)."""

    items: tuple[Item, ...]
    times: int = 1
    prefix: str | None = None
    stride: int = 1

    def __iter__(self) -> Iterator[Item]:
        yield from self.items
        for repeat in range(1, self.times):
            yield from (moved(item, self.prefix, self.stride * repeat) for item in self.items)


def moved(item: Item, prefix: str | None, by: int) -> Item:
    """The same item in the layer that comes `by` layers later."""
    module = moved_name(item.module, prefix, by)
    return item if module == item.module else replace(item, module=module)


@dataclass(frozen=True, slots=True)
class Holding:
    """One parameter and what this rank keeps of it. grad_placement and grad_shape are those that the
    optimizer meets (None: no gradient).

    Placements are by mesh axis, in the mesh's order; a parameter that is no DTensor is Replicate on all axes.
    `shared`: a tied parameter's other names. is_outer: whether it is an embedding's or the head's.
    """

    name: str
    module: str
    dtype: str
    shape: tuple[int, ...]
    local_shape: tuple[int, ...]
    placement: tuple[Placement, ...]
    parameter_bytes: int
    grad_shape: tuple[int, ...] | None
    grad_placement: tuple[Placement, ...] | None
    gradient_bytes: int
    optimizer_bytes: int
    rule: RuleRef | None = None
    shared: tuple[str, ...] = ()
    module_kind: ModuleKind | None = None
    is_outer: bool = False

    @property
    def is_sharded(self) -> bool:
        return self.local_shape != self.shape


@dataclass(frozen=True, slots=True)
class RuleUse:
    """A rule of the plan and the modules (of another library's also the parameters) that it holds for.
    arguments: of its style, as a plan's reader writes them."""

    pattern: str
    style: str
    modules: tuple[str, ...]
    arguments: str = ""

    @property
    def rule(self) -> RuleRef:
        return RuleRef(self.pattern, self.style)

    def __str__(self) -> str:
        return f"{self.style}({self.arguments})" if self.arguments else self.style


@dataclass(frozen=True, slots=True)
class StageShare:
    """What a stage of a pipeline holds. layers: (first, count) of each of its chunks. parameters: of the
    whole model's, a tied one on both ends. parameter_bytes: of one rank there, which has the largest shards.
    in_flight: micro-batches of which it holds activations at once, each chunk's counted."""

    stage: int
    layers: tuple[tuple[int, int], ...]
    parameters: int
    parameter_bytes: int
    in_flight: int


@dataclass(frozen=True, slots=True)
class Program:
    """The step of one rank. device: the type whose ops these are. resident: what lives before the first item,
    by kind.

    axes: (name, size) of the mesh. layers: (prefix, count) of the repeated layers; None where the model has
    none. compressed: whether equal layers were traced once. stages: of the pipeline, where there is one.
    notes: what a reader must know, in words.
    """

    model: str
    plan: str
    engine: str
    device: str
    rank: int
    axes: tuple[tuple[str, int], ...]
    settings: StepSettings
    parameters: int
    blocks: tuple[Block, ...]
    holdings: tuple[Holding, ...]
    rules: tuple[RuleUse, ...]
    resident: tuple[tuple[MemoryKind, int], ...]
    layers: tuple[str, int] | None = None
    compressed: bool = False
    notes: tuple[str, ...] = ()
    stages: tuple[StageShare, ...] = ()

    def items(self) -> Iterator[Item]:
        """Every item of the step, in order."""
        for block in self.blocks:
            yield from block

    def kinds_of_items(self) -> Iterator[Item]:
        """Every item of the step but those of further layers, which are like the first's."""
        for block in self.blocks:
            yield from block.items

    def ops(self) -> Iterator[Op]:
        return (item for item in self.items() if isinstance(item, Op))

    def collectives(self) -> Iterator[Collective]:
        return (item for item in self.items() if isinstance(item, Collective))

    def held(self, kind: MemoryKind) -> int:
        """Bytes of parameters, gradients or optimizer state that this rank keeps, exactly."""
        match kind:
            case MemoryKind.PARAMETER:
                return sum(holding.parameter_bytes for holding in self.holdings)
            case MemoryKind.GRADIENT:
                return sum(holding.gradient_bytes for holding in self.holdings)
            case MemoryKind.OPTIMIZER:
                return sum(holding.optimizer_bytes for holding in self.holdings)
            case _:
                return dict(self.resident).get(kind, 0)


@dataclass(frozen=True, slots=True)
class Holder:
    """Storages that are alike and live at one moment: `count` of them, `n_bytes` together."""

    kind: MemoryKind
    phase: Phase
    module: str
    maker: str
    n_bytes: int
    count: int


@dataclass(frozen=True, slots=True)
class MemoryPeak:
    """The moment at which a rank holds most: total bytes, by kind, what lives (largest first), and what it
    was doing (phase, module, op)."""

    n_bytes: int
    by_kind: tuple[tuple[MemoryKind, int], ...]
    holders: tuple[Holder, ...]
    phase: Phase
    module: str
    doing: str


def memory_peak(program: Program) -> MemoryPeak:
    """The peak over the step, from its MemoryChanges on top of what is resident."""
    live = best = sum(n_bytes for _, n_bytes in program.resident)
    at: MemoryChange | None = None
    best_index = -1
    items = list(program.items())
    for index, item in enumerate(items):
        if isinstance(item, MemoryChange):
            live += item.n_bytes
            if live > best:
                best, best_index, at = live, index, item
    holders = _live_at(items[: best_index + 1])
    by_kind: dict[MemoryKind, int] = dict(program.resident)
    for holder in holders:
        by_kind[holder.kind] = by_kind.get(holder.kind, 0) + holder.n_bytes
    kinds = tuple((kind, by_kind[kind]) for kind in MemoryKind if by_kind.get(kind))
    phase, module, doing = (at.phase, at.module, at.maker) if at is not None else (Phase.FORWARD, "", "")
    return MemoryPeak(best, kinds, holders, phase, module, doing)


def _live_at(items: list[Item]) -> tuple[Holder, ...]:
    totals: dict[tuple[MemoryKind, Phase, str, str], list[int]] = {}
    for item in items:
        if isinstance(item, MemoryChange):
            entry = totals.setdefault((item.kind, item.phase, item.module, item.maker), [0, 0])
            entry[0] += item.n_bytes
            entry[1] += 1 if item.n_bytes > 0 else -1
    found = [Holder(*key, n_bytes, count) for key, (n_bytes, count) in totals.items() if n_bytes > 0]
    return tuple(sorted(found, key=lambda holder: -holder.n_bytes))
