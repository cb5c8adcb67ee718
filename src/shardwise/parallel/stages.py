"""A stage of a pipeline: the model's own forward over a part of its layers.

A stage keeps its layers under the whole model's names, and of what lies outside them what runs there: before
the layers on the first part, after them on the last. While a part runs, the list of layers has its own in
their places: those before stand for what came from the part before, and the first one after ends the forward
with what it is given. Modules that would run before the layers give what came too, without a gradient: the
rest of the forward makes positions and masks by its shape.

Applied after a plan, so that plans, their checks and their ties see the whole model.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shardwise.core.errors import RunError
from shardwise.core.layer_name import is_inside, layer_index
from shardwise.core.pipeline import Pipeline, Span
from shardwise.core.plan import Plan
from shardwise.parallel.apply import applied_to
from shardwise.parallel.ends import Ends, check_spans
from shardwise.parallel.styles import sharder_for
from shardwise.torch_private import modules_in, put_modules, tree_flatten

_ATTRIBUTE = "_shardwise_stage"


@dataclass(frozen=True, slots=True, eq=False)
class Stage:
    """What a rank's model was cut to. spans: of all parts, of the whole model. seq_ranks: those that each
    have a part of the sequence between layers. dtype: of what passes there. tied: names of parameters that
    both ends hold."""

    pipeline: Pipeline
    index: int
    spans: tuple[Span, ...]
    ends: Ends
    dtype: torch.dtype
    seq_ranks: int
    tied: tuple[str, ...]
    _swaps: dict[int, tuple[tuple[nn.Module, dict[str, nn.Module]], ...]]
    _call: "_Call"

    @property
    def parts(self) -> tuple[int, ...]:
        """Those that this stage runs."""
        return self.pipeline.parts_of(self.index)

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @property
    def is_last(self) -> bool:
        return self.index == self.pipeline.stages - 1

    @property
    def running(self) -> int:
        """The part that runs now, or ran last."""
        return self._call.part or 0

    @property
    def gives_logits(self) -> bool:
        """Whether the part that runs now is the model's last one."""
        return self._call.part == self.pipeline.parts - 1

    def last_layer(self, part: int) -> str:
        return f"{self.ends.layers.prefix}.{self.spans[part].stop - 1}"

    def part_of(self, name: str) -> int:
        """The part that holds a parameter of the module, by the whole model's names. What both ends hold
        counts with the first."""
        part = self._part_with(name)
        if part is not None:
            return part
        is_last = is_inside(name, self.ends.after) and not is_inside(name, self.ends.before)
        return self.pipeline.parts - 1 if is_last else 0

    def part_at(self, name: str) -> int:
        """The part that is calling a module now: of a layer its own, where it runs again in the backward
        too."""
        part = self._part_with(name)
        return part if part is not None else self.running

    def _part_with(self, name: str) -> int | None:
        index = layer_index(name, self.ends.layers.prefix)
        return next((part for part, span in enumerate(self.spans) if index in span), None)

    def units(self, model: nn.Module, part: int) -> Iterator[tuple[nn.Module, bool]]:
        """All modules that are the part's layers or lie in them (True), or that hold the layers (False)."""
        prefix, span = self.ends.layers.prefix, self.spans[part]
        for name, module in model.named_modules():
            index = layer_index(name, prefix)
            if index is None or index in span:
                yield module, index is not None

    def shape(self, ids_BS: Tensor) -> tuple[int, ...]:
        """Of what passes between layers, for a micro-batch's ids, as this rank has it."""
        batch, seq = ids_BS.shape
        return batch, seq // self.seq_ranks, self.ends.width

    def run(self, model: nn.Module, part: int, ids_BS: Tensor, received: Tensor | None) -> Tensor:
        """What a part gives: for the part after, or (the last one's) logits. Raises RunError where that isn't
        of the size that the part after awaits."""
        self._call.part, self._call.received = part, received
        try:
            given: Tensor = model(ids_BS)
        finally:
            self._call.part, self._call.received = None, None
        expected = self.shape(ids_BS)
        if part < self.pipeline.parts - 1 and (tuple(given.shape), given.dtype) != (expected, self.dtype):
            raise RunError(
                f"pipeline: {self.last_layer(part)} gives {given.dtype}{list(given.shape)} on this rank, and "
                f"the next stage awaits {self.dtype}{list(expected)}. Use a plan whose embedding and layers "
                "cut the sequence alike."
            )
        return given

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The modules of the part that runs."""
        if self._call.part is None:
            raise RunError(
                "pipeline: a stage's model needs what the stage before gives. Train it by a TrainStep, which "
                "runs the stages' schedule."
            )
        swaps = self._swaps[self._call.part]
        resting = [dict(modules_in(parent)) for parent, _ in swaps]
        for parent, modules in swaps:
            put_modules(parent, modules)
        try:
            yield
        finally:
            for (parent, _), modules in zip(swaps, resting, strict=True):
                put_modules(parent, modules)


def stage_of(model: nn.Module) -> Stage | None:
    """What cut_to_stage() made of a model; None for a whole one."""
    return getattr(model, _ATTRIBUTE, None)


def cut_to_stage(
    model: nn.Module,
    ends: Ends,
    pipeline: Pipeline,
    index: int,
    *,
    tp: int,
    dtype: torch.dtype,
    keep: int | None = None,
) -> Stage:
    """Leaves of a whole model, which a plan was applied to, what stage `index` holds. tp: ranks that a plan
    may cut the sequence over. dtype: that layers compute in. keep: only the first so many layers of each
    part. Raises OptionError for layers that can't be dealt so, ModelError for what they share."""
    layers = model.get_submodule(ends.layers.prefix)
    every = dict(modules_in(layers))
    spans = pipeline.spans(len(every), ends.model)
    check_spans(model, ends, spans)
    kept_of = [Span(span.first, min(span.count, keep or span.count)) for span in spans]
    call = _Call()
    stage = Stage(
        pipeline, index, spans, ends, dtype, _seq_ranks(model, ends, tp), _tied(model, ends), {}, call
    )
    kept = set(ends.before if stage.is_first else ()) | set(ends.after if stage.is_last else ())
    held = {parameter for name in kept for parameter in _own_parameters(model, name)}
    for name in {*ends.before, *ends.after} - kept:
        if held.isdisjoint(_own_parameters(model, name)):  # else it holds a tied parameter's other name
            _put(model, name, _Absent(name))
    own = {number: every[number] for part in stage.parts for number in map(str, kept_of[part].indices)}
    put_modules(layers, own)
    for part in stage.parts:
        running = {index: every[str(index)] for index in kept_of[part].indices}
        stage._swaps[part] = _swaps(model, layers, running, len(every), stage, part)
    _cut_forward(model, stage)
    setattr(model, _ATTRIBUTE, stage)
    return stage


