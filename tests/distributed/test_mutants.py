"""Some of the mutants of benchmarks/mutants.py and axis_mutants.py, one of each kind: the plain scripts and
verify agree on what is harmful, and verify says why."""

from functools import lru_cache

import pytest

from benchmarks import axis_ranks
from benchmarks.axis_mutants import MUTANTS as AXIS_MUTANTS
from benchmarks.mutants import HARMLESS, MUTANTS
from benchmarks.verify_mutants import MESH, reasons, truths
from shardwise.core.mesh import NAMES as NAMES_OF_AXES
from shardwise.core.verification import Verdict, Verification
from shardwise.verify.claim import Claim
from shardwise.verify.run import verify
from tests.matrix import thinned

# one of each reason
NAMES = (
    "drop_attention_norm_sp",
    "swap_w1_w2",
    "halved_norm",
    "zeroed_layer0_wk",
    "summed_norm",
    "shifted_output_layer1_wv",
    "unsummed_output_layer0_wo",
    "untied_sp",
    "harmless_embedding_interleaved",
    "harmless_shifted_twice",
)
OTHERS = (
    "drop_attention_wo_nosp",
    "drop_feed_forward_nosp",
    "replicate_ffn_norm",
    "unreduced_table",
    "doubled_layer0_wq",
    "shifted_gradient_tok_embeddings",
    "unsummed_input_layer1_attention_nosp",
    "harmless_rule_shadowed",
)


@lru_cache
def verified(names: tuple[str, ...]) -> dict[str, Verification]:
    claims = [Claim(f"benchmarks.mutants:{name}", "own", name) for name in names]
    return {answer.plan: answer for answer in verify(claims, mesh=MESH, timeout_s=60)}


@lru_cache
def harmful(names: tuple[str, ...]) -> dict[str, bool]:
    return {truth.name: truth.is_harmful for truth in truths(list(names))}


@pytest.mark.parametrize("name", thinned((*NAMES, *OTHERS), lambda name: name in NAMES))
def test_what_is_harmful_is_caught_for_its_reason_and_what_is_not_passes(name: str) -> None:
    names = NAMES if name in NAMES else OTHERS
    found, is_harmful = verified(names)[name], harmful(names)[name]
    expected = MUTANTS[name].expected
    assert is_harmful == (expected != HARMLESS)
    if is_harmful:
        assert found.verdict in (Verdict.WRONG, Verdict.CRASHES)
        assert expected in reasons(found)
    else:
        assert found.verdict is Verdict.RIGHT


def test_the_kinds_are_all_here() -> None:
    assert {MUTANTS[name].expected for name in NAMES} == {mutant.expected for mutant in MUTANTS.values()}


# one of each axis, and what is harmless; the rest on two ranks; on four, where two axes meet
TELLING = (
    "dp=2 valid not summed",
    "fsdp=2 fsdp averages",
    "ep=2 summed over ep layers.0.feed_forward.experts.w1",
    "cp=2 contiguous positions",
    "cp=2 harmless more micro-batches",
    "pp=2 tied not summed",
)
ON_TWO = (
    "dp=2 unsummed over dp layers.0.ffn_norm.weight",
    "dp=2 harmless by a gather",
    "fsdp=2 left out of fsdp layers.0.ffn_norm.weight",
    "fsdp=2 labels from the own tokens",
    "ep=2 unsummed over ep layers.0.feed_forward.router.gate.weight",
    "ep=2 shifted over ep layers.1.feed_forward.experts.w2",
    "ep=2 next expert",
    "ep=2 nothing comes back",
    "ep=2 clipped by a part",
    "cp=2 summed twice over cp layers.0.ffn_norm.weight",
    "pp=2 tied counted twice",
    "pp=2 loss of each micro-batch",
    "pp=2 harmless gpipe",
)
ON_FOUR = (
    "dp=2,tp=2 unsummed over tp layers.0.attention_norm.weight",
    "dp=2,fsdp=2 unsummed over dp layers.1.attention_norm.weight",
    "dp=2,ep=2 unsummed over dp+ep norm.weight",
    "ep=2,tp=2 whole counted on each rank",
    "fsdp=2,tp=2 shifted over tp layers.0.attention.wq.weight",
    "fsdp=2,tp=2 fsdp averages",
    "fsdp=2,tp=2 valid not summed",
    "fsdp=2,cp=2 labels of others",
    "pp=2,dp=2 harmless in another order",
)


@lru_cache
def judged(names: tuple[str, ...]) -> dict[str, axis_ranks.Judged]:
    return axis_ranks.judged(names)


@pytest.mark.parametrize("name", thinned((*TELLING, *ON_TWO, *ON_FOUR), lambda name: name in TELLING))
def test_what_is_harmful_in_a_step_on_a_mesh_is_caught_where_and_for_what_it_is(name: str) -> None:
    mutant, known = (
        AXIS_MUTANTS[name],
        judged(next(group for group in (TELLING, ON_TWO, ON_FOUR) if name in group))[name],
    )
    assert known.truth.is_harmful == (mutant.expected != HARMLESS), known.truth
    if known.truth.is_harmful:
        assert known.found.verdict in (Verdict.WRONG, Verdict.CRASHES)
        assert mutant.expected in axis_ranks.reasons(known.found)
        assert axis_ranks.is_said(mutant.where, known.found)
    else:
        assert known.found.verdict is Verdict.RIGHT


def test_every_axis_has_its_mutants() -> None:
    meshes = [mutant.mesh_noun for mutant in AXIS_MUTANTS.values()]
    assert {name for mesh in meshes for name, size in mesh.axes if size > 1} == set(NAMES_OF_AXES)
    assert len(AXIS_MUTANTS) + len(MUTANTS) >= 250
