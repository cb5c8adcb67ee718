"""PredictionRun -> terminal and JSON text, and the words for what was assumed. The page in a real browser:
tests/e2e/test_predict_html.py."""

import json
from dataclasses import replace

import pytest
from rich.console import Console

from shardwise.core.case import StepSettings
from shardwise.core.errors import InputError
from shardwise.core.mesh import Mesh
from shardwise.core.prediction import AttentionKernel, Precision, Setup, Term
from shardwise.core.prediction_run import PredictionRun
from shardwise.files.document import read_document, write_document
from shardwise.report.common.deliver import show
from shardwise.report.predict import rows
from tests.unit.comparison_example import HOSTILE_MARKUP, HOSTILE_NAME
from tests.unit.prediction_example import MEMORY, TERMS, TOO_MUCH, hostile_run, prediction, run_of, two_plans

MESH = Mesh.parse("dp=2,tp=2")
WIDTHS = (80, 100, 150)


def printed(run: PredictionRun, width: int = 100, *, colour: bool = False) -> str:
    console = Console(width=width, force_terminal=colour, color_system="standard" if colour else None)
    with console.capture() as captured:
        show(run, "terminal", console)
    return captured.get()


def words(text: str) -> str:
    return " ".join(text.replace("│", " ").split())


@pytest.mark.parametrize("width", WIDTHS)
def test_one_plan_is_shown_with_its_terms_its_memory_and_what_was_assumed(width: int) -> None:
    shown = words(printed(run_of(), width))
    assert "llama3-8b under plan rowwise on gpu-x mesh fsdp=2,tp=4: 8 devices" in shown
    assert "A step takes 100 ms: 20.5 k tokens/s per device. It fits, 42.8 GiB left." in shown
    assert "matmul 60.0 ms 60.0 %" in shown
    assert "pipeline bubble" not in shown
    assert "waiting for late ranks is not modelled" in shown
    assert "3 constants: 2 from its data sheet; 1 from a measurement" in shown


def test_what_rounding_leaves_of_a_term_is_no_row() -> None:
    left = prediction(terms=TERMS | {Term.LAUNCH: -1e-18})
    assert "waiting for launches" not in printed(run_of(left))


def test_what_waits_for_launches_is_flagged_from_the_threshold_on() -> None:
    above = prediction(terms={Term.MATMUL: 0.09, Term.LAUNCH: 0.01})
    said = (
        "Launch-bound: 10.0 % of the step the device waits for the host (flagged from 5 % on). "
        "Most of it before layers.*.attention_norm"
    )
    assert said in words(printed(run_of(above), 200))
    below = prediction(terms=TERMS | {Term.LAUNCH: 0.004})
    assert "Launch-bound" not in printed(run_of(below))


def test_several_plans_stand_side_by_side_in_the_order_given() -> None:
    shown = words(printed(two_plans(), 120))
    assert "rowwise 100 ms 1 " in shown
    assert (
        "colwise 105 ms 1.045 19.6 k 83.8 GiB doesn't fit: 9.31 GiB too much +5.00 ms tensor-parallel "
        "communication" in shown
    )


def test_a_term_that_was_switched_off_is_called_off_and_not_0() -> None:
    without = prediction(terms={Term.MATMUL: 0.1}, setup=Setup(without=(Term.TENSOR, Term.LAUNCH)))
    shown = words(printed(run_of(without)))
    assert "tensor-parallel communication off" in shown
    assert "Switched off: tensor-parallel communication, waiting for launches." in shown


def test_memory_says_by_how_much() -> None:
    assert rows.fit_text(MEMORY) == "fits, 42.8 GiB left"
    assert rows.fit_text(TOO_MUCH) == "doesn't fit: 9.31 GiB too much"


def test_every_choice_of_a_setup_is_said() -> None:
    plain = rows.assumptions(StepSettings(1, 8), Setup(), MESH)
    choices = {
        "micro_batches": 4,
        "attention": AttentionKernel.UNFUSED,
        "recompute_attention": True,
        "compiled": True,
        "compiled_loss": True,
        "matmul_dtype": "float8",
        "overlap_data": True,
        "overlap_tensor": True,
        "optimizer_shards": 4,
        "precision": Precision.MASTER,
        "sums_float32": True,
        "waits_for_device": True,
        "without": (Term.LAUNCH,),
    }
    for field, value in choices.items():
        setup = Setup(**{field: value})  # type: ignore[arg-type]
        assert rows.assumptions(StepSettings(1, 8), setup, MESH) != plain, field


