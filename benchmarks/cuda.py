"""What a machine with a GPU can show, in one command and under ten minutes: `make cuda`.

    python -m benchmarks.cuda     writes benchmarks/results/DATE-cuda.json

First tests/cuda (what needs more GPUs than there are is skipped, and counted), then steps of one rank's
part (benchmarks/gpu_steps.py), each beside its prediction where a machine file is of this GPU. It keeps to a
budget of time: what doesn't fit isn't started, and is listed. Without a GPU it says so, and ends with exit
code 2. Exit code 1: a test or a step failed.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from xml.etree import ElementTree

from benchmarks.gpu_steps import TIMEOUT_S, Case, run_apart, small_cases
from benchmarks.hf_results import table
from benchmarks.measured_steps import Step, step_of
from benchmarks.results import RESULTS, Saved, command_line, now
from shardwise.core.machine import Machine
from shardwise.predict.machines import load_machine, machine_names

WHAT = "cuda"
BUDGET_S = 570.0
OF_TESTS = 0.45
"""Share of the budget that the tests may take."""
LEAST_S = 25.0
"""Too little for one more step: a process imports torch, builds a model, and runs five steps."""
NO_GPU = 2


@dataclass(frozen=True, slots=True)
class Suite:
    """How tests/cuda ended. is_whole: all were run, within the budget."""

    passed: int
    failed: int
    skipped: int
    seconds: float
    is_whole: bool


@dataclass(frozen=True, slots=True)
class CudaRun(Saved):
    """A run on one machine. memory_bytes: of a GPU. machine: whose constants predicted; None: none is of this
    GPU. unpredicted: (tag, measured seconds). left_out: steps that weren't started, or failed, and why."""

    command: str
    started: str
    gpu: str
    gpus: int
    memory_bytes: int
    torch: str
    machine: str | None
    budget_s: float
    took_s: float
    tests: Suite
    steps: tuple[Step, ...]
    unpredicted: tuple[tuple[str, float], ...]
    left_out: tuple[tuple[str, str], ...]
    what: str = WHAT
    schema_version: int = 1


class Budget:
    """Seconds that a run may take, from now on."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds, self._clock = seconds, clock
        self._began = clock()

    @property
    def taken_s(self) -> float:
        return self._clock() - self._began

    @property
    def left_s(self) -> float:
        return max(0.0, self.seconds - self.taken_s)


def run_tests(budget: Budget) -> Suite:
    """tests/cuda in a process group of its own, which is ended where its share of the budget is over."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "tests.xml"
        plain = ("-q", "-p", "no:cacheprovider", "-p", "no:xdist")
        command = [sys.executable, "-m", "pytest", "tests/cuda", *plain]
        began = time.monotonic()
        process = subprocess.Popen(
            [*command, f"--junitxml={report}"], stdout=sys.stderr, start_new_session=True
        )
        try:
            process.wait(min(budget.seconds * OF_TESTS, budget.left_s))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        seconds = time.monotonic() - began
        if not report.exists():
            return Suite(0, 0, 0, seconds, is_whole=False)
        return counted(report.read_text(encoding="utf-8"), seconds)


def counted(report: str, seconds: float) -> Suite:
    """Of pytest's own report."""
    suites = list(ElementTree.fromstring(report).iter("testsuite"))
    total, errors, failures, skipped = (
        sum(int(suite.get(name, 0)) for suite in suites)
        for name in ("tests", "errors", "failures", "skipped")
    )
    failed = errors + failures
    return Suite(total - failed - skipped, failed, skipped, seconds, is_whole=True)


def within(cases: Sequence[Case], budget: Budget) -> Iterator[tuple[int, Case, float | None]]:
    """(number, case, seconds that it may take); None where there is too little left to start it."""
    for number, case in enumerate(cases):
        left = budget.left_s
        yield number, case, min(TIMEOUT_S, left) if left >= LEAST_S else None


