"""What is traced: the model as it was made, whole and unsharded, which of its layers this rank runs, and
which of them run again in the backward. A process that does nothing but trace keeps the last one."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

from torch import nn

from shardwise.core.pipeline import Pipeline, Span, recomputed_of_fewer, recomputed_spans
from shardwise.core.program import RuleUse
from shardwise.models.layers import Layers, find_layers
from shardwise.models.source import ModelSource
from shardwise.parallel.any_plan import check_any
from shardwise.parallel.ends import check_spans
from shardwise.trace.job import Job, rules_of


@dataclass(frozen=True, slots=True)
class Subject:
    """spans: of layers that this rank runs. again: numbers of those that run again in the backward.
    parameters: of the model."""

    model: nn.Module
    layers: Layers | None
    spans: tuple[Span, ...]
    again: frozenset[int]
    rules: tuple[RuleUse, ...]
    parameters: int


class Subjects:
    """The last one of which only copies ran, in a process that keeps it."""

    def __init__(self) -> None:
        self._are_kept = False
        self._last: tuple[ModelSource, Hashable, Subject] | None = None

    def keep(self, are_kept: bool = True) -> None:
        """From now on; False: the last is forgotten, and none is kept any more."""
        self._are_kept = are_kept
        if not are_kept:
            self._last = None

    def note(self, job: Job, subject: Subject) -> None:
        """One whose model is as it was made, but for equal layers that were left out."""
        if self._are_kept and job.ends is None:
            self._last = job.source, _all_but_the_batch(job), subject

    def find(self, job: Job) -> Subject | None:
        """One that differs in the batch and in recompute alone."""
        if self._last is None:
            return None
        source, asked, subject = self._last
        return subject if source is job.source and asked == _all_but_the_batch(job) else None


subjects = Subjects()


def _all_but_the_batch(job: Job) -> Hashable:
    return job.plan, job.mesh, replace(job.settings, batch=1, recompute="none", recompute_layers=None)


def subject_of(job: Job, depth: int | None, dealt: Pipeline | None, *, may_be_short: bool) -> Subject:
    """depth, dealt: as trace() takes them. may_be_short: whether equal layers may be left out of its model.
    Raises the InputErrors of a plan, mesh and step that can't be."""
    recomputed = job.settings.recompute_layers
    kept = subjects.find(job) if depth is None and may_be_short else None
    if kept is not None:
        return replace(kept, again=_again(job, kept.layers, kept.spans, recomputed, dealt))
    model = job.build()
    layers = find_layers(model)
    if depth is not None and layers is not None and depth < layers.count:
        recomputed = recomputed_of_fewer(recomputed, layers.count, depth)
        layers.shorten(model, depth)
        layers = find_layers(model)
    check_any(job.source, model, job.plan, job.mesh, job.settings.seq)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    spans = _spans(job, model, layers)
    again = _again(job, layers, spans, recomputed, dealt)
    return Subject(model, layers, spans, again, rules_of(job.plan, model), parameters)


def _spans(job: Job, model: nn.Module, layers: Layers | None) -> tuple[Span, ...]:
    """Raises OptionError and ModelError for stages that can't be."""
    pipeline = job.settings.pipeline(job.mesh)
    pipeline.check(job.settings.accumulation)
    if layers is None:
        return ()
    if job.ends is None:
        return (Span(0, layers.count),)
    spans = pipeline.spans(layers.count, job.source.name)
    check_spans(model, job.ends, spans)
    return tuple(spans[part] for part in pipeline.parts_of(job.stage))


def _again(
    job: Job, layers: Layers | None, spans: Sequence[Span], recomputed: int | None, dealt: Pipeline | None
) -> frozenset[int]:
    if layers is None or job.settings.recompute == "none":
        return frozenset()
    parts = (dealt or job.settings.pipeline(job.mesh)).spans(layers.count, job.source.name)
    chosen = recomputed_spans(parts, recomputed, job.source.name)
    own = {number for span in spans for number in span.indices}
    return frozenset(number for span in chosen for number in span.indices) & own
