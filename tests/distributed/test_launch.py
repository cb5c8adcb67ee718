"""Ranks that end well, badly, late or not at all, in interpreters of their own or forked from a warm one:
what the parent returns or says, and that no process is left."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from shardwise.core.errors import MeshError, OptionError, PlanError, RunError, ShardwiseError
from shardwise.launch import Interrupted, is_main, joined, run_ranks, warm_ranks
from tests.matrix import FULL, thinned

WORKERS = Path(__file__).parent
# Nothing is timed here: a run that waits for this instead of a failure says so in its error.
PATIENCE_S = 300.0
# the timeout of runs that end by it
SHORT_S = 6.0


@pytest.fixture(scope="module", autouse=True)
def interpreters_of_their_own() -> Iterator[None]:
    """As users have them."""
    with warm_ranks(warm=False):
        yield


@pytest.fixture(scope="module")
def ranks(request: pytest.FixtureRequest) -> Iterator[None]:
    """In interpreters of their own, or forked."""
    with warm_ranks(warm=request.param == "forked"):
        yield


BOTH_WAYS = pytest.mark.parametrize("ranks", ["started", "forked"], indirect=True)
# where what is tested is the watching process, which knows them by process.RankProcess only
MOSTLY_FORKED = pytest.mark.parametrize(
    "ranks", [pytest.param("started", marks=FULL), "forked"], indirect=True
)


@pytest.fixture(autouse=True)
def workers_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(WORKERS))


@pytest.fixture(autouse=True)
def temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where run_ranks makes its own log folders, so that a test can see what is left there."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr("tempfile.tempdir", None)
    return folder


def launch(
    worker: str,
    payload: bytes = b"",
    *,
    world_size: int = 2,
    timeout_s: float = PATIENCE_S,
    on_event: Callable[[bytes], None] | None = None,
    log_dir: Path | None = None,
    threads_per_rank: int = 1,
) -> list[bytes]:
    return run_ranks(
        f"launch_workers:{worker}",
        payload,
        world_size=world_size,
        device_type="cpu",
        timeout_s=timeout_s,
        on_event=on_event,
        log_dir=log_dir,
        threads_per_rank=threads_per_rank,
    )


class Pids:
    """Takes "RANK PID" events; once all ranks have reported theirs, calls act with them."""

    def __init__(self, world_size: int = 2, act: Callable[[dict[int, int]], None] | None = None) -> None:
        self.by_rank: dict[int, int] = {}
        self._world_size = world_size
        self._act = act

    def __call__(self, event: bytes) -> None:
        rank, pid = map(int, event.split())
        self.by_rank[rank] = pid
        if len(self.by_rank) == self._world_size and self._act:
            self._act(self.by_rank)

    def assert_none_left(self) -> None:
        assert self.by_rank
        assert [pid for pid in self.by_rank.values() if psutil.pid_exists(pid)] == []


def signal_rank_1(number: int) -> Callable[[dict[int, int]], None]:
    return lambda pids: os.kill(pids[1], number)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


@BOTH_WAYS
def test_results_come_back_in_the_order_of_ranks_and_events_in_the_order_of_reports(
    ranks: None, temporary_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    events: list[bytes] = []

    results = launch(
        "tour", bytes(9 * 2**20), world_size=3, on_event=events.append, log_dir=tmp_path / "logs"
    )

    facts = [json.loads(result) for result in results]
    assert [fact["rank"] for fact in facts] == [0, 1, 2]
    for fact in facts:
        assert fact["world_size"] == 3
        assert fact["sum"] == 3
        assert (fact["device"], fact["backend"], fact["under_torchrun"]) == ("cpu", "gloo", False)
        assert fact["payload_bytes"] == 9 * 2**20
        assert fact["environment"]["OMP_NUM_THREADS"] == fact["environment"]["MKL_NUM_THREADS"] == "1"
        assert fact["environment"]["TOKENIZERS_PARALLELISM"] == "true"
        if sys.platform == "linux":
            assert fact["environment"]["THP_MEM_ALLOC_ENABLE"] == "1"
            assert fact["environment"]["GLOO_SOCKET_IFNAME"] == "lo"
    assert [event for event in events if event.startswith(b"event")] == [
        f"event {index}".encode() for index in range(20)
    ]
    assert [len(event) for event in events if event.startswith(b"xx")] == [9 * 2**20] * 3
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == [
        "rank-0.log",
        "rank-1.log",
        "rank-2.log",
    ]
    assert list(temporary_folder.iterdir()) == []


@BOTH_WAYS
def test_a_rank_killed_by_sigkill_is_named_and_the_others_are_stopped(
    ranks: None, temporary_folder: Path
) -> None:
    pids = Pids(act=signal_rank_1(signal.SIGKILL))
    with pytest.raises(RunError) as caught:
        launch("say_pid_and_wait", on_event=pids)
    pids.assert_none_left()
    assert str(caught.value).partition(" Its output:")[0] == (
        'rank 1 was killed by SIGKILL (signal 9) during "round 3 of 12: colwise". The other ranks were '
        "stopped. "
        "If memory ran out, use a smaller --batch or --seq."
    )
    assert caught.value.exit_code == 3


def test_what_a_rank_tells_while_it_is_ended_is_heard(temporary_folder: Path) -> None:
    events: list[bytes] = []
    with pytest.raises(RunError, match=r"^rank 1 was killed by SIGKILL"):
        launch("say_a_last_word_when_asked_to_end", on_event=events.append)
    assert events == [b"what was done until the end"]


@MOSTLY_FORKED
@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        (
            "value error",
            RunError,
            'rank 1 failed: ValueError: the first line during "the check". Its output: {log}',
        ),
        ("plan error", PlanError, 'rule "a" matches nothing. Name a module of the model.'),
        (
            "silent exit",
            RunError,
            'rank 1 ended with exit code 7 and no result during "the check". The other ranks were stopped. '
            "Its output: {log}",
        ),
        pytest.param(
            "no result",
            RunError,
            'rank 1 ended with exit code 0 and no result during "the check". The other ranks were stopped.',
            marks=FULL,
        ),
        (
            "segfault",
            RunError,
            'rank 1 was killed by SIGSEGV (signal 11) during "the check". The other ranks were stopped. '
            "Its output: {log}",
        ),
        pytest.param(
            "terminated",
            RunError,
            'rank 1 was killed by SIGTERM (signal 15) during "the check". The other ranks were stopped.',
            marks=FULL,
        ),
    ],
)
def test_the_rank_that_failed_is_named_and_not_the_one_that_lost_its_connection(
    ranks: None, how: str, error: type[ShardwiseError], message: str, tmp_path: Path
) -> None:
    pids = Pids()
    logs = tmp_path / "logs"
    with pytest.raises(ShardwiseError) as caught:
        launch("fail_on_rank_1", how.encode(), on_event=pids, log_dir=logs)
    pids.assert_none_left()
    assert type(caught.value) is error
    assert str(caught.value) == message.format(log=logs / "rank-1.log")
    assert ("ValueError: the first line" in (logs / "rank-1.log").read_text()) == (how == "value error")


@MOSTLY_FORKED
def test_an_error_names_a_log_that_exists_and_other_logs_are_removed(
    ranks: None, temporary_folder: Path
) -> None:
    with pytest.raises(RunError, match="Its output: ") as caught:
        run_ranks("launch_workers:nothing_of_this_name", b"", world_size=1, device_type="cpu", timeout_s=60)
    message, _, log = str(caught.value).partition(" Its output: ")
    assert (
        message
        == "rank 0 failed: AttributeError: module 'launch_workers' has no attribute 'nothing_of_this_name'."
    )
    assert "nothing_of_this_name" in Path(log).read_text()


@BOTH_WAYS
def test_a_stopped_rank_ends_the_run_by_the_timeout_and_is_named(ranks: None) -> None:
    pids = Pids(act=signal_rank_1(signal.SIGSTOP))
    with pytest.raises(RunError) as caught:
        launch("say_pid_and_wait", on_event=pids, timeout_s=SHORT_S)
    pids.assert_none_left()
    assert str(caught.value) == (
        'nothing was heard from any rank for 6 s, so they were stopped (rank 0: last at "round 3 of 12: '
        'colwise"; rank 1: stopped by SIGSTOP, last at "round 3 of 12: colwise"). If the work needs '
        "longer, raise the timeout."
    )


@MOSTLY_FORKED
def test_a_collective_that_a_busy_rank_never_joins_ends_by_the_timeout(ranks: None) -> None:
    pids = Pids()
    with pytest.raises(RunError, match=r"^rank 0 failed: RuntimeError: .*[Tt]imed out") as caught:
        launch("say_pid_and_keep_noting", on_event=pids, timeout_s=SHORT_S)
    pids.assert_none_left()
    assert "\n" not in str(caught.value)


@MOSTLY_FORKED
def test_an_exception_in_on_event_stops_the_ranks_and_is_raised(ranks: None, temporary_folder: Path) -> None:
    def disk_is_full(_: dict[int, int]) -> None:
        raise OSError(28, "No space left on device")

    pids = Pids(act=disk_is_full)
    with pytest.raises(OSError, match="No space left"):
        launch("say_pid_and_wait", on_event=pids)
    pids.assert_none_left()
    assert list(temporary_folder.iterdir()) == []


@MOSTLY_FORKED
@FULL  # e2e/test_compare.py has two
def test_two_runs_at_once_do_not_collide(ranks: None) -> None:
    def sums(world_size: int) -> list[int]:
        return [json.loads(result)["sum"] for result in launch("tour", world_size=world_size)]

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(sums, [1, 2])) == [[0], [1, 1]]


@MOSTLY_FORKED
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_does_not_hide_why_a_rank_failed(ranks: None, tmp_path: Path) -> None:
    (tmp_path / "rank-1.log").symlink_to("/dev/full")
    with pytest.raises(RunError, match=r'^rank 1 failed: ValueError: the first line during "the check"\.$'):
        launch("fail_on_rank_1", b"value error", log_dir=tmp_path)


def test_logs_that_cannot_be_written_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        RunError,
        match=r"^the ranks' logs can't be written: .*file.*\. Choose another folder, or make room\.$",
    ):
        launch("tour", log_dir=tmp_path / "file")


def test_after_the_warm_process_was_killed_there_is_another() -> None:
    def kill_what_they_came_from(pids: dict[int, int]) -> None:
        psutil.Process(pids[0]).parent().kill()

    with warm_ranks():
        pids = Pids(act=kill_what_they_came_from)
        with pytest.raises(RunError, match=r"^rank 0 was killed by SIGKILL \(signal 9\)"):
            launch("say_pid_and_wait", on_event=pids)
        wait_until(lambda: not any(map(psutil.pid_exists, pids.by_rank.values())))
        assert [json.loads(result)["sum"] for result in launch("tour")] == [1, 1]


def test_warm_ranks_leave_nothing_behind_have_threads_of_their_own_and_are_unlike_one_another() -> None:
    me = psutil.Process()
    before = me.children(recursive=True)
    with warm_ranks():
        first, second = (launch("random_numbers") for _ in range(2))
        assert [launch("threads", threads_per_rank=number) for number in (2, 1)] == [[b"2"] * 2, [b"1"] * 2]
        (warm,) = set(me.children(recursive=True)) - set(before)
        assert warm.num_threads() == 1
    assert me.children(recursive=True) == before
    assert len({*first, *second}) == 4


def test_warm_ranks_begin_with_what_they_would_import_and_do_without_what_is_not_there() -> None:
    with warm_ranks("wave", "no_such_module"):
        assert launch("imported", payload=b"wave") == [b"yes", b"yes"]
    with warm_ranks():
        assert launch("imported", payload=b"wave") == [b"no", b"no"]


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(OptionError, match=r'^device: "tpu" is not offered\. Use cpu or cuda\.$'):
        run_ranks("launch_workers:tour", b"", world_size=1, device_type="tpu", timeout_s=60)


def test_more_ranks_than_gpus_are_refused() -> None:
    import torch

    if torch.cuda.device_count():
        pytest.skip("this machine has a GPU")
    with pytest.raises(
        MeshError,
        match=r"^mesh: 2 ranks on cuda need 2 GPUs; this machine has 0\. Use the CPU, or more machines "
        r"through torchrun\.$",
    ):
        run_ranks("launch_workers:tour", b"", world_size=2, device_type="cuda", timeout_s=60)


def test_launching_imports_no_torch() -> None:
    command = "import sys, shardwise.launch; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", command], check=True)


PARENT = """
import sys
from shardwise.core.errors import ShardwiseError
from shardwise.launch import run_ranks, warm_ranks