def machine_of(gpu: str, memory_bytes: float) -> Machine | None:
    """The shipped machine whose name begins with a word of the GPU's own, and whose memory is nearest (of
    equals that of the shortest name, the others being variants); None where none is within a tenth."""
    words = gpu.lower().replace("-", " ").split()
    alike = [load_machine(name) for name in machine_names() if name.partition("-")[0] in words]
    near = [each for each in alike if abs(each.memory_bytes / memory_bytes - 1) < 0.1]
    return min(near, key=lambda each: (abs(each.memory_bytes - memory_bytes), len(each.name)), default=None)


def run(
    budget: Budget, machine: Machine | None, gpu: str, gpus: int, memory_bytes: int, torch: str
) -> CudaRun:
    """Suite, then steps, until the budget is used."""
    started = now()
    tests = run_tests(budget)
    steps: list[Step] = []
    unpredicted: list[tuple[str, float]] = []
    left_out: list[tuple[str, str]] = []
    for number, case, allowed_s in within(small_cases(), budget):
        if allowed_s is None:
            left_out.append((case.tag, "no time was left"))
            continue
        print(f"{case.tag} ({budget.left_s:.0f} s left)", file=sys.stderr, flush=True)
        ran = run_apart(number, timeout_s=allowed_s)
        if isinstance(ran, str):
            left_out.append((case.tag, ran.strip().splitlines()[-1][:200] if ran.strip() else "it failed"))
        elif machine is None:
            unpredicted.append((case.tag, median(ran["steps"])))
        else:
            steps.append(step_of(ran, machine))
    return CudaRun(
        command_line("benchmarks.cuda"),
        started.isoformat(timespec="seconds"),
        gpu,
        gpus,
        memory_bytes,
        torch,
        machine.name if machine is not None else None,
        budget.seconds,
        budget.taken_s,
        tests,
        tuple(steps),
        tuple(unpredicted),
        tuple(left_out),
    )


def told(found: CudaRun) -> str:
    """The run, for the one who waits for it."""
    tests = found.tests
    lines = [
        f"{found.gpus} x {found.gpu}, torch {found.torch}: {found.took_s:.0f} of {found.budget_s:.0f} s",
        f"tests/cuda: {tests.passed} passed, {tests.failed} failed, {tests.skipped} skipped (they need more "
        f"GPUs){'' if tests.is_whole else '; not all were run: out of time'}",
    ]
    if found.machine is None:
        lines.append(
            "No machine file is of this GPU, so nothing is predicted: shardwise calibrate makes one."
        )
    body = [
        [
            step.tag,
            f"{step.measured_s * 1e3:.1f} ms",
            f"{step.predicted_s / step.measured_s - 1:+.1%}",
            f"{step.measured_active_gib:.2f} GiB",
            f"{step.predicted_active_gib / step.measured_active_gib - 1:+.1%}",
        ]
        for step in found.steps
    ]
    if body:
        lines.append(table(["step", "measured", "predicted", "active", "predicted"], body))
    lines += [f"{tag}: {seconds * 1e3:.1f} ms" for tag, seconds in found.unpredicted]
    lines += [f"left out: {tag}: {why}" for tag, why in found.left_out]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cuda", description=(__doc__ or "").partition("\n\n")[0]
    )
    parser.add_argument("--budget", type=float, default=BUDGET_S, metavar="SECONDS")
    parser.add_argument("--machine", help="whose constants predict; by default the one of this GPU")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder of the results file")
    given = parser.parse_args()
    budget = Budget(given.budget)
    import torch

    if not torch.cuda.is_available():
        print(
            f"make cuda: torch {torch.__version__} sees no GPU here, so nothing was run. Use a machine that "
            "has one.",
            file=sys.stderr,
        )
        return NO_GPU
    properties = torch.cuda.get_device_properties(0)
    memory = properties.total_memory
    machine = load_machine(given.machine) if given.machine else machine_of(properties.name, memory)
    found = run(budget, machine, properties.name, torch.cuda.device_count(), memory, torch.__version__)
    print(told(found))
    print(f"written: {found.write(given.out)}", file=sys.stderr)
    is_failed = found.tests.failed or any(why != "no time was left" for _, why in found.left_out)
    return 1 if is_failed else 0


if __name__ == "__main__":
    sys.exit(main())
