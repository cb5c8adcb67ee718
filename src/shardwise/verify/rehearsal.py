"""One training step of a model, traced without ranks and watched: what foresight.py compares, unsharded and
sharded."""

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from shardwise.core.case import StepSettings
from shardwise.core.errors import PlanError, ShardwiseError
from shardwise.core.mesh import Mesh, Role
from shardwise.core.plan import AnyPlan, Plan, TheirPlan
from shardwise.core.program import Program
from shardwise.core.shown import shown
from shardwise.models.layers import find_layers
from shardwise.models.source import ModelSource
from shardwise.torch_private import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    local_part,
    storage_key,
)
from shardwise.trace.lineage import Lineage, TooLongError, Watch
from shardwise.trace.trace import trace

LIMIT_S = 60.0
"""For one forward on fake tensors; the largest of the known models take a quarter of it."""


@dataclass(frozen=True, slots=True)
class Step:
    """One rank's step, as far as it could be traced. model: as the plan left it."""

    program: Program | None
    lineage: Lineage
    model: nn.Module | None
    error: ShardwiseError | None = None

    @property
    def failure(self) -> str:
        """What the trace said, without the names of plan and model, which stand above it, and without its
        advice."""
        text = str(self.error)
        if self.error is not None and self.error.__cause__ is not None:
            text = re.sub(r'^(plan "[^"]*": )?model "[^"]*": | See whether it .*$', "", text)
        return shown(text, 300)

    @property
    def failed_in(self) -> str:
        """The module that raised, or "model"."""
        module, raised, _ = self.failure.partition(" raised ")
        return module if raised else "model"

    @property
    def modules(self) -> frozenset[str]:
        """Names of the model's modules."""
        named = self.model.named_modules() if self.model is not None else ()
        return frozenset(name for name, _ in named if name)

    @property
    def whole_on_all(self) -> frozenset[str]:
        """Parameters that every rank holds whole."""
        named = self.model.named_parameters() if self.model is not None else ()
        placements = {name: getattr(parameter, "placements", ()) for name, parameter in named}
        return frozenset(name for name, each in placements.items() if all(p.is_replicate() for p in each))

    @property
    def sequence_parallel(self) -> frozenset[str]:
        """Parameters of modules whose rule is for a part of the sequence."""
        if self.program is None:
            return frozenset()
        uses = (use for use in self.program.rules if use.style == "sequence_parallel")
        modules = {name for use in uses for name in use.modules}
        return frozenset(each.name for each in self.program.holdings if each.module in modules)

    @property
    def summed_together(self) -> frozenset[str]:
        """Parameters whose gradients are in one storage with others: views of one tensor that was summed."""
        by_storage: dict[int, list[str]] = {}
        for name, each in self.model.named_parameters() if self.model is not None else ():
            if each.grad is not None:
                by_storage.setdefault(storage_key(local_part(each.grad).untyped_storage()), []).append(name)
        return frozenset(name for names in by_storage.values() if len(names) > 1 for name in names)

    def is_refused_by(self, plan: AnyPlan) -> bool:
        """Whether a plan of ours doesn't fit the model, rather than fail while it runs."""
        return isinstance(plan, Plan) and isinstance(self.error, PlanError) and self.error.__cause__ is None

    def is_untraceable_under(self, plan: AnyPlan) -> bool:
        """Whether it fails because there is no data or no time; or can't be built without weights, as a
        factory that shards itself may not."""
        cause = self.error.__cause__ if self.error is not None else None
        has_no_data = isinstance(cause, DataDependentOutputException | DynamicOutputShapeException)
        is_too_long = isinstance(self.error, TooLongError)
        return has_no_data or is_too_long or (self.model is None and plan is TheirPlan.OWN)


def rehearsed(
    source: ModelSource, plan: AnyPlan, tp: int, settings: StepSettings, depth: int | None, rank: int
) -> Step:
    """The step as one rank of tp runs it, of `depth` layers (None: of all)."""
    watch = Watch(LIMIT_S)

    def attach(model: nn.Module) -> None:
        # a loop over the experts that were chosen depends on the data
        if hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation("batched_mm")  # type: ignore[operator]  # transformers' method
        watch.attach(model)

    mesh = Mesh.of({Role.CUTS_TENSORS: tp})
    try:
        with watch, _quietly():
            program = trace(
                source, plan, mesh, settings, rank=rank, compress=False, depth=depth, on_model=attach
            )
    except ShardwiseError as error:
        return Step(None, watch.lineage, watch.model, error)
    return Step(program, watch.lineage, watch.model)


def depth_of_each_kind(source: ModelSource) -> int | None:
    """As many of the first layers as hold one of each kind; None for a model without layers."""
    model = source.build(dtype=torch.float32)
    layers = find_layers(model)
    return max(2, layers.kinds(model)) if layers is not None else None


@contextmanager
def _quietly() -> Iterator[None]:
    """What libraries warn of while a model is built and run isn't about its plan."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)  # torch logs what a fake op raises, which is told here
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