def on_event(event):
    print(event.decode(), flush=True)

try:
    name = "launch_workers:say_pid_and_wait"
    with warm_ranks(warm=sys.argv[1] == "forked"):
        run_ranks(name, b"", world_size=2, device_type="cpu", timeout_s=300, on_event=on_event)
except KeyboardInterrupt:
    sys.exit(130)
except ShardwiseError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""


def hear_signals() -> None:
    """A shell's background jobs ignore Ctrl-C, and what they start does too."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


@pytest.fixture
def parent(request: pytest.FixtureRequest) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A process that runs two ranks without end, and the ranks' pids."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(WORKERS), *sys.path))}
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, request.param],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=hear_signals,
    ) as process:
        try:
            assert process.stdout
            pids: dict[str, int] = {}
            while len(pids) < 2:
                rank, _, pid = process.stdout.readline().partition(" ")
                pids[rank] = int(pid)
            yield process, list(pids.values())
        finally:
            process.kill()


OF_SIGNALS = {
    signal.SIGINT: (130, ""),
    signal.SIGTERM: (3, "stopped by SIGTERM; all ranks were ended.\n"),
    signal.SIGHUP: (3, "stopped by SIGHUP; all ranks were ended.\n"),
    signal.SIGKILL: (-signal.SIGKILL, ""),
}
# a signal that is heard is heard alike; a parent that dies unheard is noticed by each kind of rank itself
TELLING = {
    ("started", signal.SIGKILL),
    *(("forked", number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)),
}


@pytest.mark.parametrize(
    ("parent", "number"),
    thinned([(way, each) for way in ("started", "forked") for each in OF_SIGNALS], lambda *of: of in TELLING),
    indirect=["parent"],
)
def test_a_signal_to_the_parent_leaves_no_rank(
    parent: tuple[subprocess.Popen[str], list[int]], number: signal.Signals
) -> None:
    process, pids = parent
    exit_code, stderr = OF_SIGNALS[number]
    process.send_signal(number)
    _, said = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == exit_code
    assert said == stderr
    wait_until(lambda: not any(psutil.pid_exists(pid) for pid in pids))


@MOSTLY_FORKED
def test_signal_handlers_are_those_from_before(ranks: None) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    with pytest.raises(PlanError):
        launch("fail_on_rank_1", b"plan error")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before
    assert issubclass(Interrupted, RunError)


UNDER_TORCHRUN = """
import json, sys
from shardwise.core.errors import ShardwiseError
from shardwise.launch import is_main, joined, run_ranks

