"""A prediction beside a profile: each nanosecond of either is in one line and one term, the same work is
found on both sides, and a constant that is wrong is named."""

import functools
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from shardwise.core.beside import Beside, Found, LineKind, PredictedLine, PredictedStep
from shardwise.core.case import StepSettings
from shardwise.core.difference import Use
from shardwise.core.errors import InputError
from shardwise.core.machine import Machine
from shardwise.core.mesh import Mesh
from shardwise.core.prediction import Setup, Term
from shardwise.core.program import Program
from shardwise.files.document import read_document, write_document
from shardwise.models.llama import LlamaConfig
from shardwise.models.specs import ModelSpec
from shardwise.parallel.builtin import builtin_plan
from shardwise.predict.layout import lay_out
from shardwise.predict.machines import load_machine
from shardwise.predict.predict import prediction_of
from shardwise.predict.step import step_of
from shardwise.predict.streams import sums_of_replicas
from shardwise.profiles.beside import beside
from shardwise.profiles.collectives import share
from shardwise.profiles.ranks import read_ranks, trace_files
from shardwise.profiles.run import profile_run
from shardwise.report.common.deliver import show
from shardwise.report.diff.beside_html import beside_html
from shardwise.trace.trace import trace
from tests.unit.chrome_trace import all_reduce, event, kernel, launch, step, write
from tests.unit.predicted_trace import write_run

SPEC = ModelSpec("small", LlamaConfig(1024, 512, 6, 8, 4, 1024), "")
SETTINGS = StepSettings(2, 256, dtype="bfloat16")


@functools.cache
def program(
    mesh: str = "tp=2", batch: int = 2, spec: ModelSpec = SPEC, *, reduce_once: bool = False
) -> Program:
    asked = replace(SETTINGS, batch=batch, reduce_once=reduce_once)
    return trace(spec, builtin_plan("rowwise"), Mesh.parse(mesh), asked, device="cuda")


def machine() -> Machine:
    found = load_machine("h100-sxm-80gb")
    return replace(found, launch=replace(found.launch, forward_s=2e-6, backward_s=2e-6, collective_s=2e-6))


def predicted(on: Machine, of: Program | None = None, setup: Setup | None = None) -> PredictedStep:
    laid = lay_out(of or program(), on, setup or Setup())
    return step_of(laid, prediction_of(laid), SETTINGS)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks would have recorded, had all been as it is predicted."""
    return write_run(lay_out(program(), machine(), Setup()), tmp_path_factory.mktemp("ran") / "traces")


def laid_beside(step: PredictedStep, folder: Path) -> Beside:
    timelines, sharing = share(read_ranks(trace_files(folder), workers=1))
    return beside(step, profile_run("ran", timelines, sharing), timelines)


def assert_both_sides_add_up(both: Beside) -> None:
    predicted_ns, measured_ns = both.predicted.step_ns, both.measured.step_ns
    assert sum(each.predicted_ns or 0 for each in both.terms) == pytest.approx(predicted_ns, abs=1e-3)
    assert sum(line.predicted.ns for line in both.lines) == pytest.approx(predicted_ns, abs=1e-3)
    assert sum(each.measured_ns or 0 for each in both.terms) == pytest.approx(measured_ns, abs=1e-3)
    assert sum(line.measured.ns for line in both.lines) == pytest.approx(measured_ns, abs=1e-3)
    for each in both.terms:
        its = [line for line in both.lines if line.term == each.term]
        assert sum(line.predicted.ns for line in its) == pytest.approx(each.predicted_ns or 0, abs=1e-3)
        assert sum(line.measured.ns for line in its) == pytest.approx(each.measured_ns or 0, abs=1e-3)
    assert both.predicted.parts.total_ns == pytest.approx(predicted_ns, abs=1e-3)


def test_a_run_that_went_as_predicted_is_off_by_nothing(run: Path) -> None:
    both = laid_beside(predicted(machine()), run)
    assert_both_sides_add_up(both)
    assert abs(both.error or 0) < 0.002
    assert both.matched > 0.999
    assert both.off_ns < 0.02 * both.measured.step_ns
    works = [line for line in both.lines if line.kind is LineKind.WORK and line.measured.ns]
    by_shapes = [line for line in works if line.term != Term.OPTIMIZER]  # the made trace cuts its shapes off
    assert {line.found for line in by_shapes} == {Found.SHAPES}
    assert all(line.predicted.count == line.measured.count for line in works)
    assert {line.module for line in works} >= {"layers.*.attention.wq", "layers.*.feed_forward.w2", "output"}


@pytest.mark.parametrize("mesh", ["fsdp=2,tp=1", "dp=2,tp=1"])
def test_a_prediction_adds_up_whatever_runs_beside_the_compute(mesh: str) -> None:
    setup = Setup(Mesh.parse(mesh), micro_batches=4)
    step = predicted(machine(), program(mesh), setup)
    assert sum(line.use.ns for line in step.lines) == pytest.approx(step.step_ns, abs=1e-3)
    laid = lay_out(program(mesh), machine(), setup)
    assert step.step_ns / 1e9 == pytest.approx(prediction_of(laid).step_s)


def of_kind(step: PredictedStep, op: str, term: Term = Term.DATA) -> dict[tuple[str, str], PredictedLine]:
    """Exchanges of a kind, by pass and module."""
    return {(each.step_pass, each.module): each for each in step.lines if (each.op, each.term) == (op, term)}


def test_waits_for_launches_of_the_step_s_end_aren_t_those_of_its_micro_batches() -> None:
    """A step waits for the host in each micro-batch's passes, and once in its end."""
    on = load_machine("h100-sxm-80gb")
    of_end = []
    for micro_batches in (1, 16):
        step = predicted(on, setup=Setup(micro_batches=micro_batches))
        assert sum(line.use.ns for line in step.lines) == pytest.approx(step.step_ns, abs=1e-3)
        waits = [line for line in step.lines if line.kind is LineKind.ISSUING]
        of_end.append(sum(line.use.ns for line in waits if line.step_pass == "end"))
    assert of_end[0] > 1e6
    assert of_end[1] == pytest.approx(of_end[0], rel=0.01)


