"""The reader and the analysis on real profiles of other people, where they are at hand: published figures,
and figures counted by hand."""

from pathlib import Path

import pytest

from shardwise.core.decomposition import decompose, work_sets
from shardwise.core.intervals import total_ns
from shardwise.core.timeline import SpanKind, Timeline
from shardwise.profiles.collectives import share
from shardwise.profiles.ranks import read_ranks, trace_files
from shardwise.profiles.read import read_timeline

TRACES = Path(__file__).parents[3] / "shared" / "data" / "traces"
pytestmark = pytest.mark.skipif(
    not TRACES.is_dir(), reason="THE REAL TRACES WERE NOT READ: this checkout has none beside it"
)


def whole(timeline: Timeline) -> dict[str, float]:
    """Microseconds over the whole file, and the share of communication that compute hides."""
    sets = work_sets(timeline, timeline.ranks[0])
    exposed = total_ns(sets.unsplit) - _overlap(timeline)
    communication = total_ns(sets.unsplit)
    return {
        "compute": total_ns(sets.compute) / 1e3,
        "communication": communication / 1e3,
        "exposed": exposed / 1e3,
        "overlap": 1 - exposed / communication if communication else 0.0,
    }


def _overlap(timeline: Timeline) -> int:
    from shardwise.core.intervals import without

    sets = work_sets(timeline, timeline.ranks[0])
    return total_ns(sets.unsplit) - total_ns(without(sets.unsplit, sets.compute))


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("hta-diff-control-A100", {"overlap": 0.4624, "communication": 163_535.0, "exposed": 87_921.0}),
        ("hta-diff-test-V100", {"overlap": 0.7084, "communication": 251_341.0, "exposed": 73_298.0}),
        ("hta-nccl-A100", {"overlap": 0.1561, "compute": 115_655.847}),
    ],
)
def test_overlap_and_compute_are_those_that_hta_finds_without_its_rounding(
    file: str, expected: dict[str, float]
) -> None:
    figures = whole(read_timeline(TRACES / f"{file}.json.gz"))
    for key, value in expected.items():
        assert figures[key] == pytest.approx(value, abs=5e-5 if key == "overlap" else 1e-6), key


def test_on_b200_custom_all_reduces_are_communication_and_with_them_compute_is_htas() -> None:
    """HTA counts vLLM's multimem_all_reduce kernels as compute: 10,771.7 us."""
    timeline = read_timeline(TRACES / "tracelens-eager-B200.json.gz")
    spans = timeline.spans
    custom_ns = sum(
        int(spans.end_ns[span] - spans.start_ns[span])
        for span in timeline.collectives.span.tolist()
        if "multimem" in timeline.name(span)
    )
    assert whole(timeline)["compute"] + custom_ns / 1e3 == pytest.approx(10_771.7, abs=0.05)
    assert sum("multimem" in timeline.name(span) for span in timeline.collectives.span.tolist()) == 73
    assert [timeline.names[op] for op in timeline.collectives.op].count("all_gather") == 1
    assert not any(
        timeline.name(span).startswith("aten::record_stream")
        for span in range(len(spans))
        if spans.kind[span] <= SpanKind.COPY
    )


def test_rccl_s_generic_kernels_are_named_by_their_callers() -> None:
    timeline = read_timeline(TRACES / "tracelens-resnet-MI300.json.gz")
    ops = [timeline.names[op] for op in timeline.collectives.op]
    assert (ops.count("broadcast"), ops.count("all_reduce"), ops.count("unknown collective")) == (6, 6, 5)
    assert timeline.ranks == (0,)  # it ran on device 2


@pytest.mark.parametrize("file", sorted(path.name for path in TRACES.glob("*.json.gz")))
def test_every_window_is_the_sum_of_its_parts_to_the_nanosecond(file: str) -> None:
    timeline = read_timeline(TRACES / file)
    steps = decompose(timeline)
    assert steps
    for each in steps:
        assert each.parts.total_ns == each.window.length_ns
    assert not timeline.losses


@pytest.fixture(scope="module")
def dlrm(tmp_path_factory: pytest.TempPathFactory) -> tuple[Timeline, ...]:
    import tarfile

    folder = tmp_path_factory.mktemp("dlrm")
    with tarfile.open(TRACES / "dlrm-8xV100.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return read_ranks(trace_files(next(folder.iterdir())), workers=1)


def test_on_eight_v100_nearly_all_of_the_collectives_is_waiting_and_the_late_ranks_are_named(
    dlrm: tuple[Timeline, ...],
) -> None:
    _, sharing = share(dlrm)
    assert not sharing.refused
    assert len(sharing.collectives) == 8
    assert sum(len(each.members) for each in sharing.collectives) == 64
    assert sharing.total_ns / 1e6 == pytest.approx(48.5, abs=0.05)
    assert sharing.waiting_ns / sharing.total_ns == pytest.approx(0.965, abs=0.0005)
    assert (sharing.total_ns - sharing.waiting_ns) / 1e6 == pytest.approx(1.7, abs=0.05)
    assert [each.last_rank for each in sharing.collectives] == [7, 7, 7, 7, 7, 5, 5, 4]
    assert [each.op for each in sharing.collectives].count("all_to_all") == 5


def test_a_shifted_clock_changes_nothing_on_real_ranks(dlrm: tuple[Timeline, ...]) -> None:
    _, straight = share(dlrm)
    moved = [
        timeline.shifted(offset)
        for timeline, offset in zip(dlrm, (0, 7, -90, 3_000_000_000, 5, 0, -(10**12), 1), strict=True)
    ]
    _, shifted = share(moved)
    assert [(each.last_rank, each.total_waiting_ns, each.transfer_ns) for each in shifted.collectives] == [
        (each.last_rank, each.total_waiting_ns, each.transfer_ns) for each in straight.collectives
    ]


def test_no_clock_correction_of_the_v100_ranks_is_larger_than_their_microsecond(
    dlrm: tuple[Timeline, ...],
) -> None:
    _, sharing = share(dlrm)
    assert all(clock.offset_ns is not None and abs(clock.offset_ns) <= 2000 for clock in sharing.clocks)
