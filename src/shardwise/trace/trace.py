"""trace(): model + plan + mesh -> Program, by running the one training step of step/ on fake tensors over a
fake process group.

What runs is the real module under the real plan, with PyTorch's autograd, DTensor, FSDP2 and AdamW; only
memory, kernels and the wire are missing. The step is one after the first: optimizer state exists. Equal
layers are traced three and four deep and extended (extend.py) where that is exact, else all of them; where a
part of them runs again in the backward, of each kind (two_kinds.py).
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace

from torch import Tensor, nn

from shardwise.core.case import StepSettings
from shardwise.core.errors import OptionError
from shardwise.core.grouped import GROUPED, load_words
from shardwise.core.mesh import Mesh
from shardwise.core.pipeline import Pipeline, Span
from shardwise.core.plan import AnyPlan, TheirPlan
from shardwise.core.program import Block, MemoryKind, Op, Program
from shardwise.models.layers import Layers, copied
from shardwise.models.source import ModelSource
from shardwise.parallel.any_plan import engine_of, name_of
from shardwise.parallel.ends import ends_of
from shardwise.parallel.experts import takes_tokens_of_experts
from shardwise.parallel.mixed import mixed_for_clipping
from shardwise.torch_private import check
from shardwise.trace.extend import LONG, SHORT, NotPeriodicError, extended
from shardwise.trace.fakes import TARGETS, fake_world
from shardwise.trace.growth import growths
from shardwise.trace.higher_order import FLEX, MASKED
from shardwise.trace.holdings import longer_holdings
from shardwise.trace.job import Job, Kept, nearest_rule
from shardwise.trace.step import Traced, run
from shardwise.trace.subject import Subject, subject_of, subjects
from shardwise.trace.two_kinds import blocks_of_two_kinds, but_for_which


def trace(
    source: ModelSource,
    plan: AnyPlan,
    mesh: Mesh,
    settings: StepSettings,
    *,
    device: str = "cpu",
    rank: int = 0,
    ids: Tensor | None = None,
    compress: bool = True,
    depth: int | None = None,
    dealt: Pipeline | None = None,
    on_model: Callable[[nn.Module], None] = lambda _: None,
    progress: Callable[[str], None] = lambda _: None,
) -> Program:
    """The Program of one rank's training step.

    ids: token ids [B, S] of the global batch on the host, B = settings.batch; by default uniform ones, drawn
    from settings.seed. They decide what routed sends and what a masked look-up meets, nothing else. compress:
    trace equal layers once. depth: trace a model of only that many of its repeated layers. dealt: where a
    part of the layers runs again, the pipeline whose parts deal them; by default the mesh's. on_model: told
    each model before its step runs, sharded and filled with fakes. device: "cpu" (as gloo ranks run it) or
    "cuda" (as NCCL ranks would). Raises the InputErrors of parallelize(), ModelError and OptionError;
    RunError inside a process group.
    """
    check()
    if device not in TARGETS:
        raise OptionError(f'device is "{device}". Allowed: {", ".join(TARGETS)}.')
    if not 0 <= rank < mesh.world_size:
        raise OptionError(f"rank {rank} is not on mesh {mesh}. Use 0 to {mesh.world_size - 1}.")
    with fake_world(mesh, rank=rank, device=device) as device_mesh:
        progress(f"building {source.name}")
        ends = ends_of(source) if mesh.stages > 1 else None
        job = Job(source, plan, mesh, settings, device, rank, ids, device_mesh, on_model, ends)
        subject = subject_of(job, depth, dealt, may_be_short=compress)
        layers = subject.layers
        if compress and layers is not None and layers.are_equal and _is_long(subject.spans):
            try:
                if 0 < len(subject.again) < sum(span.count for span in subject.spans):
                    return _from_two_kinds(_Equal(job, subject, layers, progress))
                program = _Equal(job, subject, layers, progress).program(bool(subject.again))
                if depth is None:
                    subjects.note(job, subject)
                return program
            except NotPeriodicError as reason:
                progress(f"layers don't repeat: {reason}")
                subject = replace(subject, model=job.build())
        own = sum(span.count for span in subject.spans)
        progress(f"tracing {own} layers" if layers is not None else "tracing")
        traced = run(job, subject.model, layers, nearest_rule(subject.rules), Kept(again=subject.again))
        return _program(job, subject, traced, None)


def _is_long(spans: Sequence[Span]) -> bool:
    """Whether tracing the first layers of each span tells all, and is shorter."""
    return len({span.count for span in spans}) == 1 and spans[0].count > LONG


class _Equal:
    """Programs of all of a model's equal layers, from traces of SHORT and LONG ones. The subject's model is
    cut short."""

    def __init__(self, job: Job, subject: Subject, layers: Layers, progress: Callable[[str], None]) -> None:
        self.job, self.subject, self.layers, self._progress = job, subject, layers, progress
        self._traced: dict[bool, tuple[Traced, Traced]] = {}

    @property
    def firsts(self) -> list[int]:
        """Of each row of layers."""
        return [span.first for span in self.subject.spans]

    def program(self, runs_again: bool) -> Program:
        """Where all layers run again, or none does. Raises NotPeriodicError."""
        short, long = self._both(runs_again)
        self._progress("putting the layers together")
        more = self.subject.spans[0].count - LONG
        resident = {
            kind: n_bytes + (n_bytes - short.resident.get(kind, 0)) * more
            for kind, n_bytes in long.resident.items()
        }
        holdings = longer_holdings(long.holdings, self.layers.prefix, self.firsts, more)
        blocks = self.blocks(runs_again, LONG + more)
        return _program(self.job, self.subject, Traced((), holdings, resident), blocks)

    def blocks(self, runs_again: bool, count: int) -> tuple[Block, ...]:
        """Of `count` layers in each row, at least LONG. Raises NotPeriodicError."""
        short, long = self._both(runs_again)
        return extended(short.items, long.items, self.layers.prefix, count)

    def _both(self, runs_again: bool) -> tuple[Traced, Traced]:
        if runs_again not in self._traced:
            long = self._of_one_kind(LONG, runs_again)
            prefix, is_one_row = self.layers.prefix, self.firsts == [0]
            short = growths.short_of(self.job.source, long, prefix) if is_one_row else None
            if short is None:
                short = self._of_one_kind(SHORT, runs_again)
                if is_one_row:
                    growths.note(self.job.source, short, long, prefix)
            self._traced[runs_again] = short, long
        return self._traced[runs_again]

    def _of_one_kind(self, depth: int, runs_again: bool) -> Traced:
        return self.traced(depth, [first + at for first in self.firsts for at in range(depth * runs_again)])

    def traced(self, depth: int, again: Collection[int]) -> Traced:
        """`depth` layers of each row. again: numbers of those that run again in the backward."""
        self._progress(f"tracing {depth} of {self.subject.spans[0].count} equal layers")
        model = self._model(depth)
        return run(self.job, model, self.layers, nearest_rule(self.subject.rules), Kept(depth, again))

    def _model(self, depth: int) -> nn.Module:
        """As it was made, with so many layers; over stages with all of them, which each stage leaves out by
        itself."""
        if self.job.ends is not None:
            return self.job.build()
        model = None
        if self.job.plan is not TheirPlan.OWN:
            if len(list(self.layers.modules(self.subject.model))) > LONG:
                self.layers.shorten(self.subject.model, LONG)
            model = copied(self.subject.model)
        model = model or self.job.build()
        self.layers.shorten(model, depth)
        return model


def _from_two_kinds(equal: _Equal) -> Program:
    """Where a part of the layers runs again, held to a trace of few of each kind. Raises NotPeriodicError."""
    prefix = equal.layers.prefix
    few = [first + at for first in equal.firsts for at in range(LONG // 2)]
    expected = equal.traced(LONG, few).items
    made = blocks_of_two_kinds(equal.blocks(False, LONG), equal.blocks(True, LONG), prefix, few)
    if [but_for_which(item) for block in made for item in block] != [*map(but_for_which, expected)]:
        raise NotPeriodicError("what a layer runs depends on whether the one beside it runs again")
    plain, again = equal.program(False), equal.program(True)
    return replace(again, blocks=blocks_of_two_kinds(plain.blocks, again.blocks, prefix, equal.subject.again))


def _program(job: Job, subject: Subject, traced: Traced, blocks: tuple[Block, ...] | None) -> Program:
    layers = subject.layers
    blocks, compressed = blocks or (Block(traced.items),), blocks is not None
    return Program(
        model=job.source.name,
        plan=name_of(job.plan),
        engine=engine_of(job.plan),
        device=job.device,
        rank=job.rank,
        axes=job.mesh.axes,
        settings=job.settings,
        parameters=subject.parameters,
        blocks=blocks,
        holdings=traced.holdings,
        rules=subject.rules,
        resident=tuple((kind, traced.resident[kind]) for kind in MemoryKind if kind in traced.resident),
        layers=(layers.prefix, layers.count) if layers is not None else None,
        compressed=compressed,
        notes=(*job.source.notes, *_assumed(subject.model, job.settings, blocks), *_of_its_own(job, subject)),
        stages=tuple(job.shares),
    )


def _of_its_own(job: Job, subject: Subject) -> Iterator[str]:
    """What meets who trains a model that shards itself."""
    mixed = mixed_for_clipping(subject.model) if job.plan is TheirPlan.OWN else None
    if mixed is not None:
        yield f"{mixed.subject}: {mixed.reason}."


def _assumed(model: nn.Module, settings: StepSettings, blocks: Sequence[Block]) -> Iterator[str]:
    """What was taken for granted where data decides."""
    ops = {item.name for block in blocks for item in block.items if isinstance(item, Op)}
    if GROUPED in ops or any(map(takes_tokens_of_experts, model.modules())):
        yield load_words(settings.expert_load)
    if FLEX in ops:
        yield MASKED
