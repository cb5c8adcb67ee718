"""verify names the cause before what follows from it: one fault that makes many gradients wrong, of each
kind, and what is right beside it. One launch."""

import pytest

from shardwise.core.case import StepSettings
from shardwise.core.finding import Cause, Finding, FindingKind
from shardwise.core.mesh import Mesh
from shardwise.core.verification import Verdict, Verification
from shardwise.verify.claim import Claim
from shardwise.verify.run import verify

NAMES = (
    "router",
    "router_summed",
    "shared_key",
    "shared_key_summed",
    "bias_on_every_rank",
    "input_on_every_rank",
    "sum_with_a_sum_behind",
    "pair",
    "bias_in_the_matmul",
    "summed_after_each_backward",
    "norm_of_a_part",
    "whole_keys_under_cut_queries",
    "gradient_on_one_rank",
)


@pytest.fixture(scope="module")
def found() -> dict[str, Verification]:
    claims = [Claim(f"tests.distributed.cause_models:{name}", "own", name) for name in NAMES]
    settings = StepSettings(batch=4, seq=16, accumulation=2)
    answers = verify(claims, mesh=Mesh.parse("tp=2"), settings=settings, timeout_s=120)
    return {each.plan: each for each in answers}


def first_and_rest(each: Verification) -> tuple[Finding, dict[str, str | None]]:
    """The first finding, and what the others say that they follow from."""
    assert each.verdict is Verdict.WRONG
    first, *others = each.wrong  # without notes
    assert first.follows is None
    return first, {finding.subject: finding.follows for finding in others}


@pytest.mark.parametrize("name", ["router_summed", "shared_key_summed", "pair", "bias_in_the_matmul"])
def test_what_is_mended_is_right(found: dict[str, Verification], name: str) -> None:
    assert found[name].verdict is Verdict.RIGHT


def test_a_router_whose_scores_nobody_sums_stands_before_the_norm_that_follows(
    found: dict[str, Verification],
) -> None:
    first, rest = first_and_rest(found["router"])
    assert (first.subject, first.cause) == ("inner.router.weight", Cause.PARTS_NOT_SUMMED)
    assert first.reason == "each of 2 ranks computes a part of its gradient, and nothing sums them"
    assert rest == dict.fromkeys(("inner.norm.weight", "inner.norm.bias", "table.weight"), first.subject)


def test_rows_of_a_weight_that_nobody_sums_are_told_from_its_whole_ones(
    found: dict[str, Verification],
) -> None:
    first, rest = first_and_rest(found["shared_key"])
    assert (first.subject, first.cause) == ("inner.squeeze.weight", Cause.PARTS_NOT_SUMMED)
    assert first.reason == (
        "each of 2 ranks computes a part of the gradient of its rows 8:12, and nothing sums them; the others "
        "are whole on every rank. It begins in inner: what comes back to the input of inner.out is right"
    )
    assert rest == {"table.weight": "inner.squeeze.weight"}


def test_a_bias_that_every_rank_adds_before_the_sum_is_named(found: dict[str, Verification]) -> None:
    first, rest = first_and_rest(found["bias_on_every_rank"])
    assert (first.subject, first.cause) == ("output", Cause.SUMMED_TOO_OFTEN)
    assert first.reason == (
        "the first module whose output differs is inner: its output isn't the unsharded one. inner.down.bias "
        "is in it 2 times: every rank adds it before the ranks' values are summed"
    )
    assert set(rest.values()) == {"output"}


def test_what_goes_past_and_every_rank_adds_before_the_sum_is_named(found: dict[str, Verification]) -> None:
    first, _ = first_and_rest(found["input_on_every_rank"])
    assert first.cause is Cause.SUMMED_TOO_OFTEN
    assert first.reason.endswith(
        ". inner.norm is in it 2 times: every rank adds it before the ranks' values are summed"
    )


def test_a_sum_whose_backward_sums_again_is_named_by_the_module_that_it_ends(
    found: dict[str, Verification],
) -> None:
    first, rest = first_and_rest(found["sum_with_a_sum_behind"])
    assert (first.subject, first.cause) == ("inner.down.weight", Cause.SUMMED_TOO_OFTEN)
    assert first.reason == (
        "its gradient is 2 times the unsharded one: summed where every rank had the whole. It begins in "
        "inner: what comes back to inner is right"
    )
    assert set(rest.values()) == {"inner.down.weight"}
    assert {"inner.up.weight", "inner.norm.weight", "table.weight"} <= set(rest)


def test_a_sum_of_what_was_accumulated_tells_how_often_each_micro_batch_is_in_it(
    found: dict[str, Verification],
) -> None:
    first, rest = first_and_rest(found["summed_after_each_backward"])
    assert (first.subject, first.cause) == ("inner.norm.weight", Cause.SUMMED_TOO_OFTEN)
    assert (
        first.reason
        == "its micro-batches are in it 2 and 1 times: what was accumulated before is summed again"
    )
    assert first.advice == (
        "Sum over ranks what one backward gives (a parameter's hook sees that), not .grad, in which the "
        "earlier micro-batches are; or sum once, after the last of them."
    )
    assert not rest


def test_a_norm_that_takes_statistics_over_a_part_is_the_first_that_is_wrong(
    found: dict[str, Verification],
) -> None:
    first, rest = first_and_rest(found["norm_of_a_part"])
    assert (first.kind, first.cause) == (FindingKind.OUTPUT_DIFFERS, Cause.PART_FOR_WHOLE)
    assert first.reason == (
        "the first module whose output differs is inner.1: its output isn't the unsharded one. It takes "
        "statistics over all of its input, and a rank has a part of that"
    )
    assert first.advice == "Give it the whole (a gather before it), or let the ranks sum its statistics."
    assert set(rest.values()) == {"output"}


def test_heads_of_which_a_rank_has_a_part_meet_heads_of_which_it_has_all(
    found: dict[str, Verification],
) -> None:
    first, _ = first_and_rest(found["whole_keys_under_cut_queries"])
    assert first.cause is Cause.PARTS_MEET_WHOLES
    assert first.reason == (
        "the first value that differs is what inner.o takes: it isn't the unsharded one. It is made of 1/2 "
        "of the output of inner.q and all of the output of inner.k and inner.v"
    )


def test_a_gradient_that_is_zero_on_one_rank_is_no_part_of_a_sum(found: dict[str, Verification]) -> None:
    first, rest = first_and_rest(found["gradient_on_one_rank"])
    assert (first.subject, first.cause) == ("table.weight", Cause.NOTHING_ARRIVES)
    assert first.reason == "its gradient is zero on rank 1, and right on the others"
    assert not rest
