"""AdamW fused, foreach and parameter by parameter: one result, and what each costs as CUDA runs it."""

import functools

import pytest
import torch
from torch import nn

from shardwise.core.case import FOR_LOOP as LOOP
from shardwise.core.case import FOREACH, FUSED, OPTIMIZER_KERNELS, StepSettings
from shardwise.core.mesh import Mesh
from shardwise.core.prediction import Prediction, Setup, Term
from shardwise.core.program import Op, Phase, Program
from shardwise.models.llama import LlamaConfig
from shardwise.models.specs import ModelSpec
from shardwise.parallel.builtin import builtin_plan
from shardwise.predict.machines import load_machine
from shardwise.predict.predict import predict
from shardwise.report.common.plain import repeats
from shardwise.step.train import adamw
from shardwise.trace.trace import trace
from tests.matrix import FULL

SPEC = ModelSpec("small", LlamaConfig(1024, 512, 2, 8, 4, 1024), "")


@functools.cache
def program(kernel: str, plan: str = "rowwise") -> Program:
    settings = StepSettings(2, 256, dtype="bfloat16", optimizer_kernel=kernel)
    return trace(SPEC, builtin_plan(plan), Mesh.parse("tp=2"), settings, device="cuda")


def updates(traced: Program) -> list[Op]:
    return [op for op in traced.ops() if op.phase is Phase.OPTIMIZER]


def predicted(kernel: str) -> Prediction:
    return predict(program(kernel), load_machine("h100-sxm-80gb"), Setup())


def test_all_kernels_update_alike() -> None:
    updated = []
    for kernel in OPTIMIZER_KERNELS:
        torch.manual_seed(0)
        model = nn.Linear(8, 8)
        optimizer = adamw(
            model, learning_rate=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, kernel=kernel
        )
        assert optimizer.defaults["fused"] is (kernel == FUSED)
        assert optimizer.defaults["foreach"] is (kernel == FOREACH)
        for _ in range(3):
            model(torch.ones(2, 8)).square().sum().backward()
            optimizer.step()
        updated.append(model.weight.detach())
    for other in updated[1:]:
        torch.testing.assert_close(other, updated[0])


@pytest.mark.parametrize("plan", ["rowwise", pytest.param("rowwise@dtensor", marks=FULL)])
def test_a_list_is_one_op_of_a_kernel_or_nine_and_a_loop_has_as_many_for_each_parameter(plan: str) -> None:
    names = {kernel: [op.name for op in updates(program(kernel, plan))] for kernel in OPTIMIZER_KERNELS}
    parameters = len(program(FUSED, plan).holdings)
    assert names[FUSED].count("aten::_fused_adamw_") == 1
    assert names[FOREACH].count("aten::_foreach_lerp_") == 1
    assert names[LOOP].count("aten::lerp_") == parameters
    of_lists = [name for name in names[FOREACH] if name != "aten::clone"]
    of_each = [name for name in names[LOOP] if name != "aten::clone"]
    assert len(of_each) == parameters * len(of_lists)


def test_several_passes_move_more_bytes_than_one_and_a_loop_waits_for_launches() -> None:
    n_bytes = {
        kernel: sum(op.read_bytes + op.write_bytes for op in updates(program(kernel)))
        for kernel in OPTIMIZER_KERNELS
    }
    assert n_bytes[FOREACH] == pytest.approx(n_bytes[LOOP], rel=1e-3)
    assert n_bytes[FOREACH] > 2 * n_bytes[FUSED]
    terms = {kernel: dict(predicted(kernel).terms) for kernel in OPTIMIZER_KERNELS}
    assert terms[FUSED][Term.OPTIMIZER] < terms[FOREACH][Term.OPTIMIZER] < terms[LOOP][Term.OPTIMIZER]
    assert terms[LOOP][Term.LAUNCH] > 1.5 * terms[FOREACH][Term.LAUNCH]


def test_lists_hold_what_they_make_between_their_passes() -> None:
    assert predicted(FOREACH).memory.active_bytes >= predicted(FUSED).memory.active_bytes


def test_a_report_says_another_kernel_than_the_fused_one() -> None:
    assert repeats(StepSettings(2, 8)) == []
    assert repeats(StepSettings(2, 8, optimizer_kernel=FOREACH)) == ["AdamW foreach"]
