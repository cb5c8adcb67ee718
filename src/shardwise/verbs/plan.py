"""plan: a model and a mesh -> MadePlan: a native plan made from the model's own forward, with a reason for
each rule. Its dims alone: Dims."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

from shardwise.core.case import Case
from shardwise.core.dims import Dims
from shardwise.core.errors import OptionError
from shardwise.core.made_plan import MadePlan
from shardwise.core.mesh import Mesh
from shardwise.core.option import Option, check_options
from shardwise.core.plan import Plan, StyleName, TheirPlan
from shardwise.core.search import LOOK_UPS
from shardwise.verbs.progress import Progress, silent

if TYPE_CHECKING:
    from shardwise.models.source import ModelSource
    from shardwise.planner.make import Wish

PANEL = "The plan"
SEQ = 4096
EMBEDDINGS = tuple(map(str, LOOK_UPS))


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """What only plan knows."""

    embedding: Annotated[
        str, Option(f"How the table of ids is cut: {', '.join(EMBEDDINGS)}.", PANEL, choices=EMBEDDINGS)
    ] = str(StyleName.ROWWISE)

    def __post_init__(self) -> None:
        check_options(self)


def plan(case: Case, options: PlanOptions | None = None, progress: Progress = silent) -> MadePlan:
    """A native plan for the case's model on its mesh's tp ranks; the case's plans don't count. seq (4096 by
    default, or what the model has positions for) is the length at which costs are weighed. No ranks, no GPU,
    no weights. Raises InputError where the model isn't known, can't be traced without data, or has nothing
    that can be cut."""
    from shardwise.models.source import find_model
    from shardwise.planner.make import make_plan

    options = options or PlanOptions()
    source = find_model(case.model)
    made = make_plan(source, _wish(case, options, source), progress=progress)
    return replace(made, model=case.model)  # as it was asked for; a source's name may be cut short


def dims(case: Case, progress: Progress = silent) -> Dims:
    """What of the case's model must be cut together, and what can't be cut and why; beside each weight the
    rule of the case's first plan, if it has one. Raises InputError as plan() does, but for a model of which
    nothing can be cut."""
    from shardwise.models.source import find_model
    from shardwise.planner.classes import with_rules
    from shardwise.planner.make import make_dims

    source = find_model(case.model)
    given = _given(case, source)
    made = make_dims(source, _wish(case, PlanOptions(), source), progress=progress)
    return made if given is None else with_rules(made, given)


def _wish(case: Case, options: PlanOptions, source: "ModelSource") -> "Wish":
    from shardwise.planner.make import Wish

    check_mesh(case.mesh)
    seq = case.step.seq or min(SEQ, source.max_seq or SEQ)
    return Wish(case.mesh, case.sequence_parallel, StyleName(options.embedding), seq)


def check_mesh(mesh: Mesh) -> None:
    """Raises OptionError for a mesh without ranks to cut for."""
    if mesh.tp < 2 and mesh.experts < 2:
        raise OptionError(
            f"--mesh {mesh}: a plan cuts a model over two tp ranks or more, or experts over ep. Use --mesh "
            "tp=2, or ep=2."
        )


def _given(case: Case, source: "ModelSource") -> Plan | None:
    """The case's plan, if it has one. Raises OptionError for one whose rules aren't ours."""
    from shardwise.parallel.plans import load_any_plan

    if not case.plans:
        return None
    found = load_any_plan(case.plans[0], sequence_parallel=case.sequence_parallel, family=source.family)
    if isinstance(found, TheirPlan):
        raise OptionError(f'plan "{found}" has no rules of ours to show beside the dims. Leave it out.')
    return found
