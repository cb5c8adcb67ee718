"""Two profiled runs side by side: the same work found in both, books that balance, words that claim no more
than the traces show."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from shardwise.core.difference import Difference, Matched, RunProfile
from shardwise.core.errors import TraceError
from shardwise.files.document import read_document, write_document
from shardwise.files.perfetto import perfetto_trace
from shardwise.profiles.collectives import share
from shardwise.profiles.diff import diff, run_words
from shardwise.profiles.late import late_words
from shardwise.profiles.picture import picture
from shardwise.profiles.ranks import read_ranks
from shardwise.profiles.run import profile_run
from shardwise.report.common.deliver import show
from shardwise.report.diff.html import difference_html, run_html
from tests.unit.chrome_trace import all_reduce, event, kernel, launch, step, write


def profiled(folder: Path, label: str, ranks: Sequence[list[dict[str, Any]]]) -> RunProfile:
    folder.mkdir(exist_ok=True)
    files = [
        write(folder / f"rank{rank}.json", events, rank=rank, world_size=len(ranks))
        for rank, events in enumerate(ranks)
    ]
    timelines, sharing = share(read_ranks(files, workers=1))
    return profile_run(label, timelines, sharing)


def op(name: str, at_us: float, correlation: int, *, shapes: Any = None) -> list[dict[str, Any]]:
    """A CPU op that launches one kernel."""
    args = {"Input Dims": shapes} if shapes is not None else {}
    return [event("cpu_op", name, at_us, 3, args=args), launch(at_us + 1, correlation)]


def step_of(
    kernels: Sequence[tuple[str, str, Any, float]], *, number: int = 0, at_us: float = 0
) -> list[dict[str, Any]]:
    """(op, kernel, shapes, microseconds), one after another on one stream."""
    made = [step(number, at_us, 900)]
    now = at_us + 100
    for index, (name, kernel_name, shapes, length) in enumerate(kernels):
        correlation = 1000 * number + index + 1
        made += op(name, at_us + 4 * index, correlation, shapes=shapes)
        made.append(kernel(kernel_name, now, length, correlation=correlation))
        now += length
    return made


A = step_of(
    [
        ("aten::mm", "gemm_a", [[4, 4], [4, 4]], 50),
        ("aten::add", "void at::native::elementwise_kernel<4, Add>(int)", [[4]], 10),
        ("aten::copy_", "void at::native::elementwise_kernel<4, Copy>(int)", [[4]], 5),
        ("aten::norm", "layer_norm_kernel", [[4]], 7),
    ]
)
B = step_of(
    [
        ("aten::mm", "gemm_b", [[4, 4], [4, 4]], 80),
        ("aten::mul", "void at::native::elementwise_kernel<8, Add>(long)", [[8]], 12),
        ("aten::copy_", "void at::native::elementwise_kernel<4, Copy>(int)", [[4]], 5),
        ("aten::copy_", "void at::native::elementwise_kernel<4, Copy>(int)", [[4]], 5),
        ("aten::rms_norm", "rms_kernel", [[4]], 9),
        ("aten::topk", "sort_kernel", [[4]], 3),
    ]
)


@pytest.fixture
def two(tmp_path: Path) -> Difference:
    return diff(profiled(tmp_path / "a", "A", [A]), profiled(tmp_path / "b", "B", [B]))


def test_work_is_matched_by_op_and_shapes_then_by_name_then_by_class(two: Difference) -> None:
    pairs = {(line.matched, line.what): (round(line.first.ns), round(line.second.ns)) for line in two.lines}
    assert pairs == {
        (Matched.OP, "aten::mm"): (50_000, 80_000),
        (Matched.KERNEL, "at::native::elementwise_kernel in aten::copy_"): (5_000, 10_000),
        (Matched.NAME, "at::native::elementwise_kernel"): (10_000, 12_000),
        (Matched.CLASS, "norm"): (7_000, 9_000),
        (Matched.SECOND, "sort_kernel in aten::topk"): (0, 3_000),
    }


def test_a_copy_that_one_makes_more_often_is_listed(two: Difference) -> None:
    assert [(line.what, line.first.count, line.second.count) for line in two.copies] == [
        ("at::native::elementwise_kernel in aten::copy_", 1, 2)
    ]


def assert_the_books_balance(both: Difference) -> None:
    assert sum(line.delta_ns for line in both.lines) == pytest.approx(both.lines_delta_ns, abs=1e-3)
    assert both.lines_delta_ns - both.at_once_delta_ns == pytest.approx(both.busy_delta_ns, abs=1e-3)
    for run in (both.first, both.second):
        idle = run.parts.cpu_bound_idle_ns + run.parts.other_idle_ns
        assert run.busy_ns + idle == pytest.approx(run.step_ns, abs=1e-3)
        busy = run.parts.compute_ns + run.parts.exposed_ns + run.parts.exposed_copy_ns
        assert busy == pytest.approx(run.busy_ns, abs=1e-3)


def test_the_books_balance(two: Difference) -> None:
    assert_the_books_balance(two)
    assert two.step_delta_ns == 42_000


KERNELS = st.lists(
    st.tuples(
        st.sampled_from(["gemm", "norm_kernel", "ncclDevKernel_AllReduce"]),
        st.integers(0, 300),
        st.integers(1, 90),
        st.integers(1, 3),
    ),
    min_size=1,
    max_size=8,
)


@given(KERNELS, KERNELS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_books_balance_whatever_runs_at_once(
    tmp_path: Path, first: list[tuple[str, int, int, int]], second: list[tuple[str, int, int, int]]
) -> None:
    runs = [
        profiled(
            tmp_path / label,
            label,
            [[kernel(name, at, length, stream=stream) for name, at, length, stream in made]],
        )
        for label, made in (("A", first), ("B", second))
    ]
    assert_the_books_balance(diff(*runs))


def test_several_steps_are_averaged_and_their_spread_is_said(tmp_path: Path) -> None:
    a = [
        each
        for number in range(3)
        for each in step_of([("aten::mm", "gemm", [[2]], 50 + number)], number=number, at_us=1000 * number)
    ]
    b = [
        each
        for number in range(3)
        for each in step_of([("aten::mm", "gemm", [[2]], 50 + number)], number=number, at_us=1000 * number)
    ]
    both = diff(profiled(tmp_path / "a", "A", [a]), profiled(tmp_path / "b", "B", [b]))
    assert [each.step for each in both.first.steps] == [0, 1, 2]
    assert both.lines[0].first.count == 1
    assert both.lines[0].first.ns == pytest.approx(51_000)
    assert both.verdict[0].startswith(
        "B takes as long: 0.684 ms a step against 0.684 ms of A, 1.00 times. Their steps overlap ("
    )
    assert both.verdict[1] == "No part of the step changes by 2 % of it."


def waiting_run(folder: Path, label: str, *, late_us: float) -> RunProfile:
    """Two ranks; rank 1's device is busy late_us longer before an all-reduce that takes 10 us when both are
    there."""
    ranks = []
    for rank in (0, 1):
        begin = 100 + (late_us if rank else 0)
        ranks.append([kernel("gemm", 0, begin), all_reduce(begin, 110 + late_us - begin, elements=250_000)])
    return profiled(folder, label, ranks)


def test_the_verdict_splits_waiting_from_transfer_and_names_the_late_rank(tmp_path: Path) -> None:
    both = diff(waiting_run(tmp_path / "a", "A", late_us=0), waiting_run(tmp_path / "b", "B", late_us=890))
    assert both.verdict[-1] == (
        "B: all-reduce 0.455 ms (1 call) a step: 0.445 ms before the last rank came, all of it for rank 1, "
        "which was in gemm; "
        "10 µs transfer, at 100 GB/s (bus)."
    )
    assert both.second.collectives[0].waiting_ns == 445_000
    assert "exposed waiting" in both.verdict[1]


def test_a_profiled_step_says_which_rank_was_late_and_in_what(tmp_path: Path) -> None:
    assert late_words(waiting_run(tmp_path / "late", "late", late_us=890)) == (
        "1 ms: 55% compute, 44% waiting, 1% transfer",
        "Rank 1 was late: 100% of all waiting was for it, most while it was in gemm. Its compute took "
        "0.99 ms, the others' 0.1 ms.",
    )
    even = waiting_run(tmp_path / "even", "even", late_us=0)
    assert late_words(even)[1] == "No rank was late: none waited long for another."


def test_one_rank_s_words_say_why_there_is_no_split(tmp_path: Path) -> None:
    run = profiled(tmp_path / "a", "A", [[kernel("gemm", 0, 50), all_reduce(60, 40)]])
    assert run_words(run)[1] == (
        "all-reduce 40 µs (1 call) a step. Waiting and transfer can't be told apart: one rank's file only: "
        "when the others arrived isn't "
        "in it, so waiting can't be told from transfer."
    )


def test_equal_layers_are_one_line_and_a_collective_is_known_by_the_module_that_asked(tmp_path: Path) -> None:
    def run(label: str, op_name: str, kernel_name: str) -> RunProfile:
        made = []
        for layer in range(3):
            asked = f"shardwise.{op_name}|layers.{layer}.wo ('layers.*.wo' (rowwise)): Partial -> Shard(1)"
            made += [event("user_annotation", asked, 10 * layer, 5), launch(10 * layer + 1, layer + 1)]
            made.append(kernel(kernel_name, 100 + 20 * layer, 10, correlation=layer + 1))
        return profiled(tmp_path / label, label, [made])

    both = diff(
        run("A", "reduce_scatter", "ncclDevKernel_ReduceScatter_f32"),
        run("B", "all_to_all", "ncclDevKernel_SendRecv"),
    )
    line = both.lines[0]
    assert (line.what, line.matched, line.first.count, line.second.count) == (
        "collectives of layers.*.wo",
        Matched.MODULE,
        3,
        3,
    )
    assert [(use.op, use.origin) for use in both.second.collectives] == [("all_to_all", "layers.*.wo")]


def test_what_is_faster_than_the_links_is_flagged(tmp_path: Path) -> None:
    fast = [
        [all_reduce(100, 10, elements=10_000_000)],
        [all_reduce(100, 10, elements=10_000_000)],
    ]  # 40 MB in 10 us
    run = profiled(tmp_path / "a", "A", fast)
    assert (run.too_fast, run.link_bytes_per_s) == (1, 450e9)
    console = Console(record=True, width=300)
    show(run, "terminal", console)
    assert "1 collectives seem faster than the device's links (450 GB/s a direction)" in console.export_text()
    assert profiled(tmp_path / "b", "B", [[all_reduce(100, 100)], [all_reduce(100, 100)]]).too_fast == 0


def test_a_run_without_any_work_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError) as caught:
        profiled(tmp_path / "a", "A", [[step(0, 0, 10), launch(5, 3)]])
    assert str(caught.value) == (
        "A: no kernel and no CPU op was recorded. "
        "Record with ProfilerActivity.CPU, and CUDA where there is a GPU."
    )


def test_launches_that_left_no_kernel_and_lost_events_are_said(tmp_path: Path) -> None:
    run = profiled(tmp_path / "a", "A", [[*A, launch(50, 77), kernel("broken", 5, 0)]])
    console = Console(record=True, width=120)
    show(run, "terminal", console)
    text = console.export_text()
    assert "1 of 5 launches left no kernel in the file" in text
    assert "lost: 1 x events without a time or a duration" in text


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_the_terminal_shows_both_at_any_width(two: Difference, width: int) -> None:
    console = Console(record=True, width=width)
    show(two, "terminal", console)
    assert max(map(len, console.export_text().splitlines())) <= width


def test_json_has_every_number_and_its_version_first(two: Difference) -> None:
    document = write_document(two)
    assert document.startswith(b'{\n  "schema_version": 1,')
    written = msgspec.json.decode(document)
    assert written["step_delta_ns"] == 42_000
    assert written["second"]["parts"]["total_ns"] == two.second.step_ns
    assert {line["matched"] for line in written["lines"]} == {str(line.matched) for line in two.lines}
    assert msgspec.json.decode(write_document(two.first))["label"] == "A"
    assert read_document(document, Difference) == two
    assert read_document(write_document(two.first), RunProfile) == two.first


HOSTILE = "</script><img src=x onerror=alert(1)>"


def hostile(folder: Path) -> tuple[Difference, str]:
    """Kernels, ops, ranges and labels that would like to be markup."""
    made = step_of(
        [
            (f"aten::{HOSTILE}", f"{HOSTILE} kernel", [[4, 4]], 50),
            ("aten::add", "[bold red]x[/]\x1b[31m", [[4]], 10),
        ]
    )
    runs = [profiled(folder / label, f"{label} {HOSTILE}", [made]) for label in ("A", "B")]
    timelines, _ = share(read_ranks([folder / "A" / "rank0.json"], workers=1))
    drawn = picture(f"A {HOSTILE}", timelines)
    assert drawn is not None
    both = diff(*runs)
    return both, difference_html(both, [drawn, drawn])


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    both, page = hostile(tmp_path)
    assert HOSTILE not in page
    assert "&lt;/script&gt;&lt;img" in page
    assert "<img" not in run_html(both.first)
    console = Console(record=True, width=120)
    show(both, "terminal", console)
    assert "[bold red]x[/]" in console.export_text()
    assert "\x1b[31m" not in console.export_text()


def test_the_picture_covers_every_instant_once(tmp_path: Path) -> None:
    write(tmp_path / "rank0.json", [kernel("gemm", 0, 100), all_reduce(50, 200), kernel("gemm", 300, 50)])
    timelines, _ = share(read_ranks([tmp_path / "rank0.json"], workers=1))
    drawn = picture("A", timelines)
    assert drawn is not None
    assert [(bar.part, bar.start_ns, bar.end_ns) for bar in drawn.rows[0].parts] == [
        ("compute", 0, 100_000),
        ("exposed_communication", 100_000, 250_000),
        ("idle", 250_000, 300_000),
        ("compute", 300_000, 350_000),
    ]
    assert [(bar.start_ns, bar.end_ns) for bar in drawn.rows[0].communication] == [(50_000, 250_000)]


def test_the_aligned_trace_has_all_ranks_on_one_clock_and_can_be_read_again(tmp_path: Path) -> None:
    for rank, offset in ((0, 0.0), (1, 5_000_000.0)):
        write(
            tmp_path / f"rank{rank}.json",
            [all_reduce(offset + 100 + 20 * rank, 50 - 20 * rank), kernel("gemm", offset + 10, 40)],
            rank=rank,
        )
    timelines, _ = share(read_ranks([tmp_path / "rank0.json", tmp_path / "rank1.json"], workers=1))
    import gzip

    drawn = msgspec.json.decode(gzip.decompress(perfetto_trace(timelines)))["traceEvents"]
    collectives = {
        each["pid"]: (each["ts"], each["dur"]) for each in drawn if each.get("cat") == "collective"
    }
    assert collectives == {0: (90.0, 50.0), 1: (110.0, 30.0)}
    assert [(each["name"], each["dur"]) for each in drawn if each.get("cat") in ("waiting", "transfer")] == [
        ("waiting: all_reduce", 20.0),
        ("transfer: all_reduce", 30.0),
        ("transfer: all_reduce", 30.0),
    ]


ODD_EVENTS = st.lists(
    st.builds(
        lambda cat, name, at, length, tid, args: event(cat, name, at, length, tid=tid, args=args),
        st.sampled_from(["kernel", "cpu_op", "cuda_runtime", "user_annotation", "gpu_memcpy"]),
        st.sampled_from(
            ["ncclDevKernel_AllReduce", "gemm", "gloo:all_reduce", "c10d::allreduce_", "ProfilerStep#1",
             "ProfilerStep#2", "shardwise.x|y (z", "module: a.0.b", "aten::copy_", "",
             "\u202e\x00", "x" * 300]
        ),
        st.integers(-5, 60),
        st.integers(0, 60),
        st.integers(0, 2),
        st.dictionaries(
            st.sampled_from(
                ["correlation", "External id", "Input Dims", "Seq", "In msg nelems", "dtype",
                 "Process Group Name", "Collective name"]
            ),
            st.sampled_from([0, 1, 2, "Float", "allreduce", [[2, 3]], [], None, -7, "x"]),
            max_size=4,
        ),
    ),
    min_size=1,
    max_size=14,
)  # fmt: skip


@given(ODD_EVENTS, ODD_EVENTS)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_two_ranks_recorded_is_told_or_refused_in_words(
    tmp_path: Path, first: list[dict[str, Any]], second: list[dict[str, Any]]
) -> None:
    try:
        run = profiled(tmp_path / "both", "both", [first, second])
        alone = profiled(tmp_path / "alone", "alone", [second])
    except TraceError:
        return
    both = diff(run, alone)
    assert_the_books_balance(both)
    console = Console(record=True, width=90)
    show(both, "terminal", console)
    show(run, "terminal", console)
    assert "<img" not in difference_html(both, [])
    assert read_document(write_document(both), Difference) == both
