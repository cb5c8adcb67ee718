"""calibrate's ranks: what fails is left out and said, what there is no time for too, and the rest is
measured."""

import msgspec
import pytest

from shardwise.calibrate.ranks import CalibrateReport, merged
from shardwise.core.collective import TIMED, CollectiveKind
from shardwise.core.sample import ARRIVAL
from shardwise.launch import run_ranks
from tests.matrix import thinned


def reports_of(entry: str, ranks: int = 2) -> list[CalibrateReport]:
    results = run_ranks(
        f"tests.distributed.calibrate_workers:{entry}",
        b"",
        world_size=ranks,
        device_type="cpu",
        timeout_s=120,
    )
    return [msgspec.json.decode(result, type=CalibrateReport) for result in results]


@pytest.mark.parametrize("ranks", thinned((1, 2), lambda ranks: ranks == 1))
def test_a_kernel_that_fails_is_left_out_and_said_on_every_rank_and_the_others_are_there(ranks: int) -> None:
    reports = reports_of("failing", ranks)
    assert len(reports) == ranks
    for report in reports:
        assert [(each.case, each.reason) for each in report.failed[:2]] == [
            ("mm RuntimeError float32 1x64x64x64", "RuntimeError: no such kernel"),
            ("mm MemoryError float32 1x64x64x64", "MemoryError"),
        ]
        assert report.failed[2].reason.startswith("RuntimeError: mat1 and mat2 shapes cannot be multiplied")
        assert len(report.failed) == 3
        assert report.left_out == 0
        assert 0 < report.share <= 1
        assert report.context_bytes > 1e7
    samples, _ = merged(reports)
    assert [each.name for each in samples if each.what == "matmul"] == ["aten::mm tn", "aten::bmm nn"]
    collectives = {(str(kind), 2) for kind in TIMED} if ranks > 1 else set()
    assert {(each.what, each.ranks) for each in samples if each.what in TIMED} == collectives
    assert {each.name for each in samples if each.what == "launch"} == {
        "native forward",
        "native backward",
        "dtensor forward",
        "dtensor backward",
        "collective",
    }
    arrivals = [each for each in samples if each.what == ARRIVAL]
    assert [each.ranks for each in arrivals] == ([2, 2, 2] if ranks > 1 else [])
    assert sorted(each.shape for each in arrivals) == [each.shape for each in arrivals]  # longer and longer
    # a launch is what is left of a difference, which a busy machine can make 0
    assert all(each.seconds > 0 or (each.what == "launch" and each.seconds == 0) for each in samples)


@pytest.mark.parametrize(("ranks", "groups"), thinned([(1, set()), (3, {2, 3})], lambda ranks, _: ranks == 1))
def test_collectives_are_timed_in_every_group_that_the_ranks_make_and_kernels_stop_when_their_time_is_over(
    ranks: int, groups: set[int]
) -> None:
    reports = reports_of("hurried", ranks)
    assert [report.left_out for report in reports] == [7] * ranks
    samples, _ = merged(reports)
    assert not [each for each in samples if each.what == "matmul"]
    assert {each.ranks for each in samples if each.what == CollectiveKind.ALL_TO_ALL} == groups
