"""Profiles that real ranks record: the rank that was slowed down on purpose is blamed, and the waiting is
what a clock of theirs says."""

from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

from shardwise.core.decomposition import decompose
from shardwise.core.timeline import Timeline
from shardwise.core.waiting import Sharing
from shardwise.launch import run_ranks
from shardwise.profiles.collectives import share
from shardwise.profiles.ranks import read_ranks, trace_files
from tests.distributed.profile_workers import STEPS, Job
from tests.matrix import thinned

LATE = {2: [1, 0, 1], 3: [2, 0, 1], 4: [3, 1, 2]}
OPS = ["all_reduce", "all_gather", "all_to_all"]
# between a rank's look at the clock and the profiler's
ALLOWED_S = 0.03


@dataclass(frozen=True, slots=True)
class Recorded:
    """came_ns: of each rank, when it came to each barrier and each collective of the marked steps."""

    world: int
    timelines: tuple[Timeline, ...]
    sharing: Sharing
    came_ns: list[list[int]]

    def waited_s(self, rank: int, number: int) -> float:
        return (max(came[number] for came in self.came_ns) - self.came_ns[rank][number]) / 1e9


@pytest.fixture(scope="module", params=thinned((2, 3, 4), lambda world: world == 3))
def recorded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    world: int = request.param
    folder = tmp_path_factory.mktemp(f"profile-{world}") / "traces"
    job = msgspec.json.encode(Job(str(folder), LATE[world]))
    results = run_ranks(
        "tests.distributed.profile_workers:record", job, world_size=world, device_type="cpu", timeout_s=300
    )
    timelines, sharing = share(read_ranks(trace_files(folder)))
    return Recorded(
        world, timelines, sharing, [msgspec.json.decode(result, type=list[int]) for result in results]
    )


def test_every_rank_s_file_says_whose_it_is_and_has_the_marked_steps(recorded: Recorded) -> None:
    assert [timeline.ranks for timeline in recorded.timelines] == [(rank,) for rank in range(recorded.world)]
    for timeline in recorded.timelines:
        assert [window.step for window in timeline.windows] == list(range(STEPS))
        assert not timeline.losses
        assert any(name == "module: 0" for name in timeline.names)


def test_the_late_rank_is_blamed_and_the_waiting_is_what_was_planted(recorded: Recorded) -> None:
    planted = [each for each in recorded.sharing.collectives if each.step is not None and each.op in OPS]
    assert [each.op for each in planted] == OPS * STEPS
    for number, (each, late) in enumerate(zip(planted, LATE[recorded.world] * STEPS, strict=True)):
        assert each.last_rank == late
        for member in each.members:
            waited_s = recorded.waited_s(member.rank, 2 * number + 1)
            assert each.waiting_ns(member) / 1e9 == pytest.approx(waited_s, abs=ALLOWED_S)
        assert each.blame is not None
        assert each.blame.is_cpu
        assert each.blame.doing.startswith("its CPU in no recorded op inside the planted sleep")


def test_the_parts_add_up_and_hold_the_planted_waiting(recorded: Recorded) -> None:
    for rank, timeline in enumerate(recorded.timelines):
        for step, each in enumerate(decompose(timeline)):
            meetings = range(2 * len(OPS) * step, 2 * len(OPS) * (step + 1))
            waited_s = sum(recorded.waited_s(rank, number) for number in meetings)
            assert each.parts.total_ns == each.window.length_ns
            assert each.parts.exposed_waiting_ns / 1e9 == pytest.approx(waited_s, abs=2 * ALLOWED_S)


def test_a_truncated_file_of_one_rank_loses_its_end_only(tmp_path: Path) -> None:
    """What the other ranks have is read, and what can't be matched is counted."""
    from tests.unit.chrome_trace import all_reduce, write

    write(tmp_path / "rank0.json", [all_reduce(100 * at, 30) for at in range(9)], rank=0)
    text = write(
        tmp_path / "rank1.json", [all_reduce(100 * at + 5, 25) for at in range(9)], rank=1
    ).read_bytes()
    (tmp_path / "rank1.json").write_bytes(text[: len(text) * 2 // 3])
    _, sharing = share(read_ranks(trace_files(tmp_path), workers=1))
    assert 3 <= len(sharing.collectives) < 9
    assert sharing.refused[0].why == "not recorded by all ranks of the group"
