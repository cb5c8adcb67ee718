"""The part of search that needs torch, in processes of its own: what of a model can be decided, and the
Programs of pieces."""

from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

from shardwise.core.case import Case
from shardwise.core.errors import InputError
from shardwise.core.made_plan import MadePlan
from shardwise.core.mesh import AXES, Mesh, Role
from shardwise.core.plan import AnyPlan, ContextAttention, TheirPlan
from shardwise.core.search import Group
from shardwise.core.shown import shown
from shardwise.search.piece import Piece, Traced, Unfit
from shardwise.verbs.progress import silent

if TYPE_CHECKING:
    from shardwise.models.source import ModelSource
    from shardwise.planner.make import Forward

PRELOAD = ("shardwise.verbs.search.preload",)


@dataclass(frozen=True, slots=True)
class Facts:
    """What a search must know of a model. layers: 0 where it has no row of them. experts: of the mixture
    that has fewest; 0 without one. why_no_stages: None where it can be cut into stages."""

    name: str
    layers: int
    experts: int
    max_seq: int | None
    why_no_stages: str | None


@dataclass(frozen=True, slots=True)
class AskFacts:
    case: Case


@dataclass(frozen=True, slots=True)
class AskGroups:
    """Of the model over a mesh's tp ranks."""

    case: Case
    mesh: Mesh


@dataclass(frozen=True, slots=True)
class AskProgram:
    """device: the machine's type."""

    case: Case
    piece: Piece
    device: str


@dataclass(frozen=True, slots=True)
class AskPlan:
    """The made plan's file; None where no rules cut anything."""

    case: Case
    piece: Piece


Ask = AskFacts | AskGroups | AskProgram | AskPlan
Told = Facts | tuple[Group, ...] | Traced | str | None


def answer(asked: Ask) -> Told:
    """In a process of its own. Raises InputErrors of the model."""
    match asked:
        case AskFacts():
            return _facts(asked.case)
        case AskGroups():
            from shardwise.planner.groups import groups_of

            model, mesh, seq = asked.case.model, asked.mesh, asked.case.step.seq
            return groups_of(_source(model), mesh, seq, _forward(model)) if mesh.tp > 1 else ()
        case AskPlan():
            made = _made(asked.case, _cutting_mesh(asked.piece), asked.piece.styles)
            return made.to_toml() if made is not None else None
        case AskProgram():
            return _program(asked)


@cache
def _source(model: str) -> "ModelSource":
    from shardwise.models.source import find_model

    return find_model(model)


@cache
def _forward(model: str) -> "Forward":
    from shardwise.planner.make import forward_of

    return forward_of(_source(model))


def _facts(case: Case) -> Facts:
    import torch

    from shardwise.models.layers import find_layers
    from shardwise.parallel.ends import ends_of
    from shardwise.parallel.experts import number_of_experts, takes_tokens_of_experts

    source = _source(case.model)
    model = source.build(dtype=torch.bfloat16)
    layers = find_layers(model)
    experts = [number_of_experts(each) for each in model.modules() if takes_tokens_of_experts(each)]
    known = [each for each in experts if each is not None]
    why = None
    try:
        ends_of(source)
    except InputError as error:
        why = str(error)
    return Facts(
        source.name, layers.count if layers is not None else 0, min(known, default=0), source.max_seq, why
    )


def _cutting_mesh(piece: Piece) -> Mesh:
    """The axes over which a plan's rules cut."""
    mesh, cutting = Mesh(piece.axes), (Role.CUTS_EXPERTS, Role.CUTS_TENSORS)
    sizes = {axis.role: mesh.size(axis.name) for axis in AXES if axis.role in cutting}
    return Mesh.of({role: size for role, size in sizes.items() if size > 1})


@cache
def _made(case: Case, mesh: Mesh, styles: tuple[tuple[str, str], ...]) -> MadePlan | None:
    from shardwise.planner.groups import wish_of
    from shardwise.planner.make import make_plan

    if mesh.world_size == 1:
        return None
    wish = wish_of(mesh, case.step.seq, dict(styles))
    made = make_plan(_source(case.model), wish, forward=_forward(case.model))
    way = ContextAttention(case.context_attention)
    return replace(made, plan=replace(made.plan, context_attention=way), model=case.model)


def _program(asked: AskProgram) -> Traced:
    from shardwise.verbs.programs import trace_program

    piece, case = asked.piece, asked.case
    mesh, (stages, chunks) = Mesh(piece.axes), piece.dealt
    if stages > 1:
        mesh = Mesh.of(
            {axis.role: stages if axis.role is Role.CUTS_DEPTH else mesh.size(axis.name) for axis in AXES}
        )
    part = replace(
        case.step,
        batch=piece.micro_batch,
        accumulation=1,
        recompute=piece.recompute,
        recompute_layers=piece.recomputed,
        chunks=chunks,
        reshard_after_forward=piece.reshard,
        reduce_once=case.step.reduce_once and bool(mesh.shard_axes),
    )
    try:
        made = _made(case, _cutting_mesh(piece), piece.styles)
        plan: AnyPlan = made.plan if made is not None else TheirPlan.UNSHARDED
        return trace_program(_source(case.model), plan, mesh, part, case.text, asked.device, silent)
    except InputError as error:
        return Unfit(shown(str(error), 200))
