"""verify where a model has to be run otherwise than it is written, and where a plan is wrong at one batch
only."""

import pytest

from shardwise.core.finding import Cause
from shardwise.core.mesh import Mesh
from shardwise.core.verification import Verdict, Verification
from shardwise.verify.attempts import BY_FORMULA, UNROUNDED
from shardwise.verify.claim import Claim
from shardwise.verify.run import verify
from tests.matrix import FULL

MODELS = "tests.distributed.flex_models:"
NAMES = ("flex_by_heads", "flex_not_summed", "rounded_experts", "wrong_at_one_sequence")


@pytest.fixture(scope="module")
def found() -> dict[str, Verification]:
    claims = [Claim(MODELS + name, "own", name) for name in NAMES]
    answers = verify(claims, mesh=Mesh.parse("tp=2"), also_smallest=True, timeout_s=300)
    return {answer.plan: answer for answer in answers}


def test_flex_attention_is_proved_on_a_cpu_by_its_formula(found: dict[str, Verification]) -> None:
    each = found["flex_by_heads"]
    assert each.verdict is Verdict.RIGHT
    assert each.proof is not None
    assert each.proof.otherwise == (BY_FORMULA,)
    assert each.proof.worst_gradient_error < 1e-10
    assert found["flex_not_summed"].verdict is Verdict.WRONG


def test_experts_that_round_more_than_a_fault_shows_are_proved_without_it(
    found: dict[str, Verification],
) -> None:
    each = found["rounded_experts"]
    assert each.verdict is Verdict.RIGHT, each
    assert each.proof is not None
    assert (each.proof.dtype, each.proof.otherwise) == ("float64", (UNROUNDED,))
    assert each.proof.worst_gradient_error < 1e-10


def test_what_is_wrong_with_one_sequence_only_is_found_and_said_to_be(found: dict[str, Verification]) -> None:
    each = found["wrong_at_one_sequence"]
    assert each.verdict is Verdict.WRONG
    (finding,) = [finding for finding in each.wrong if finding.cause is not Cause.FOLLOWS]
    assert finding.subject == "embed.weight"
    assert finding.reason.endswith("(at batch 1; at batch 2 it is right)")


@FULL
def test_what_hangs_is_said_to_time_out_and_where() -> None:
    claim = Claim(f"{MODELS}one_rank_stays_away", "own", "own")
    (each,) = verify([claim], mesh=Mesh.parse("tp=2"), timeout_s=20)
    assert each.verdict is Verdict.TIMED_OUT
    assert "nothing was heard from any rank for 20 s, so they were stopped" in each.note
    assert 'one_rank_stays_away under own, sharded"' in each.note