@pytest.mark.parametrize("spread_s", [None, 2e-3])
def test_gradients_that_are_summed_beside_the_backward_have_a_line(spread_s: float | None) -> None:
    """What the step waits for them is theirs: collectives that compute waits for take what they take."""
    setup = Setup(Mesh.parse("dp=8,tp=2"), 4, overlap_data=True, spread_s=spread_s)
    laid = lay_out(program("dp=2,tp=2", 4), machine(), setup)
    step = step_of(laid, prediction_of(laid), SETTINGS)
    assert sum(line.use.ns for line in step.lines) == pytest.approx(step.step_ns, abs=1e-3)
    assert step.step_ns / 1e9 == pytest.approx(prediction_of(laid).step_s)
    buckets = sums_of_replicas(laid.last)
    sums = of_kind(step, "all_reduce")
    (of_gradients,) = (line for (step_pass, _), line in sums.items() if step_pass == "backward")
    assert of_gradients.use.count == len(buckets) > 0
    assert of_gradients.own_ns / 1e9 == pytest.approx(float(laid.last.device_s[buckets].sum()))
    for line in sums.values():
        if line.step_pass != "backward":
            assert line.use.ns == pytest.approx(line.own_ns)
    if spread_s is not None:
        waits = of_kind(step, "all_reduce", Term.WAITING)["backward", of_gradients.module]
        assert waits.own_ns / 1e9 == pytest.approx(float(laid.last.waits_s[buckets].sum()))


def test_gradients_that_are_reduced_once_count_in_the_last_backward_alone() -> None:
    counts = {}
    for reduce_once in (True, False):
        traced = program("fsdp=2,tp=1", reduce_once=reduce_once)
        laid = lay_out(traced, machine(), Setup(micro_batches=4))
        step = step_of(laid, prediction_of(laid), SETTINGS)
        assert sum(line.use.ns for line in step.lines) == pytest.approx(step.step_ns, abs=1e-3)
        counts[reduce_once] = {
            module: each.use.count
            for (step_pass, module), each in of_kind(step, "reduce_scatter").items()
            if step_pass == "backward"
        }
    assert counts[True] == {"layers.*": 6, "": 1}
    assert counts[False] == {"layers.*": 24, "": 4}