def test_what_megatron_s_precision_leaves_out_of_a_step_s_end_is_said() -> None:
    """It is faster than the same run without, though its states are larger."""
    traced, master = (
        " ".join(rows.assumptions(StepSettings(1, 8), Setup(precision=precision), MESH))
        for precision in (Precision.TRACED, Precision.MASTER)
    )
    for said in (
        "no copy of them, or of each one's norm, is launched",
        "that of states in the parameters' dtype",
    ):
        assert said in master
        assert said not in traced


def test_how_much_unfused_attention_keeps_of_its_scores_is_said() -> None:
    unfused = Setup(attention=AttentionKernel.UNFUSED)
    kept, again = (
        " ".join(rows.assumptions(StepSettings(1, 8), setup, MESH))
        for setup in (unfused, replace(unfused, recompute_attention=True))
    )
    assert "of which softmax and dropout keep theirs for the backward" in kept
    assert "of which none is kept for the backward" in again


def test_on_a_cpu_collectives_over_tp_are_said_to_be_hidden_by_nothing() -> None:
    setup, gpu = Setup(overlap_tensor=True), run_of().machine
    for device, said in (("cuda", "run beside the matmuls"), ("cpu", "are hidden by nothing")):
        lines = rows.assumptions(StepSettings(1, 8), setup, MESH, replace(gpu, device=device))
        assert any(f"Collectives over tp {said}" in line for line in lines), device


def test_on_a_cpu_gradients_of_replicas_are_said_to_be_hidden_by_nothing() -> None:
    """As predict/buckets.py has it."""
    setup, gpu = Setup(overlap_data=True), run_of().machine
    for device, said in (
        ("cuda", "beside the last backward"),
        ("cpu", "after the backward, hidden by nothing"),
    ):
        lines = rows.assumptions(StepSettings(1, 8), setup, MESH, replace(gpu, device=device))
        assert any(f"are reduced {said}" in line for line in lines), device


def test_stages_and_context_ranks_are_said() -> None:
    settings, piped = StepSettings(1, 8), Mesh.parse("pp=2,dp=2,tp=2")
    plain = rows.assumptions(settings, Setup(), MESH)
    assert rows.assumptions(settings, Setup(), Mesh.parse("dp=2,cp=2,tp=2")) != plain
    assert rows.assumptions(settings, Setup(), piped) != plain
    assert rows.assumptions(settings, Setup(chunks=2), piped) != rows.assumptions(settings, Setup(), piped)


@pytest.mark.parametrize(
    "run", [run_of(), two_plans(), hostile_run("</script>\x1b[31m")], ids=["one", "two", "hostile"]
)
def test_json_round_trips(run: PredictionRun) -> None:
    document = write_document(run)
    assert read_document(document, PredictionRun) == run
    assert next(iter(json.loads(document))) == "schema_version"


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (b"[", "not valid JSON"),
        (b"{}", "schema_version is None"),
        (b'{"schema_version": 1}', "missing required field `machine`"),
    ],
)
def test_json_that_is_no_prediction_says_why(document: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_document(document, PredictionRun)


@pytest.mark.parametrize(
    "text", [HOSTILE_NAME, HOSTILE_MARKUP, "\x1b]0;gone\x07", "[red]not red[/]", "x" * 100_000]
)
def test_hostile_names_stay_text_in_the_terminal(text: str) -> None:
    shown = printed(hostile_run(text), colour=True)
    assert "\x07" not in shown
    assert "\x1b]" not in shown
    assert len(shown) < 40_000


def test_notes_name_the_plans_that_they_are_of() -> None:
    both, one = replace(prediction(), notes=("a", "b")), replace(prediction("colwise"), notes=("a",))
    assert rows.notes(run_of(both, one)) == ("a", "rowwise: b")
