"""Which GPUs ran what, when, with which torch: a table of the docs, from the files that the runs wrote."""

import json
from collections.abc import Iterator

import msgspec

from benchmarks.cuda import WHAT, CudaRun
from benchmarks.hf_results import table
from benchmarks.measured_steps import STEPS
from benchmarks.results import RESULTS

KERNELS = next(iter(STEPS.values())).parent / "h100-kernels.json"


def blocks() -> dict[str, str]:
    head = ["GPU", "torch", "when", "what ran", "file"]
    return {"benchmark-run-on": table(head, [*_kernels(), *_steps(), *_runs()])}


def _kernels() -> Iterator[list[str]]:
    found = json.loads(KERNELS.read_text(encoding="utf-8"))
    what = f"{len(found['samples'])} timings of kernels, on one GPU"
    yield [found["device"], found["torch"], found["date"], what, f"`benchmarks/data/{KERNELS.name}`"]


def _steps() -> Iterator[list[str]]:
    for path in STEPS.values():
        found = json.loads(path.read_text(encoding="utf-8"))
        steps = found["steps"]
        devices = " and ".join(dict.fromkeys(step["device"] for step in steps))
        versions = " and ".join(dict.fromkeys(step["torch"] for step in steps))
        what = f"{len(steps)} steps of one rank's part, on one GPU"
        yield [devices, versions, found["date"], what, f"`benchmarks/data/{path.name}`"]


def _runs() -> Iterator[list[str]]:
    """Of `make cuda`."""
    for path in sorted(RESULTS.glob(f"????-??-??-{WHAT}.json")):
        run = msgspec.json.decode(path.read_bytes(), type=CudaRun)
        tests = run.tests
        what = (
            f"make cuda: {tests.passed} tests passed, {tests.failed} failed, {tests.skipped} skipped; "
            f"{len(run.steps) + len(run.unpredicted)} steps"
        )
        yield [f"{run.gpus} x {run.gpu}", run.torch, run.day, what, f"`benchmarks/results/{path.name}`"]