def _swaps(
    model: nn.Module, layers: nn.Module, running: dict[int, nn.Module], count: int, stage: Stage, part: int
) -> tuple[tuple[nn.Module, dict[str, nn.Module]], ...]:
    """What is in place while a part runs. running: its layers, by their place among `count`."""
    call, span = stage._call, stage.spans[part]
    before, beyond = _Before(call, stage.ends.gives), _Beyond()
    every: dict[str, nn.Module] = {str(index): before for index in range(span.first)}
    every |= {str(index): layer for index, layer in running.items()}
    every |= {str(index): beyond for index in range(span.stop, count)}
    found = {id(layers): (layers, every)}
    for name in stage.ends.before if part else ():
        parent_name, _, own_name = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        _, modules = found.setdefault(id(parent), (parent, dict(modules_in(parent))))
        modules[own_name] = _Outside(call, model.get_submodule(name))
    return tuple(found.values())


def _cut_forward(model: nn.Module, stage: Stage) -> None:
    inner = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with stage.in_place():
            try:
                return inner(*args, **kwargs)
            except _LeaveError as leave:
                return leave.hidden

    model.forward = forward


def _own_parameters(model: nn.Module, name: str) -> set[nn.Parameter]:
    return set(model.get_submodule(name).parameters(recurse=False))


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, own_name = name.rpartition(".")
    modules_in(model.get_submodule(parent))[own_name] = module


def _tied(model: nn.Module, ends: Ends) -> tuple[str, ...]:
    sides = [{p for name in side for p in _own_parameters(model, name)} for side in (ends.before, ends.after)]
    both = sides[0] & sides[1]
    return tuple(name for name, parameter in model.named_parameters() if parameter in both)


def _seq_ranks(model: nn.Module, ends: Ends, tp: int) -> int:
    """tp where a module before the layers leaves each rank a part of the sequence, else 1."""
    plan = applied_to(model).plan
    if not isinstance(plan, Plan):
        return 1
    for name, kind in ends.called_before:
        rule = plan.rule_for(name)
        sharder = sharder_for(rule.style, kind) if rule is not None else None
        if rule is not None and sharder is not None and sharder.cuts_sequence(rule.style):
            return tp
    return 1


@dataclass(slots=True)
class _Call:
    """The call that runs: its part, and what came from the part before."""

    part: int | None = None
    received: Tensor | None = None


class _LeaveError(BaseException):
    """Ends a forward behind its part's last layer. No Exception: a model's own code must not take it."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class _Before(nn.Module):
    """Stands for layers of parts before: gives what came from them, as a layer gives it."""

    def __init__(self, call: _Call, gives: int) -> None:
        super().__init__()
        self._call, self._gives = call, gives

    def forward(self, *_: Any, **__: Any) -> Any:
        received = self._call.received
        return received if not self._gives else (received, *[None] * (self._gives - 1))


class _Beyond(nn.Module):
    """Stands for layers of parts after: ends the forward with what it is given."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        tensors = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, Tensor)]
        carried = (each for each in tensors if each.requires_grad)
        raise _LeaveError(next(carried, tensors[0]))


class _Outside(nn.Module):
    """Stands for a module that runs before the layers, on another part. Its parameters can be read."""

    def __init__(self, call: _Call, own: nn.Module) -> None:
        super().__init__()
        self._call = call
        self._own = [own]  # in a list, for it is no module of this one

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_own"][0], name)

    def forward(self, *_: Any, **__: Any) -> Tensor:
        assert self._call.received is not None
        return self._call.received.detach()


class _Absent(nn.Module):
    """Stands for a module that lives on another stage."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def forward(self, *_: Any, **__: Any) -> Any:
        raise AssertionError(f"{self._name} lives on another stage of the pipeline")