def test_a_link_at_half_rate_is_named_with_its_share(run: Path) -> None:
    right = machine()
    rates = tuple(
        (
            kind,
            tuple(
                replace(
                    rate,
                    bytes_per_s=rate.bytes_per_s / 2,
                    start_s=rate.start_s * 2,
                    points=tuple((size, 2 * seconds) for size, seconds in rate.points),
                )
                for rate in of_ranks
            ),
        )
        for kind, of_ranks in right.within.rates
    )
    planted = replace(right, within=replace(right.within, rates=rates))
    both = laid_beside(predicted(planted), run)
    assert_both_sides_add_up(both)
    worst = max(both.terms, key=lambda each: abs(each.delta_ns))
    assert worst.term == Term.TENSOR
    assert worst.alike == pytest.approx(2, rel=0.02)
    assert abs(worst.delta_ns) > 0.9 * both.off_ns
    words = " ".join(both.verdict)
    assert "tensor-parallel communication +" in words
    assert "Nearly all lines of tensor-parallel communication are predicted 2.00 times too slow" in words


def test_a_matmul_s_peak_that_is_doubled_is_named(run: Path) -> None:
    right = machine()
    planted = replace(
        right,
        matmuls=tuple(
            (dtype, replace(rate, peak_flops=2 * rate.peak_flops)) for dtype, rate in right.matmuls
        ),
    )
    both = laid_beside(predicted(planted), run)
    assert_both_sides_add_up(both)
    worst = max(both.terms, key=lambda each: abs(each.delta_ns))
    assert worst.term == Term.MATMUL
    assert worst.delta_ns < 0
    assert abs(worst.delta_ns) > 0.9 * both.off_ns
    assert "matmul -" in both.verdict[1]


def test_waiting_stands_by_itself_and_isn_t_said_to_be_predicted(tmp_path: Path) -> None:
    """Rank 1 comes to each collective 50 us after rank 0, which waits for it."""
    for rank in (0, 1):
        events = [
            step(0, 0, 400),
            launch(1, 1),
            kernel("gemm", 10, 100 + 50 * rank, correlation=1),
            launch(3, 2),
            all_reduce(110 + 50 * rank, 90 - 50 * rank, args={"correlation": 2}),
        ]
        write(tmp_path / f"rank{rank}.json", events, rank=rank)
    exchange = replace(line(Term.TENSOR, "all_reduce", 40_000, module=""), kind=LineKind.EXCHANGE)
    both = laid_beside(replace(made_up(exchange), axes=(("tp", 2),)), tmp_path)
    assert_both_sides_add_up(both)
    by_term = {each.term: (each.predicted_ns, each.measured_ns) for each in both.terms}
    assert by_term[Term.TENSOR] == (40_000, 40_000)
    assert by_term[Term.WAITING] == (None, 25_000)  # 50 us on one of two ranks
    assert any("waiting for late ranks" in words and "not modelled" in words for words in both.verdict)


def test_another_mesh_and_another_model_are_said(run: Path) -> None:
    wider = predicted(machine(), program("fsdp=2,tp=2", 4), Setup(Mesh.parse("fsdp=2,tp=2")))
    with pytest.raises(InputError, match=r"of 2 ranks, and the prediction of rowwise is for fsdp=2,tp=2: 4"):
        laid_beside(wider, run)
    other = ModelSpec("other", LlamaConfig(1024, 768, 6, 8, 4, 1024), "")
    with pytest.raises(InputError, match=r"ran another step than was predicted for rowwise of other: 0 %"):
        laid_beside(predicted(machine(), program(spec=other)), run)
    on_cpu = replace(predicted(machine()), together=True, device="cpu")
    with pytest.raises(InputError, match="ran on a device, and was predicted for a cpu"):
        laid_beside(on_cpu, run)


# --------------------------------------------------------------------------------------------- made up


def line(term: Term, op: str, ns: float, shapes: str = "", module: str = "m") -> PredictedLine:
    kind = LineKind.EXCHANGE if term is Term.TENSOR else LineKind.WORK
    return PredictedLine(kind, term.value, "", module, op, shapes, Use(1, ns), ns)


def made_up(*lines: PredictedLine) -> PredictedStep:
    terms = {term: sum(each.use.ns for each in lines if each.term == term) for term in Term}
    return PredictedStep(
        "plan",
        "m",
        "plan",
        "here",
        "cuda",
        (("tp", 1),),
        SETTINGS,
        False,
        tuple((term.value, ns) for term, ns in terms.items() if term is not Term.WAITING),
        lines,
    )


WORK = st.sampled_from(["aten::mm", "aten::add", "aten::clone", "aten::topk"])
LINES = st.lists(
    st.tuples(st.sampled_from([Term.MATMUL, Term.KERNELS, Term.TENSOR]), WORK, st.integers(1, 9**6)),
    min_size=1,
    max_size=6,
    unique_by=lambda made: made[:2],
)
KERNELS = st.lists(
    st.tuples(WORK, st.booleans(), st.integers(0, 300), st.integers(1, 90), st.integers(7, 9)),
    min_size=1,
    max_size=8,
)


