"""A search's plans as files, and what to type next: commands that take them."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from shardwise.core.case import TextSource
from shardwise.core.errors import OptionError
from shardwise.core.mesh import EXPERTS_AXIS, TENSOR_AXIS, Mesh
from shardwise.core.option import Asked
from shardwise.core.search import Found, Search, plan_name
from shardwise.files.case import case_text, said_by

# which formats there are, export's own help says
FORMAT = "pytorch"


def plan_files(
    search: Search,
    machine: str = "",
    text: TextSource | None = None,
    own: Mapping[str, Sequence[tuple[Asked, Any]]] = MappingProxyType({}),
) -> dict[str, str]:
    """Each found plan that has rules, and the case of each, by the names of their files; and what was written
    for a framework, in a folder for each. machine: its file, as the folder sees it, where it has one; text:
    so too; own: what stands in a verb's table."""
    files = {}
    for index, each in enumerate(search.found):
        if each.plan is not None:
            files[plan_name(index)] = each.plan
        try:
            case = search.case(index, machine)
        except OptionError:  # of a file that somebody changed
            continue
        case = replace(case, text=text if text is not None else case.text)
        files[case_name(index)] = case_text(case, said_by(case), {}, own)
        for file in each.export.files if each.export is not None else ():
            files[f"{export_folder(index)}/{file.name}"] = file.text
    return files


def case_name(index: int) -> str:
    return f"case-{index + 1}.toml"


def export_folder(index: int) -> str:
    return f"export-{index + 1}"


def next_commands(search: Search, index: int) -> tuple[tuple[str, str], ...]:
    """(what for, command) of a found plan, whose files lie in the working folder."""
    found = search.found[index]
    config = ("--config", case_name(index))
    told = [("predict it", ["predict", *config])]
    if found.plan is not None:
        proof = ["--model", search.model_there or search.model, "--mesh", _proof_mesh(found)]
        told.insert(0, ("prove it", ["verify", plan_name(index), *proof]))
        if found.export is None:
            told.append(("export it", ["export", *config, "--as", FORMAT, "--out", "mine"]))
    return tuple((what, shlex.join(["shardwise", *words])) for what, words in told)


def _proof_mesh(found: Found) -> str:
    """Where none was proved: the axes that rules cut over."""
    mesh = found.candidate.mesh
    cutting = ((EXPERTS_AXIS, mesh.experts), (TENSOR_AXIS, mesh.tp))
    return found.proof_mesh or str(Mesh(tuple(pair for pair in cutting if pair[1] > 1)))
