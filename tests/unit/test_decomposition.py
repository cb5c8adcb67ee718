"""What a step's window is made of: by priority, and idle time by whose fault it is."""

from pathlib import Path

from shardwise.core.decomposition import decompose
from shardwise.core.parts import Parts
from shardwise.profiles.read import read_timeline
from tests.unit.chrome_trace import all_reduce, event, kernel, launch, write


def parts(folder: Path, events: list[dict[str, object]]) -> Parts:
    (found,) = decompose(read_timeline(write(folder / "t.json", events)))
    assert found.parts.total_ns == found.window.length_ns
    return found.parts


def test_what_runs_at_once_counts_once_by_priority(tmp_path: Path) -> None:
    found = parts(
        tmp_path,
        [
            kernel("gemm", 0, 100),
            all_reduce(50, 100),
            event("gpu_memcpy", "Memcpy DtoD (Device -> Device)", 120, 80, args={"stream": 9}),
            kernel("gemm", 190, 60, stream=9),
        ],
    )
    assert found == Parts(compute_ns=160_000, exposed_communication_ns=50_000, exposed_copy_ns=40_000)


def test_idle_before_the_launch_of_the_next_work_is_the_cpu_s(tmp_path: Path) -> None:
    """Idle from 100 to 200: the next work was launched at 130. From 250 to 300: it had been launched long
    before."""
    found = parts(
        tmp_path,
        [
            launch(-50, 1), kernel("a", 0, 100, correlation=1),
            launch(130, 2), kernel("b", 200, 50, correlation=2),
            launch(140, 3), kernel("c", 300, 10, correlation=3),
        ],
    )  # fmt: skip
    assert (found.cpu_bound_idle_ns, found.other_idle_ns) == (30_000, 120_000)


def test_idle_before_work_of_which_no_launch_is_known_blames_nobody(tmp_path: Path) -> None:
    found = parts(tmp_path, [kernel("a", 0, 100), kernel("b", 200, 50)])
    assert (found.cpu_bound_idle_ns, found.other_idle_ns) == (0, 100_000)


def test_parts_add_and_subtract() -> None:
    one, other = Parts(compute_ns=3, other_idle_ns=1), Parts(compute_ns=1, exposed_waiting_ns=2)
    assert one + other == Parts(compute_ns=4, exposed_waiting_ns=2, other_idle_ns=1)
    assert (one - other).compute_ns == 2
    assert one.scaled(2) == Parts(compute_ns=6, other_idle_ns=2)
    assert other.exposed_ns == 2
