"""Some of the mutants of benchmarks/mutants.py, one of each kind: the plain script and verify agree on what
is harmful, and verify says why."""

import pytest

from benchmarks.mutants import HARMLESS, MUTANTS
from benchmarks.verify_mutants import MESH, reasons, truths
from shardwise.core.verification import Verdict, Verification
from shardwise.verify.claim import Claim
from shardwise.verify.run import verify

NAMES = (
    "drop_attention_norm_sp",
    "drop_attention_wo_nosp",
    "drop_feed_forward_nosp",
    "swap_w1_w2",
    "replicate_ffn_norm",
    "unreduced_table",
    "doubled_layer0_wq",
    "halved_norm",
    "zeroed_layer0_wk",
    "summed_norm",
    "shifted_gradient_tok_embeddings",
    "shifted_output_layer1_wv",
    "unsummed_input_layer1_attention_nosp",
    "unsummed_output_layer0_wo",
    "untied_sp",
    "harmless_rule_shadowed",
    "harmless_embedding_interleaved",
    "harmless_shifted_twice",
)


@pytest.fixture(scope="module")
def found() -> dict[str, Verification]:
    answers = verify(
        [Claim(f"benchmarks.mutants:{name}", "own", name) for name in NAMES], mesh=MESH, timeout_s=60
    )
    return {answer.plan: answer for answer in answers}


@pytest.fixture(scope="module")
def harmful() -> dict[str, bool]:
    return {truth.name: truth.is_harmful for truth in truths(list(NAMES))}


@pytest.mark.parametrize("name", NAMES)
def test_what_is_harmful_is_caught_for_its_reason_and_what_is_not_passes(
    name: str, found: dict[str, Verification], harmful: dict[str, bool]
) -> None:
    expected = MUTANTS[name].expected
    assert harmful[name] == (expected != HARMLESS)
    if harmful[name]:
        assert found[name].verdict in (Verdict.WRONG, Verdict.CRASHES)
        assert expected in reasons(found[name])
    else:
        assert found[name].verdict is Verdict.RIGHT


def test_the_kinds_are_all_here() -> None:
    assert {MUTANTS[name].expected for name in NAMES} == {mutant.expected for mutant in MUTANTS.values()}
