"""What the native engine's styles of any module share: how its parameters are held where its class doesn't
tell, and its own forward on what each rank holds.

A parameter that a module owns is held by the module's rule. One that a module inside owns, and this one reads
by name, may be held by this one's rule: then it is local in the forwards of both.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import ClassVar

import torch
from torch import nn

from shardwise.core.errors import PlanError
from shardwise.core.held import Held
from shardwise.core.placement import Partial, Replicate, Shard
from shardwise.core.plan import Style
from shardwise.parallel.arguments import check_arguments_cut, cut_arguments
from shardwise.parallel.axis import Axis
from shardwise.parallel.chunks import chunk_sizes
from shardwise.parallel.counts import divide_counts
from shardwise.parallel.own_forward import Part, Use, run_on_local
from shardwise.parallel.ownership import PieceOrder
from shardwise.parallel.sharder import Assignment, Fit, Sharder, Work, refuse_below_gather_input
from shardwise.parallel.shared import Shared
from shardwise.torch_private import buffers_of


def uses_of(assignment: Assignment, work: Work, added_once: Collection[str] = ()) -> list[Use]:
    """The parameters that an assignment holds, as forwards use them."""
    axis, site = work.axis, work.site(assignment)
    found = []
    for path, held in assignment.held.items():
        module_name, _, name = path.rpartition(".")
        owner = assignment.module.get_submodule(module_name)
        is_buffer, part, shared = name in buffers_of(owner), None, None
        if (held.parts or is_buffer) and isinstance(held.placement, Shard):
            whole = owner.get_buffer(name) if is_buffer else owner.get_parameter(name)
            dim = held.placement.dim % whole.dim()
            if is_buffer or held.kept_on(axis.size) == Replicate():
                part = _part(held, dim, whole.shape[dim], axis)
            else:
                shared = Shared(held, dim, site)
        found.append(Use(owner, name, held.gradient_on(axis.size), path in added_once, part, shared))
    return found


def _part(held: Held, dim: int, size: int, axis: Axis) -> Part:
    """What a rank uses of what it has whole."""
    if held.pieces:
        return Part(dim, size, PieceOrder(held.pieces, axis.size, dim, held.parts).ids_of(axis.rank))
    sizes = chunk_sizes(size, axis.size)
    first = sum(sizes[: axis.rank])
    return Part(dim, size, torch.arange(first, first + sizes[axis.rank]))


def wholes(told: Mapping[str, Held]) -> frozenset[str]:
    """The parameters that are told to be whole, and nothing of their gradient. Where what a module gives is
    summed over the ranks, they are taken for biases, which are to be added once."""
    return frozenset(name for name, held in told.items() if held == Held(Replicate()))


def held_for_sum(told: Mapping[str, Held]) -> dict[str, Held]:
    """What is added once has its gradient on one rank, and zeros on the others: parts of a sum."""
    whole = wholes(told)
    return {name: Held(Replicate(), gradient=Partial()) if name in whole else told[name] for name in told}


def hold_and_run_on_local(assignment: Assignment, work: Work, added_once: Collection[str] = ()) -> None:
    """Parameters are held as the assignment says, counts are divided, and the module's own forward, and that
    of each module inside whose parameters it holds, runs on local tensors."""
    work.hold(assignment)
    divide_counts(assignment, work.axis.size)
    uses = uses_of(assignment, work, added_once)
    for owner in dict.fromkeys(use.module for use in uses):
        if owner is not assignment.module:
            run_on_local(owner, [use for use in uses if use.module is owner], work.axis)
    run_on_local(assignment.module, uses, work.axis)


def own_names(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_parameters(recurse=False)]


class WholeLeaf(Sharder):
    """Every rank holds all parameters that the module owns."""

    def gradient(self, style: Style) -> Partial | None:
        return style.gradient

    def held(self, assignment: Assignment) -> dict[str, Held]:
        gradient = self.gradient(assignment.style)
        return {name: Held(Replicate(), gradient=gradient) for name in own_names(assignment.module)}

    def check_below_gather_input(self, assignment: Assignment) -> None:
        if self.gradient(assignment.style) is None and own_names(assignment.module):
            refuse_below_gather_input(assignment, 'Add gradient = "partial", which sums the parts.')

    def apply(self, assignment: Assignment, work: Work) -> None:
        hold_and_run_on_local(assignment, work)


class CutLeaf(Sharder):
    """Parameters are cut: as `parameters` says, or as the class of which the module's is a subclass tells.

    by_class: how parameters are held by their name, of torch's classes.
    """

    by_class: ClassVar[Mapping[type[nn.Module], Mapping[str, Held]]] = {}

    def held(self, assignment: Assignment) -> dict[str, Held]:
        style, module = assignment.style, assignment.module
        kinds = [kind for kind in self.by_class if isinstance(module, kind)]
        told = {name: held for kind in kinds for name, held in self.by_class[kind].items()}
        found = {name: held for name, held in told.items() if name in own_names(module)}
        found |= dict(style.parameters)
        return {name: in_pieces(held, style) for name, held in found.items()}

    def check(self, assignment: Assignment, fit: Fit) -> None:
        module = assignment.module
        unsaid = [name for name in own_names(module) if name not in assignment.held]
        if unsaid or not assignment.held:
            example = (
                ", ".join(f'{name} = "shard(DIM)"' for name in unsaid) or '"inner.weight" = "shard(DIM)"'
            )
            raise PlanError(
                f"rule {assignment.rule} matched {assignment.shown}, a {assignment.kind}, whose class "
                f"doesn't tell how its parameters are cut. Say it: parameters = {{ {example} }}."
            )
        if not any(isinstance(held.placement, Shard) for held in assignment.held.values()):
            raise PlanError(
                f"rule {assignment.rule} cuts no parameter of {assignment.shown}. Use replicate, or "
                'sequence_parallel; or say what is cut: parameters = { NAME = "shard(DIM)" }.'
            )


class HoldingContainer(Sharder):
    """A module that may hold others, and parameters that its own forward reads."""

    holds_others = True

    def held(self, assignment: Assignment) -> dict[str, Held]:
        return dict(assignment.style.parameters)

    def check_held_inside(self, assignment: Assignment) -> None:
        """Raises PlanError for what would train wrong without a word where every rank computes a part of the
        gradient."""
        for name, held in assignment.held.items():
            if held == Held(Replicate()):
                raise PlanError(
                    f"rule {assignment.rule}: {name} of {assignment.shown} is whole where each rank's "
                    'gradient is a part of the sum. Write "replicate, gradient partial", which sums them.'
                )

    def check(self, assignment: Assignment, fit: Fit) -> None:
        check_arguments_cut(assignment)

    def check_below_gather_input(self, assignment: Assignment) -> None:
        super().check_below_gather_input(assignment)
        self.check_held_inside(assignment)

    def apply(self, assignment: Assignment, work: Work) -> None:
        hold_and_run_on_local(assignment, work)
        cut_arguments(assignment, work.site(assignment))


def in_pieces(held: Held, style: Style) -> Held:
    """The rule's pieces, where a parameter that is cut has none of its own."""
    if not isinstance(held.placement, Shard) or held.pieces:
        return held
    return replace(held, pieces=style.pieces, parts=style.parts)