assert joined()
events = []

def run(worker, payload, world_size):
    name = f"launch_workers:{worker}"
    return run_ranks(
        name, payload, world_size=world_size, device_type="cpu", timeout_s=300, on_event=events.append
    )

try:
    run("tour", b"", 3)
except ShardwiseError as error:
    if is_main():
        print(error.exit_code, error)

results = [run("tour", bytes(n), 2) for n in (10, 20)]
if is_main():
    print(json.dumps([[json.loads(result) for result in run] for run in results]))
    print(json.dumps([len(event) for event in events]))
else:
    assert results == [[], []]
    assert events == []

try:
    run("fail_on_rank_1", b"plan error", 2)
except ShardwiseError as error:
    sys.stderr.write(f"{type(error).__name__} {error}\\n")
    sys.exit(error.exit_code)
"""


def test_torchruns_ranks_are_joined_and_a_wrong_world_size_is_one_line(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(UNDER_TORCHRUN)
    ended = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)],
        env={**os.environ, "PYTHONPATH": str(WORKERS)},
        capture_output=True,
        text=True,
    )
    wrong, results, events = ended.stdout.splitlines()
    assert wrong == (
        "2 mesh: 3 ranks asked for, but torchrun started 2. Use a mesh of 2 ranks, or start 3 with "
        "torchrun (--nproc-per-node, --nnodes)."
    )
    for run, payload_bytes in zip(json.loads(results), (10, 20), strict=True):
        assert [fact["rank"] for fact in run] == [0, 1]
        assert [(fact["sum"], fact["under_torchrun"], fact["payload_bytes"]) for fact in run] == [
            (1, True, payload_bytes)
        ] * 2
    assert json.loads(events) == [*[len(f"event {index}") for index in range(20)], 9 * 2**20, 9 * 2**20] * 2
    assert ended.returncode != 0
    assert 'PlanError rule "a" matches nothing. Name a module of the model.' in ended.stderr


def test_without_torchrun_this_process_is_the_main_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not joined()
    assert is_main()
    for name, value in {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    assert joined()
    assert not is_main()
