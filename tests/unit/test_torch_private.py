"""PyTorch's private names stand in one file, and what a PyTorch lacks of them is said in one line."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from shardwise import torch_private
from shardwise.core.errors import InputError, TorchError
from tests.matrix import FULL

SOURCE = Path(torch_private.__file__).parent
# os, a NamedTuple, and a Hugging Face model
NOT_TORCH_S = {
    "_exit", "_current_frames", "_replace", "_can_set_experts_implementation", "_expand_parallel_plan",
}  # fmt: skip


def trees() -> dict[Path, ast.Module]:
    paths = [path for path in SOURCE.rglob("*.py") if path.name != "torch_private.py"]
    return {path: ast.parse(path.read_text()) for path in paths}


def own_names(tree: ast.Module) -> set[str]:
    """Every name that a file gives to something."""
    names = set()
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                names.add(name)
            case ast.Attribute(attr=name, ctx=ast.Store()) | ast.Name(id=name, ctx=ast.Store()):
                names.add(name)
            case _:
                pass
    return names


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def private_names(tree: ast.Module, own: set[str]) -> set[str]:
    """Names of others that begin with an underscore; torch.ops has the names of kernels, which are none."""
    names = set()
    for node in ast.walk(tree):
        match node:
            case ast.ImportFrom(module=str(module), names=imported) if module.startswith("torch"):
                parts = [*module.split("."), *(alias.name for alias in imported)]
                names |= {f"{module}: {part}" for part in parts if is_private(part)}
            case ast.Attribute(attr=name) if is_private(name) and name not in own | NOT_TORCH_S:
                text = ast.unparse(node)
                if not text.startswith(("torch.ops.", "aten.")):
                    names.add(text)
            case _:
                pass
    return names


def test_nobody_else_writes_a_private_name_of_torch() -> None:
    found = trees()
    own = set().union(*map(own_names, found.values()))
    strangers = {str(path): names for path, tree in found.items() if (names := private_names(tree, own))}
    assert strangers == {}


def test_the_search_finds_what_it_is_for() -> None:
    tree = ast.parse("from torch._subclasses import fake_tensor\nx._cdata\ntorch._C.f()\nself._own\n")
    assert private_names(tree, {"_own"}) == {"torch._subclasses: _subclasses", "x._cdata", "torch._C"}


def test_this_torch_lacks_nothing() -> None:
    torch_private.check()


def test_what_a_torch_lacks_is_said_in_one_line_with_its_version() -> None:
    assert torch_private.complaint("2.99.0", ["torch._C.gone", "torch.utils._old"]) == (
        "torch 2.99.0 has no torch._C.gone, torch.utils._old, which Shardwise uses. "
        "Use a version that it is tested with (README), or a newer Shardwise."
    )
    assert issubclass(TorchError, InputError)


@pytest.mark.parametrize(
    ("removal", "lacks"),
    [
        (
            "del torch._C._current_graph_task_id\n"
            "from torch.distributed.tensor import _api, _dispatch, _redistribute\n"
            "for each in (_api, _dispatch, _redistribute):\n"
            "    each.__dict__.pop('redistribute_local_tensor', None)",
            "torch._C._current_graph_task_id, redistribute_local_tensor",
        ),
        pytest.param(
            "del torch.utils._python_dispatch.TorchDispatchMode",
            "torch.utils._python_dispatch.TorchDispatchMode",
            marks=FULL,
        ),
    ],
)
def test_a_torch_that_lacks_names_is_refused_when_a_verb_begins(removal: str, lacks: str) -> None:
    code = (
        f"import torch, torch.distributed.fsdp, torch.distributed.tensor.debug\n{removal}\n"
        "from shardwise.core.errors import TorchError\n"
        "try:\n"
        "    from shardwise.parallel.apply import parallelize\n"
        "    parallelize(torch.nn.Linear(1, 1), 'rowwise', None)\n"
        "except TorchError as error:\n"
        "    print(error)"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert answer.startswith(f"torch {torch.__version__} has no {lacks}, which Shardwise uses.")
    assert answer.count("\n") == 1
