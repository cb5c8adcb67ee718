"""verify on GPUs: the same models as tests/distributed/test_verify.py, with NCCL."""

import pytest
import torch

from shardwise.core.finding import Cause
from shardwise.core.mesh import Mesh
from shardwise.core.verification import Verdict
from shardwise.parallel.builtin import builtin_names, builtin_plan
from shardwise.verify.claim import Claim
from shardwise.verify.run import verify

GPUS = torch.cuda.device_count()
MODELS = "tests.distributed.verify_models:"


@pytest.mark.skipif(GPUS < 2, reason=f"2 ranks on NCCL need 2 GPUs; this machine has {GPUS}")
def test_right_plans_are_right_and_a_wrong_one_is_told_on_nccl() -> None:
    cases = [Claim("llama3-8b", builtin_plan(name).to_toml(), name, twin=True) for name in builtin_names()]
    cases += [
        Claim(f"{MODELS}by_hand_right", "own", "right"),
        Claim(f"{MODELS}by_hand_slope_not_summed", "own", "wrong"),
    ]
    *right, wrong = verify(cases, mesh=Mesh.parse("tp=2"), device_type="cuda", timeout_s=300)
    for each in right:
        assert each.verdict is Verdict.RIGHT, (each.plan, each.findings, each.note)
    assert [(finding.subject, finding.cause) for finding in wrong.wrong] == [
        ("slope", Cause.PARTS_NOT_SUMMED)
    ]
