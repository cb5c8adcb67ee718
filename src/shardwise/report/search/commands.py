"""A search's plans as files, and what to type next: commands that take them."""

import shlex
from collections.abc import Iterable, Iterator

from shardwise.core.case import StepSettings
from shardwise.core.mesh import EXPERTS_AXIS, TENSOR_AXIS
from shardwise.core.option import options_of
from shardwise.core.search import Found, Search

# which formats there are, export's own help says
FORMAT = "pytorch"


def plan_files(search: Search) -> dict[str, str]:
    """Each found plan that has rules, by the name of its file."""
    return {plan_name(index): each.plan for index, each in enumerate(search.found) if each.plan is not None}


def plan_name(index: int) -> str:
    return f"plan-{index + 1}.toml"


def next_commands(search: Search, index: int) -> tuple[tuple[str, str], ...]:
    """(what for, command) of a found plan, that lies in the working folder."""
    found = search.found[index]
    plan = plan_name(index) if found.plan is not None else "unsharded"
    model, mesh = ("--model", search.model), ("--mesh", _mesh(found.candidate.axes))
    machine = ("--machine", search.machine.name)
    told = [("predict it", ["predict", plan, *model, *mesh, *machine, *_step(found.settings)])]
    if found.plan is not None:
        told.insert(0, ("prove it", ["verify", plan, *model, "--mesh", _proof_mesh(found)]))
        told.append(("export it", ["export", plan, "--as", FORMAT, *model, *mesh]))
    return tuple((what, shlex.join(["shardwise", *words])) for what, words in told)


def _proof_mesh(found: Found) -> str:
    """Where none was proved: the axes that rules cut over."""
    mesh = found.candidate.mesh
    return found.proof_mesh or _mesh([(EXPERTS_AXIS, mesh.experts), (TENSOR_AXIS, mesh.tp)])


def _mesh(axes: Iterable[tuple[str, int]]) -> str:
    """Without axes of one rank, but for a mesh that has no other."""
    return ",".join(f"{axis}={size}" for axis, size in axes if size > 1) or f"{TENSOR_AXIS}=1"


def _step(settings: StepSettings) -> Iterator[str]:
    """The options that make these settings."""
    for asked in options_of(StepSettings):
        value = getattr(settings, asked.field)
        if value == asked.default or value is None:
            continue
        on, _, off = asked.flag.partition("/")
        if isinstance(value, bool):
            yield on if value else off
        else:
            yield from (on, str(value))
