"""NeMo Automodel's plans, with what its recipes call after the backward. They run in `make
test-frameworks`."""

import importlib.util
from typing import Any

import pytest
import torch

from shardwise.core.case import StepSettings
from shardwise.core.errors import ModelError
from shardwise.core.mesh import Mesh
from shardwise.core.plan import TheirPlan
from shardwise.core.program import Phase
from shardwise.core.verification import Verdict, Verification
from shardwise.models.source import find_model
from shardwise.trace.trace import trace
from shardwise.verify.claim import Claim
from shardwise.verify.run import verify

if importlib.util.find_spec("nemo_automodel") is None:
    pytest.skip("nemo-automodel isn't installed: make test-frameworks", allow_module_level=True)

# what transformers, torch and Automodel say of each other's versions
pytestmark = pytest.mark.filterwarnings("default")

LLAMA = "automodel:llama"
# q_norm and k_norm see a part of the heads on each rank: Automodel sums their gradients in a call of its own
QWEN3 = "automodel:qwen3"
RIGHT = (LLAMA, f"{LLAMA}?sequence_parallel=true", QWEN3, "automodel:qwen2", f"{QWEN3}?force_hf=true")


@pytest.fixture(scope="module")
def found() -> dict[str, Verification]:
    claims = [Claim(name, "own", name) for name in RIGHT]
    return {each.plan: each for each in verify(claims, mesh=Mesh.parse("tp=2"), timeout_s=300)}


@pytest.mark.parametrize("name", RIGHT)
def test_automodel_s_plans_are_right(found: dict[str, Verification], name: str) -> None:
    each = found[name]
    assert each.verdict is Verdict.RIGHT, each
    assert each.twin
    assert each.sharded is not None
    assert each.sharded.inner_sharded > 0.99 * each.sharded.inner_total


def test_explain_shows_the_sums_of_replicas_after_the_backward() -> None:
    source = find_model(f"{QWEN3}?num_hidden_layers=2")
    program = trace(source, TheirPlan.OWN, Mesh.parse("tp=2"), StepSettings(2, 16))
    after = [call for call in program.collectives() if call.phase is Phase.REDUCE]
    # counts of gradients; means of what all ranks computed alike, and sums of what each had a part of
    counts, means, sums = (call.call for call in after)
    assert counts.dtype == "int32"
    config: Any = source.build(dtype=torch.float32).config
    assert means.payload_bytes == 4 * (2 * 2 + 1) * config.hidden_size
    assert sums.payload_bytes == 4 * 2 * 2 * config.head_dim


def test_an_unknown_type_is_a_line() -> None:
    with pytest.raises(ModelError, match=r'Did you mean "qwen3"'):
        find_model("automodel:qwen33")
