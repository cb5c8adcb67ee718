"""The example as a user runs it: as one process and under torchrun; what it prints, and going on from its
checkpoints on other ranks."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tests.matrix import FULL

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_your_model.py"
LINE = re.compile(r"step +(\d+)   loss (\d+\.\d{4})   gradient norm (\d+\.\d{4})")
# printed to 4 places, from float32
TOLERANCE = 2e-4

Steps = dict[int, tuple[float, float]]


def start(*options: str, ranks: int = 0) -> subprocess.CompletedProcess[str]:
    torchrun = (
        [] if not ranks else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    )
    return subprocess.run(
        [sys.executable, *torchrun, str(EXAMPLE), *options],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def run(*options: str, ranks: int = 0) -> Steps:
    """Loss and gradient norm of each step that it printed, by number."""
    ended = start(*options, ranks=ranks)
    assert ended.returncode == 0, ended.stderr
    matches = [LINE.fullmatch(line) for line in ended.stdout.splitlines()]
    return {int(match[1]): (float(match[2]), float(match[3])) for match in matches if match is not None}


@pytest.fixture(scope="module")
def one_process() -> Steps:
    return run()


def assert_same(got: Steps, want: Steps) -> None:
    assert got.keys() == want.keys()
    for step in want:
        assert got[step] == pytest.approx(want[step], abs=TOLERANCE), step


def test_one_process_learns(one_process: Steps) -> None:
    losses = [loss for loss, _ in one_process.values()]
    assert list(one_process) == list(range(6))
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize(
    ("first", "ranks", "then", "fewer"),
    [
        pytest.param(("--embedding", "routed"), 2, ("--fsdp", "2"), 2, marks=FULL),
        pytest.param(("--fsdp", "2"), 4, ("--embedding", "routed"), 2, marks=FULL),
    ],
    ids=["tp=2, then fsdp=2", "fsdp=2,tp=2, then tp=2"],
)
def test_ranks_print_what_one_process_prints_and_others_go_on_from_their_checkpoint(
    one_process: Steps, tmp_path: Path, first: tuple[str, ...], ranks: int, then: tuple[str, ...], fewer: int
) -> None:
    saved = str(tmp_path / "saved")
    steps = run("--steps", "3", "--save", saved, *first, ranks=ranks)
    steps |= run("--steps", "3", "--resume", saved, *then, ranks=fewer)
    assert_same(steps, one_process)


def test_fsdp_that_does_not_divide_the_ranks_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), "--fsdp", "2"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert ended.value.code == 2
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .endswith(
            "error: --fsdp needs ranks: torchrun --nproc-per-node N examples/train_your_model.py --fsdp M"
        )
    )


@FULL
def test_the_example_of_a_test_runs_under_pytest() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "examples/test_my_step.py"],
        cwd=EXAMPLE.parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stdout
    assert "1 passed" in ended.stdout


@FULL
@pytest.mark.parametrize("group", ["theirs", "none yet"])
def test_a_step_is_held_on_torchruns_own_ranks(group: str) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ended = subprocess.run(
        [*torchrun, str(Path(__file__).with_name("held_step.py")), group],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path])},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split() == ["told"] * 2
