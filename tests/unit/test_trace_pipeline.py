"""A stage's Program: its own layers, what it passes on and why, and what every stage holds."""

from typing import Any

import pytest

from shardwise.core.case import Case, StepSettings
from shardwise.core.collective import TO_ONE_RANK
from shardwise.core.errors import InputError
from shardwise.core.layer_name import layer_index
from shardwise.core.mesh import Mesh
from shardwise.core.program import Collective, MemoryKind, Program
from shardwise.explain.explain import explain
from shardwise.models.source import find_model
from shardwise.parallel.plans import load_any_plan
from shardwise.trace.trace import trace
from shardwise.verbs.explain import ExplainOptions
from shardwise.verbs.explain import explain as explain_case
from tests.matrix import FULL

LLAMA = "llama3-debug?vocab_size=96,hidden=32,n_layers={},n_heads=4,n_kv_heads=2,ffn_hidden=48"
TIED = f"{LLAMA},tied=true"


def traced(
    model: str, mesh: str, rank: int = 0, plan: str = "unsharded", *, compress: bool = True, **settings: Any
) -> Program:
    parsed, source = Mesh.parse(mesh), find_model(model)
    accumulation = settings.pop("accumulation", parsed.stages)
    step = StepSettings(
        batch=parsed.data_parallel * accumulation, seq=16, accumulation=accumulation, **settings
    )
    made = load_any_plan(plan, sequence_parallel=True, family=source.family)
    return trace(source, made, parsed, step, rank=rank, compress=compress)


@pytest.mark.parametrize(
    ("model", "mesh", "rank", "plan", "settings"),
    [
        pytest.param(LLAMA.format(12), "pp=2", 0, "unsharded", {}, marks=FULL),
        pytest.param(TIED.format(12), "pp=2", 1, "unsharded", {"recompute": "full"}, marks=FULL),
        (LLAMA.format(20), "pp=2", 1, "unsharded", {"chunks": 2}),
        (LLAMA.format(15), "pp=3,fsdp=2,tp=2", 5, "rowwise", {}),
        pytest.param(LLAMA.format(12), "pp=2,dp=2", 3, "unsharded", {"schedule": "gpipe"}, marks=FULL),
    ],
)
def test_equal_layers_of_a_stage_are_traced_once_and_give_the_whole_stage(
    model: str, mesh: str, rank: int, plan: str, settings: dict[str, Any]
) -> None:
    short = traced(model, mesh, rank, plan, **settings)
    whole = traced(model, mesh, rank, plan, compress=False, **settings)
    assert short.compressed
    assert not whole.compressed
    assert list(short.items()) == list(whole.items())
    assert short.holdings == whole.holdings
    assert short.resident == whole.resident


def passed(program: Program) -> list[Collective]:
    return [each for each in program.collectives() if each.call.kind in TO_ONE_RANK]


def test_a_stage_in_the_middle_passes_each_micro_batch_on_in_both_directions_and_says_why() -> None:
    n_bytes = 16 * 32 * 4
    program = traced(LLAMA.format(6), "pp=3", rank=1, accumulation=3)
    told = [(each.call.kind.value, str(each.phase), each.module, each.reason) for each in passed(program)]
    forward, backward = told[:2], told[-2:]
    assert forward == [
        ("recv", "forward", "layers.1", "Stage 1 goes on from what layers.1, stage 0's last layer, gave."),
        ("send", "forward", "layers.3", "Stage 2 needs what layers.3, stage 1's last layer, gives."),
    ]
    assert backward == [
        (
            "recv",
            "backward",
            "layers.3",
            "Stage 2 found the gradient of what stage 1's last layer, layers.3, gave.",
        ),
        (
            "send",
            "backward",
            "layers.1",
            "Stage 0 needs the gradient of what its last layer, layers.1, gave.",
        ),
    ]
    assert len(told) == 4 * 3
    assert {each.call.payload_bytes for each in passed(program)} == {n_bytes}
    assert sum(each.call.wire_bytes for each in passed(program)) == 2 * 3 * n_bytes
    assert {group.reason for group in explain(program).collectives} >= {each[3] for each in told}


def test_a_stage_under_sequence_parallelism_passes_its_part_of_the_sequence_on() -> None:
    program = traced(LLAMA.format(4), "pp=2,tp=2", plan="rowwise")
    assert {each.call.payload_bytes for each in passed(program)} == {16 // 2 * 32 * 4}


def test_the_ends_of_a_tied_head_add_up_their_gradients() -> None:
    reasons = [each.reason for each in passed(traced(TIED.format(4), "pp=2", rank=1))]
    assert sum("hold one parameter" in str(reason) for reason in reasons) == 2


@pytest.mark.parametrize("mesh", [pytest.param("pp=3", marks=FULL), "pp=3,fsdp=2,tp=2"])
def test_what_every_stage_holds_is_what_its_own_trace_holds(mesh: str) -> None:
    plan = "rowwise" if "tp" in mesh else "unsharded"
    ranks = Mesh.parse(mesh).world_size // 3
    programs = [traced(TIED.format(7), mesh, stage * ranks, plan) for stage in range(3)]
    shares = programs[0].stages
    assert all(program.stages == shares for program in programs)
    assert [share.layers for share in shares] == [((0, 2),), ((2, 3),), ((5, 2),)]
    assert [share.in_flight for share in shares] == [3, 2, 1]
    assert [share.parameter_bytes for share in shares] == [
        program.held(MemoryKind.PARAMETER) for program in programs
    ]
    embedding = 96 * 32
    assert sum(share.parameters for share in shares) == programs[0].parameters + embedding


def test_a_stage_holds_its_own_layers_under_the_whole_model_s_names() -> None:
    program = traced(LLAMA.format(12), "pp=2", rank=1, chunks=2)
    layers = {layer_index(holding.name, "layers") for holding in program.holdings}
    assert layers == {3, 4, 5, 9, 10, 11, None}


def test_fewer_micro_batches_hold_fewer_activations_and_gpipe_holds_all() -> None:
    model = LLAMA.format(6)
    held = {
        schedule: dict(explain(traced(model, "pp=2", accumulation=8, schedule=schedule)).peak.by_kind)
        for schedule in ("1f1b", "gpipe")
    }
    activations = [held[schedule][MemoryKind.ACTIVATION] for schedule in ("1f1b", "gpipe")]
    assert activations[1] > 3 * activations[0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mesh": "pp=8"}, "can't be cut into 8 stages. Use at most pp=6."),
        ({"mesh": "pp=4", "stages": "2,2,2"}, "4 stages of 6 layers are 4 counts of at least 1"),
        ({"mesh": "pp=4", "accumulation": 2}, "Use --accumulation 4 or more, or --schedule gpipe."),
        ({"mesh": "tp=2", "chunks": 2}, "Use a mesh with pp=2 or more."),
    ],
)
def test_a_pipeline_that_cannot_be_is_refused_before_anything_runs(
    values: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError) as refused:
        explain_case(Case.of(model="llama3-debug", seq=16, **values))
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_explain_shows_the_stage_that_is_asked_for() -> None:
    case = Case.of(model=LLAMA.format(4), mesh="pp=2,dp=2", seq=16)
    assert [explain_case(case, ExplainOptions(stage=stage)).programs[0].rank for stage in (0, 1)] == [0, 2]
    with pytest.raises(InputError, match=r"--stage 2: mesh pp=2,dp=2,tp=1 has 2 stages; use 0 to 1\."):
        explain_case(case, ExplainOptions(stage=2))
