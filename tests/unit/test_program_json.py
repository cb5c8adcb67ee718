"""A saved Program: nothing is lost, and what isn't one is refused in a line."""

import functools
import json
import subprocess
import sys
from collections.abc import Callable

import pytest

from shardwise.core.case import StepSettings
from shardwise.core.errors import InputError
from shardwise.core.mesh import Mesh
from shardwise.core.program import REPLICATED_PARAMETERS, Program
from shardwise.files.program_json import program_from_json, program_json
from shardwise.models.llama import LlamaConfig
from shardwise.models.specs import ModelSpec
from shardwise.parallel.builtin import builtin_plan
from shardwise.trace.trace import trace

PLANS = ("rowwise", "colwise", "routed", "rowwise@dtensor")
DEVICES = ("cpu", "cuda")
SPEC = ModelSpec("tiny", LlamaConfig(70, 48, 1, 4, 2, 64), "")
DEEP = ModelSpec("deep", LlamaConfig(70, 48, 6, 4, 2, 64), "")


@functools.cache
def program(
    plan: str = "rowwise", device: str = "cpu", mesh: str = "tp=2", spec: ModelSpec = SPEC
) -> Program:
    batch = 3 * Mesh.parse(mesh).data_parallel
    return trace(spec, builtin_plan(plan), Mesh.parse(mesh), StepSettings(batch, 16), device=device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("plan", PLANS)
def test_a_program_reads_back_as_it_was(plan: str, device: str) -> None:
    assert program_from_json(program_json(program(plan, device))) == program(plan, device)


def test_blocks_of_equal_layers_and_partial_gradients_read_back_as_they_were() -> None:
    found = program("rowwise@dtensor", "cuda", "fsdp=2,tp=2", DEEP)
    assert any(block.times > 1 for block in found.blocks)
    assert program_from_json(program_json(found)) == found


def test_mixed_precision_reads_back_and_files_from_before_it_have_none() -> None:
    settings = StepSettings(2, 16, param_dtype="bfloat16", reduce_dtype="float32")
    found = trace(SPEC, builtin_plan("rowwise"), Mesh.parse("fsdp=2,tp=1"), settings, device="cuda")
    assert program_from_json(program_json(found)) == found
    table = json.loads(program_json(program()))
    del table["settings"]["param_dtype"], table["settings"]["reduce_dtype"]
    assert program_from_json(json.dumps(table).encode()) == program()


def test_files_from_before_modules_said_what_they_are_are_read() -> None:
    table = json.loads(program_json(program()))
    for item in (*table["blocks"][0]["items"], *table["holdings"]):
        item.pop("module_kind", None)
        if item["module"] == REPLICATED_PARAMETERS:
            item["rule"] = "end of backward"
    found = program_from_json(json.dumps(table).encode())
    assert {holding.module_kind for holding in found.holdings} == {None}
    assert [item.rule for item in found.collectives()] == [item.rule for item in program().collectives()]


def changed(*path: str | int, value: object) -> bytes:
    table = json.loads(program_json(program("rowwise", "cuda", "tp=2", DEEP)))
    inner = table
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = value
    return json.dumps(table).encode()


def place(kind: str) -> tuple[str | int, ...]:
    """Where the first op of a kind, or the first "memory" or "collective", stands."""
    table = json.loads(program_json(program("rowwise", "cuda", "tp=2", DEEP)))
    for number, block in enumerate(table["blocks"]):
        for index, item in enumerate(block["items"]):
            if item.get("kind") == kind or item["item"] == kind:
                return ("blocks", number, "items", index)
    raise AssertionError(kind)


def repeated() -> int:
    """The number of the block that equal layers share."""
    blocks = program("rowwise", "cuda", "tp=2", DEEP).blocks
    return next(number for number, block in enumerate(blocks) if block.times > 1)


# each worker of a test run would make them, were they made before a test asks

REFUSED: list[tuple[Callable[[], bytes] | bytes, str]] = [
    (b"", "not valid JSON: Input data was truncated"),
    (b"[" * 200_000, "not a saved program"),
    (b"{}", "schema_version is None; this Shardwise reads 1."),
    (b'{"schema_version": true}', "schema_version is True; this Shardwise reads 1."),
    (b'{"schema_version": 1}', "not a saved program: Object missing required field `model`"),
    (lambda: changed("model", value=3), "not a saved program: Expected `str`, got `int` - at `$.model`"),
    (lambda: changed("parameters", value=-1), "not a saved program: Expected `int` >= 0 - at `$.parameters`"),
    (lambda: changed("parameters", value=2**70), "not a saved program"),
    (
        lambda: changed("model", value="x" * 5000),
        "not a saved program: Expected `str` of length <= 1000 - at `$.model`",
    ),
    (
        lambda: changed("axes", value=[["tp", 2], ["tp", 2]]),
        "not a saved program: mesh: an axis is named twice",
    ),
    (
        lambda: changed(*place("collective"), "call", "axis", value="pp"),
        "over axis pp, which the mesh hasn't",
    ),
    (lambda: changed("blocks", value=[]), "not a saved program: it has no op"),
    (
        lambda: changed("blocks", repeated(), "times", value=9999),
        "is no part of 6 layers, repeated 9999 times",
    ),
    (
        lambda: changed("blocks", repeated(), "prefix", value="strata"),
        "a block repeats layers of strata, and the program's layers are layers",
    ),
    (lambda: changed(*place("matmul"), "inputs", value=[]), "is matmul, and its inputs are none"),
    (
        lambda: changed(*place("matmul"), "inputs", 0, value=["float32", [-1, 2]]),
        "not a saved program: Expected `int` >= 0",
    ),
    (
        lambda: changed(*place("memory"), "n_bytes", value="many"),
        "not a saved program: Expected `int`, got `str`",
    ),
    (
        lambda: changed(*place("collective"), "before", value="shard(everything)"),
        '"shard(everything)" is no placement',
    ),
    (lambda: changed("holdings", 0, "placement", value=["__import__('os')"]), "is no placement"),
]


@pytest.mark.parametrize(("document", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_what_is_no_program_is_refused_in_a_line(document: Callable[[], bytes] | bytes, message: str) -> None:
    data = document if isinstance(document, bytes) else document()
    with pytest.raises(InputError) as caught:
        program_from_json(data, "p.json")
    assert str(caught.value).startswith("p.json: ")
    assert message in str(caught.value)
    assert len(str(caught.value)) < 500
    assert "\n" not in str(caught.value)


def test_blocks_that_unfold_without_end_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shardwise.files.program_json.MOST_ITEMS", 100)
    with pytest.raises(InputError, match=r"its blocks unfold to .* items, and at most 100 are read"):
        program_from_json(program_json(program("rowwise", "cuda", "tp=2", DEEP)))


def test_reading_a_program_imports_no_torch() -> None:
    code = (
        "import sys, shardwise.files.program_json, shardwise.predict.predict, shardwise.predict.machines; "
        "print('torch' in sys.modules)"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "False\n"
    )