@given(LINES, KERNELS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_both_sides_add_up_whatever_was_predicted_and_whatever_ran(
    tmp_path: Path, lines: list[tuple[Term, str, int]], kernels: list[tuple[str, bool, int, int, int]]
) -> None:
    events = [step(0, 0, 900)]
    for number, (op, in_module, at, long, stream) in enumerate(kernels, 1):
        begin = 20 * number
        if in_module:
            events.append(event("user_annotation", "module: m", begin, 10))
        events.append(event("cpu_op", op, begin + 1, 5))
        events.append(launch(begin + 2, number))
        events.append(kernel(f"k{number % 3}", 200 + at, long, stream=stream, correlation=number))
    write(tmp_path / "rank0.json", events, world_size=1)
    assert_both_sides_add_up(
        laid_beside(made_up(*(line(term, op, ns) for term, op, ns in lines)), tmp_path / "rank0.json")
    )


def test_of_ops_inside_one_another_the_one_counts_that_was_predicted(tmp_path: Path) -> None:
    """A profile shows what clone calls; a traced step has clone alone. Of what DTensor does, not of what it
    was asked."""
    events = [
        step(0, 0, 100),
        event("cpu_op", "aten::clone", 1, 8, args={"Input Dims": [[4, 4]]}),
        event("cpu_op", "aten::copy_", 2, 6, args={"Input Dims": [[4, 4], [4, 4]]}),
        launch(3, 1),
        event("cpu_op", "aten::mm", 20, 20, args={"Input Dims": [[4, 8], [8, 4]]}),
        event("cpu_op", "PythonSubclass", 21, 18),
        event("cpu_op", "aten::mm", 22, 9, args={"Input Dims": [[4, 4], [4, 4]]}),
        launch(23, 2),
        kernel("copy_kernel", 30, 10, correlation=1),
        kernel("gemm", 40, 20, correlation=2),
    ]
    write(tmp_path / "rank0.json", events, world_size=1)
    both = laid_beside(
        made_up(
            line(Term.KERNELS, "aten::clone", 9_000, "[4,4]", ""),
            line(Term.KERNELS, "aten::copy_", 1_000, "[9]", ""),
            line(Term.MATMUL, "aten::mm", 21_000, "[4,4] [4,4]", ""),
        ),
        tmp_path / "rank0.json",
    )
    found = {(each.op, each.found): (each.predicted.ns, each.measured.ns) for each in both.lines}
    assert found["aten::clone", Found.SHAPES] == (9_000, 10_000)
    assert found["aten::mm", Found.SHAPES] == (21_000, 20_000)
    assert found["aten::copy_", Found.PREDICTED] == (1_000, 0)


def test_a_report_is_read_on_80_columns_and_says_what_isn_t_modelled(run: Path) -> None:
    both = laid_beside(predicted(machine()), run)
    console = Console(width=80, record=True, file=io.StringIO())
    show(both, "terminal", console)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    assert "By term" in text
    page = beside_html(both)
    assert "What was predicted too fast or too slow" in page
    assert read_document(write_document(both), Beside) == both


def test_names_that_strangers_wrote_stay_text(tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script>"
    events = [
        step(0, 0, 100),
        event("user_annotation", f"module: {hostile}", 1, 8),
        event("cpu_op", hostile, 2, 5),
        launch(3, 1),
        kernel(hostile, 30, 10, correlation=1),
    ]
    write(tmp_path / "rank0.json", events, world_size=1)
    both = laid_beside(made_up(line(Term.MATMUL, "aten::mm", 9)), tmp_path / "rank0.json")
    assert "<script>alert" not in beside_html(both)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"terms": []}, "its times aren't those of a step"),
        ({"terms": [["matmul", 1e308]]}, "its times aren't those of a step"),
        ({"terms": [["matmul", -5.0]]}, "its times aren't those of a step"),
        ({"axes": [["tp", 0]]}, "its mesh has an axis of less than one rank"),
    ],
)
def test_a_saved_step_that_none_can_be_is_refused_in_a_line(change: dict[str, object], what: str) -> None:
    saved = json.loads(write_document(made_up(line(Term.MATMUL, "aten::mm", 9))))
    with pytest.raises(InputError, match=what):
        read_document(json.dumps(saved | change).encode(), PredictedStep, "step-a.json")
