"""A search's plans as files, and what to type next: commands that take them."""

import shlex
from collections.abc import Iterable, Iterator

from shardwise.core.case import Case, StepSettings
from shardwise.core.errors import OptionError
from shardwise.core.mesh import EXPERTS_AXIS, TENSOR_AXIS, Mesh
from shardwise.core.option import options_of
from shardwise.core.plan import TheirPlan
from shardwise.core.search import Found, Search
from shardwise.files.case import case_text

# which formats there are, export's own help says
FORMAT = "pytorch"


def plan_files(search: Search) -> dict[str, str]:
    """Each found plan that has rules, and the case of each, by the names of their files."""
    files = {}
    for index, each in enumerate(search.found):
        if each.plan is not None:
            files[plan_name(index)] = each.plan
        if (case := _case(search, index)) is not None:
            files[case_name(index)] = case_text(case, set(_given(case)), {})
    return files


def plan_name(index: int) -> str:
    return f"plan-{index + 1}.toml"


def case_name(index: int) -> str:
    return f"case-{index + 1}.toml"


def next_commands(search: Search, index: int) -> tuple[tuple[str, str], ...]:
    """(what for, command) of a found plan, whose files lie in the working folder."""
    found = search.found[index]
    config = ("--config", case_name(index))
    told = [("predict it", ["predict", *config])]
    if found.plan is not None:
        proof = ["--model", search.model, "--mesh", _proof_mesh(found)]
        told.insert(0, ("prove it", ["verify", plan_name(index), *proof]))
        told.append(("export it", ["export", *config, "--as", FORMAT, "--out", "mine"]))
    return tuple((what, shlex.join(["shardwise", *words])) for what, words in told)


def _proof_mesh(found: Found) -> str:
    """Where none was proved: the axes that rules cut over."""
    mesh = found.candidate.mesh
    return found.proof_mesh or str(_mesh([(EXPERTS_AXIS, mesh.experts), (TENSOR_AXIS, mesh.tp)]))


def _mesh(axes: Iterable[tuple[str, int]]) -> Mesh:
    """Without axes of one rank."""
    return Mesh(tuple((axis, size) for axis, size in axes if size > 1))


def _case(search: Search, index: int) -> Case | None:
    """None where a case would be refused, as one of a file that somebody changed may be."""
    found = search.found[index]
    plan = plan_name(index) if found.plan is not None else str(TheirPlan.UNSHARDED)
    mesh = _mesh(found.candidate.axes)
    try:
        return Case(search.model, mesh, (plan,), found.settings, machine=search.machine.name)
    except OptionError:
        return None


def _given(case: Case) -> Iterator[str]:
    """Keys that say something that isn't the default."""
    yield from ("model", "mesh", "plans", "machine")
    for asked in options_of(StepSettings):
        value = getattr(case.step, asked.field)
        if value not in (asked.default, None):
            yield asked.key
