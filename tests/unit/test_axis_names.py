"""No file but core/mesh.py decides anything by the name of an axis."""

import ast
from pathlib import Path

import pytest

import shardwise
from shardwise.core.mesh import NAMES

SOURCE = Path(shardwise.__file__).parent
KEEPS_THE_NAMES = SOURCE / "core" / "mesh.py"


def deciding_names(tree: ast.AST) -> list[tuple[int, str]]:
    """(line, name) of each string that is an axis' name and nothing else. A docstring or a sentence never is
    one."""
    return [
        (node.lineno, node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and node.value in NAMES
    ]


def test_no_room_but_core_mesh_holds_an_axis_name() -> None:
    found = [
        f"{path.relative_to(SOURCE)}:{line}: {name!r}"
        for path in sorted(SOURCE.rglob("*.py"))
        if path != KEEPS_THE_NAMES
        for line, name in deciding_names(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not found, f"ask core/mesh.py for a role instead: {', '.join(found)}"


@pytest.mark.parametrize(
    "code",
    [
        'if name == "tp": pass',
        'mesh["fsdp"]',
        'size("dp")',
        'sizes = {"cp": 2}',
        'name in ("dp", "tp")',
        'match axis:\n    case "fsdp": pass',
    ],
)
def test_a_name_that_decides_is_seen(code: str) -> None:
    assert deciding_names(ast.parse(code))


def test_a_sentence_about_an_axis_is_not_one() -> None:
    assert not deciding_names(ast.parse('def size():\n    """Over "tp"."""\n    return f"no tp={2} axis"'))
