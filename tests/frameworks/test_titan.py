"""torchtitan's models as they are: named, proved and traced, by each of its backends. Skipped where it isn't
installed, but for what is said then."""

from importlib.util import find_spec

import pytest
import torch

from shardwise.core.case import StepSettings
from shardwise.core.errors import ModelError
from shardwise.core.mesh import Mesh
from shardwise.core.plan import StyleName, TheirPlan
from shardwise.core.program import Collective, Op, OpKind
from shardwise.core.verification import Verdict, Verification
from shardwise.models.source import find_model
from shardwise.planner.make import Wish, make_plan
from shardwise.trace.trace import trace
from shardwise.verify.claim import Claim
from shardwise.verify.run import verify

IS_HERE = find_spec("torchtitan") is not None
NEEDS_IT = pytest.mark.skipif(
    not IS_HERE, reason="torchtitan isn't installed, so NONE OF ITS MODELS WAS TRIED"
)
LLAMA, QWEN, DEEPSEEK = (
    "titan:llama3/debugmodel?layers=2",
    "titan:qwen3/debugmodel_moe?layers=1,experts=8",
    "titan:deepseek_v3/debugmodel?layers=2",
)
BACKENDS = ("spmd_types", "partial_dtensor", "full_dtensor")
MODELS = (
    *(f"{LLAMA},backend={backend}" for backend in BACKENDS),
    f"{LLAMA},sequence_parallel=false",
    QWEN,
    DEEPSEEK,
)
MIXTURES_OF_DTENSORS = f"{QWEN},backend=partial_dtensor"
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


@pytest.fixture(scope="module")
def found() -> dict[str, Verification]:
    claims = [Claim(model, "own", model) for model in (*MODELS, MIXTURES_OF_DTENSORS)]
    answers = verify(claims, mesh=Mesh.parse("tp=2"), also_smallest=True, timeout_s=300)
    return {answer.model: answer for answer in answers}


@NEEDS_IT
@pytest.mark.parametrize("model", MODELS)
def test_a_model_of_torchtitan_is_right_by_each_backend(found: dict[str, Verification], model: str) -> None:
    each = found[model]
    assert each.verdict is Verdict.RIGHT, (each.note, each.findings)
    assert each.proof is not None
    assert each.proof.dtype == "float64"
    assert each.proof.worst_gradient_error < 1e-8


@NEEDS_IT
def test_a_mixture_of_dtensors_loses_a_gradient_at_one_sequence(found: dict[str, Verification]) -> None:
    each = found[MIXTURES_OF_DTENSORS]
    assert each.verdict is Verdict.WRONG
    assert all("at batch 1; at batch 2 it is right" in finding.reason for finding in each.wrong)


@NEEDS_IT
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backend_s_step_is_traced_with_flex_attention_as_one_kernel(backend: str) -> None:
    source = find_model(f"{LLAMA},backend={backend}")
    program = trace(
        source, TheirPlan.OWN, Mesh.parse("tp=2"), StepSettings(1, 256), device="cuda", compress=False
    )
    attention = [each for each in program.items() if isinstance(each, Op) and each.kind is OpKind.ATTENTION]
    assert len(attention) == 4
    collectives = [each for each in program.items() if isinstance(each, Collective)]
    assert {"layers.0.attention.wo", "layers.1.feed_forward.w2"} <= {each.module for each in collectives}


@NEEDS_IT
@pytest.mark.parametrize(
    ("model", "attention"), [(LLAMA, "qkv_linear.wqkv"), (QWEN, "qkv_linear.wqkv"), (DEEPSEEK, "wq")]
)
def test_a_plan_is_made_of_a_model_with_flex_attention(model: str, attention: str) -> None:
    made = make_plan(find_model(model), Wish(Mesh.parse("tp=2")))
    inward, outward = (made.plan.rule_for(f"layers.0.attention.{name}") for name in (attention, "wo"))
    assert inward is not None
    assert outward is not None
    assert (inward.style.name, outward.style.name) == (StyleName.COLWISE, StyleName.ROWWISE)


@NEEDS_IT
def test_what_is_not_known_is_said_in_a_line() -> None:
    assert refusal("titan:lama3/debugmodel").endswith(
        'torchtitan has no model "lama3". Did you mean "llama3"? Known: deepseek_v3, flux, gpt_oss, '
        "kimi_k2_7, llama3, muse_glimmer, qwen3, qwen3_5; write FAMILY/FLAVOR."
    )
    assert refusal("titan:llama3/debug") == (
        'model "titan:llama3/debug": torchtitan\'s llama3 has no flavor "debug". Did you mean "debugmodel"? '
        "Known: debugmodel, 1B, 3B, 8B, 70B, 405B."
    )
    assert refusal("titan:llama3/debugmodel?backend=dtensor").endswith(
        'backend is "dtensor". Did you mean "full_dtensor"? Allowed: spmd_types, partial_dtensor, '
        "full_dtensor."
    )
    assert 'no key "layer". Did you mean "layers"?' in refusal("titan:llama3/debugmodel?layer=2")
    assert refusal("titan:llama3/debugmodel?attention=sdpa").endswith("so use flex, flex_flash, or varlen.")
    assert refusal("titan:llama3/debugmodel?layers=two").endswith('layers is "two". Write a number.')


@NEEDS_IT
def test_a_large_flavor_has_torchtitan_s_own_small_one_for_a_twin() -> None:
    source = find_model("titan:llama3/8B")
    assert source.vocab_size == 128256
    twin = source.small(2)
    assert twin is not None
    assert sum(each.numel() for each in twin.build(dtype=torch.float32).parameters()) < 10_000_000


@pytest.mark.skipif(IS_HERE, reason="torchtitan is installed")
def test_where_torchtitan_is_not_installed_it_is_said() -> None:
    assert refusal("titan:llama3/debugmodel") == (
        "model \"titan:llama3/debugmodel\": torchtitan isn't installed. Try: pip install 'shardwise[titan]'."
    )


def refusal(model: str) -> str:
    with pytest.raises(ModelError) as caught:
        find_model(model)
    return str(caught.value)
