"""The benchmark of reading traces: its made file can be read, its results file round trips, and its table
tells a miss."""

from pathlib import Path

from benchmarks.trace_file import write_trace
from benchmarks.trace_results import Run, Side, blocks, newest_run, verdict
from shardwise.core.timeline import SpanKind
from shardwise.profiles.read import read_timeline
from tests.unit.test_explain_benchmark import environment


def test_the_made_trace_is_one_that_the_reader_takes_whole(tmp_path: Path) -> None:
    write_trace(tmp_path / "t.json", 60_000, rank=3)
    found = read_timeline(tmp_path / "t.json")
    assert not found.losses
    assert found.ranks == (3,)
    assert len(found.windows) == 10
    kinds = [
        int((found.spans.kind == kind).sum())
        for kind in (SpanKind.COMPUTE, SpanKind.COLLECTIVE, SpanKind.LAUNCH, SpanKind.OP)
    ]
    assert kinds == [9900, 100, 10_000, 20_000]
    assert found.launches_without_kernel == (0, 10_000)


def made(peer_cpu_s: tuple[float, ...]) -> Run:
    ours = Side("shardwise", (2.0, 2.0, 2.4), (2.0, 2.0, 2.4), (200_000_000,) * 3)
    peer = Side("peer", peer_cpu_s, peer_cpu_s, (1_000_000_000,) * 3)
    return Run(environment(), 3, (0.0, 1.0), 1000, 220_000_000, "peer 1", (ours, peer), ((8, 2, 1.0, 10**8),))


def test_a_bar_is_met_only_where_every_round_meets_it() -> None:
    assert (
        "| 10 x less CPU than peer 1 | 12.0 x (10.0 to 12.0) | met |"
        in blocks(made((24.0, 24.0, 24.0)))["benchmark-trace-read"]
    )
    assert (
        "| 11.0 x (9.2 to 11.0) | met by the median only |"
        in blocks(made((22.0, 22.0, 22.0)))["benchmark-trace-read"]
    )
    assert "| 9.0 x (7.5 to 9.0) | **MISSED** |" in blocks(made((18.0, 18.0, 18.0)))["benchmark-trace-read"]
    assert verdict([2.4, 2.6], 2.5, least=False) == "met by the median only"


def test_the_file_is_read_back(tmp_path: Path) -> None:
    run = made((24.0, 24.0, 24.0))
    run.write(tmp_path)
    assert newest_run(tmp_path) == run
