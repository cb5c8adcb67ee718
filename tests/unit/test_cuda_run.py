"""make cuda: what it runs within its budget, and what it says."""

import pytest
import torch

from benchmarks import cuda
from benchmarks.cuda import Budget, CudaRun, Suite, counted, machine_of, told, within
from benchmarks.gpu_steps import TIMEOUT_S, small_cases


class Clock:
    """Seconds that pass only when they are told to."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_a_step_that_the_budget_has_no_time_for_is_not_started() -> None:
    clock = Clock()
    budget, allowed = Budget(300.0, clock), []
    for _, _, seconds in within(small_cases()[:5], budget):
        allowed.append(seconds)
        clock.now_s += 90.0
    assert allowed == [TIMEOUT_S, TIMEOUT_S, 120.0, 30.0, None]


def test_pytest_s_report_is_counted() -> None:
    suite = '<testsuites><testsuite tests="9" errors="1" failures="2" skipped="3"/></testsuites>'
    assert counted(suite, 4.0) == Suite(3, 3, 3, 4.0, is_whole=True)


@pytest.mark.parametrize(
    ("gpu", "gigabytes", "machine"),
    [
        ("NVIDIA H100 80GB HBM3", 85.0, "h100-sxm-80gb"),
        ("NVIDIA H200", 150.0, "h200-sxm-141gb"),
        ("NVIDIA A100-SXM4-40GB", 42.4, "a100-sxm-40gb"),
        ("NVIDIA L4", 24.0, None),
        ("NVIDIA H100 NVL", 300.0, None),
    ],
)
def test_a_gpu_s_machine_file_is_found_by_its_name_and_memory(
    gpu: str, gigabytes: float, machine: str | None
) -> None:
    found = machine_of(gpu, gigabytes * 1e9)
    assert (found.name if found is not None else None) == machine


def test_what_was_not_run_is_told() -> None:
    tests = Suite(10, 1, 5, 200.0, is_whole=False)
    left_out = (("a step", "no time was left"),)
    run = CudaRun(
        "c", "2026-11-30", "G", 1, 1, "2.13", None, 570.0, 569.0, tests, (), (("b", 0.5),), left_out
    )
    text = told(run)
    assert "10 passed, 1 failed, 5 skipped" in text
    assert "not all were run: out of time" in text
    assert "No machine file is of this GPU" in text
    assert "left out: a step: no time was left" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["cuda"])
    assert cuda.main() == cuda.NO_GPU == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("make cuda: torch ")
    assert line.endswith("sees no GPU here, so nothing was run. Use a machine that has one.")
