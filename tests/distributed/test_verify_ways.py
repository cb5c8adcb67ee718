"""verify where a model has to be run otherwise than it is written, and where a plan is wrong, or can't be
told, beside the gradients of one batch."""

import pytest

from shardwise.core.finding import Cause, FindingKind
from shardwise.core.mesh import Mesh
from shardwise.core.verification import Verdict, Verification
from shardwise.report.verify.rows import verdict_text
from shardwise.verify.attempts import BY_FORMULA, UNROUNDED
from shardwise.verify.claim import Claim
from shardwise.verify.run import verify
from tests.matrix import FULL

MODELS = "tests.distributed.flex_models:"
LATE = "tests.distributed.late_models:"
BESIDE = ("not_taken", "shorter", "trained_when_sharded", "wrong_in_the_last_step", "slightly_off")
NAMES = ("flex_by_heads", "flex_not_summed", "rounded_experts", "wrong_at_one_sequence")


@pytest.fixture(scope="module")
def found() -> dict[str, Verification]:
    claims = [Claim(MODELS + name, "own", name) for name in NAMES]
    claims += [Claim(LATE + name, "own", name) for name in BESIDE]
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


def test_parameters_that_a_factory_makes_shorter_are_cast(found: dict[str, Verification]) -> None:
    each = found["shorter"]
    assert each.proof is not None
    assert (each.proof.dtype, each.proof.otherwise) == ("float64", (UNROUNDED,))
    assert each.proof.worst_gradient_error < 1e-10


def test_parameters_that_no_side_trains_are_named_and_nothing_is_said_of_them(
    found: dict[str, Verification],
) -> None:
    each = found["not_taken"]
    assert each.proof is not None
    assert each.proof.without_gradient == ("long.weight", "long.bias")
    assert "outputs, loss, 5 of 7 gradients" in verdict_text(each)
    assert "2 parameters that have no gradient on either side: long.weight, long.bias" in verdict_text(each)


def test_a_parameter_that_is_trained_when_sharded_alone_is_named_and_explains_the_norm(
    found: dict[str, Verification],
) -> None:
    first, norm = found["trained_when_sharded"].wrong
    assert (first.kind, first.subject) == (FindingKind.WEIGHTS_DIFFER, "up.bias")
    assert first.reason == "it has a gradient under the plan, and none unsharded"
    assert (norm.subject, norm.follows) == ("gradient norm", "up.bias")


def test_a_fault_of_a_later_step_is_told_with_its_step_and_the_weights_that_differ(
    found: dict[str, Verification],
) -> None:
    each = found["wrong_in_the_last_step"]
    (finding,) = each.wrong
    assert finding.subject == "gradient norm"
    assert finding.reason.startswith(
        "the gradients compared are right, and in optimizer step 2 their norm isn't; after 2 steps the "
        "weights differ most in up.weight"
    )
    assert verdict_text(each).startswith("Wrong: gradient norm: the gradients compared are right")


def test_a_factor_that_no_ranks_can_have_made_is_given_no_reason_of_ranks(
    found: dict[str, Verification],
) -> None:
    (finding,) = found["slightly_off"].wrong
    assert (finding.subject, finding.cause, finding.advice) == ("up.weight", Cause.UNKNOWN, None)
    assert finding.reason.startswith("its gradient is (1 + 1.0e-06) times the unsharded one")


@FULL
def test_a_rank_s_own_error_stands_before_those_of_ranks_that_lost_it() -> None:
    claim = Claim(f"{LATE}raises_alone", "own", "own")
    (each,) = verify([claim], mesh=Mesh.parse("tp=2"), timeout_s=60)
    assert each.verdict is Verdict.CRASHES
    assert each.note.startswith("on rank 1: unsharded, however it is run, ")
    assert "ValueError: only on this rank" in each.note
    assert verdict_text(each) == f"Crashes: {each.note}"  # and not that it runs unsharded


@FULL
def test_what_hangs_is_said_to_time_out_and_where() -> None:
    claim = Claim(f"{MODELS}one_rank_stays_away", "own", "own")
    (each,) = verify([claim], mesh=Mesh.parse("tp=2"), timeout_s=20)
    assert each.verdict is Verdict.TIMED_OUT
    assert "nothing was heard from any rank for 20 s, so they were stopped" in each.note
    assert 'one_rank_stays_away under own, sharded"' in each.note
