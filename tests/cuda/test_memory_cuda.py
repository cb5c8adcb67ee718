"""What the allocator of a real GPU had active at a step's peak, against the traced step: one rank's part,
over a process group without communication."""

from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

import pytest
import torch

from benchmarks.gpu_steps import Case, run_case
from benchmarks.measured_steps import step_of
from shardwise.predict.machines import load_machine

GPUS = torch.cuda.device_count()
ALLOWED = 0.02  # workspaces of libraries, which no tensor shows
MIXED = Case("llama3-8b", 4, "unsharded", 1, 8192, "float32", 1, 8, "bfloat16", "float32", "selective-ops")
CASES = (
    MIXED,
    replace(MIXED, compiled_loss=True),
    replace(MIXED, recompute="none", compiled=True, compiled_loss=True),
    Case("llama3-8b", 4, "rowwise", 2, 8192, tp=8),
    Case("llama3-8b", 4, "rowwise@dtensor", 2, 8192, tp=8, recompute="selective-ops"),
    Case("llama3-8b?fused_swiglu=true", 4, "replicated", 1, 8192, recompute="full"),
)


@pytest.mark.skipif(GPUS < 1, reason="no GPU on this machine")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.tag)
def test_the_peak_of_a_step_is_the_traced_one(case: Case) -> None:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        ran = pool.submit(run_case, case).result()
    step = step_of(ran, load_machine("h100-sxm-80gb"))
    print(f"{case.tag}: {step.measured_active_gib:.2f} GiB, predicted {step.predicted_active_gib:.2f}")
    assert step.predicted_active_gib == pytest.approx(step.measured_active_gib, rel=ALLOWED)
