"""program_text(): what golden files of one layer don't show. The rest: tests/golden."""

from shardwise.core.case import StepSettings
from shardwise.core.mesh import Mesh
from shardwise.core.program import Block, MemoryChange, MemoryKind, Phase, Program
from shardwise.models.llama import LlamaConfig
from shardwise.models.specs import ModelSpec
from shardwise.parallel.builtin import builtin_plan
from shardwise.report.explain.program_text import program_text
from shardwise.trace.trace import trace


def program(*blocks: Block, model: str = "m") -> Program:
    return Program(model, "p", "native", "cpu", 0, (("tp", 2),), StepSettings(1, 8), 0, blocks, (), (), ())


def test_equal_layers_are_written_once_in_each_direction() -> None:
    spec = ModelSpec("tiny", LlamaConfig(70, 48, 9, 4, 2, 64), "")
    lines = program_text(
        trace(spec, builtin_plan("rowwise"), Mesh.parse("tp=2"), StepSettings(1, 8))
    ).splitlines()
    assert [line for line in lines if "times" in line] == [
        "6 times, for layers.1 to layers.6:",
        "6 times, for layers.6 to layers.1:",
    ]
    assert [layer for layer in range(9) if f"    forward  layers.{layer}.feed_forward.w1" in lines] == [1]
    assert [layer for layer in range(9) if f"    backward  layers.{layer}.feed_forward.w1" in lines] == [6]


def test_what_is_freed_elsewhere_says_where_it_was_made() -> None:
    made, freed = (
        MemoryChange(n, MemoryKind.ACTIVATION, Phase.FORWARD, "a", "aten::mm") for n in (1024, -1024)
    )
    other = MemoryChange(8, MemoryKind.TEMPORARY, Phase.BACKWARD, "b", "aten::add")
    assert program_text(program(Block((made, other, freed)))).splitlines()[4:11] == [
        "",
        "forward  a",
        "    + 1,024 B activation of aten::mm",
        "backward  b",
        "    + 8 B temporary of aten::add",
        "    - 1,024 B activation of aten::mm, forward  a",
        "",
    ]


def test_a_hostile_name_stays_in_its_line() -> None:
    change = MemoryChange(8, MemoryKind.TEMPORARY, Phase.FORWARD, "x\n\x1b[31m" + "y" * 10**6, "aten::add")
    lines = program_text(program(Block((change,)), model="\x07</script>")).splitlines()
    assert lines[0].startswith("\\x07</script> under p")
    assert max(map(len, lines)) < 200
