"""verify on real ranks: each silent fault rebuilt small, found and told for what it is; what is right passes;
many cases in one launch."""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

from shardwise.core.case import StepSettings
from shardwise.core.finding import Cause, Finding, FindingKind
from shardwise.core.mesh import Mesh
from shardwise.core.plan import Plan, Rule, Style, StyleName
from shardwise.core.rule import RuleRef
from shardwise.core.verification import Verdict, Verification
from shardwise.models.source import find_model
from shardwise.parallel.builtin import builtin_names, builtin_plan
from shardwise.verify.claim import Claim
from shardwise.verify.run import verify
from tests.matrix import FULL

pytest.importorskip(
    "transformers",
    reason="transformers isn't installed, so NOTHING WAS VERIFIED under plan hf: pip install shardwise[hf]",
)

MODELS = "tests.distributed.verify_models:"
OF_TRANSFORMERS = (
    "qwen3_as_shipped",
    "qwen3_norms_not_summed",
    "llama_norm_sequence_parallel",
    "mixtral_experts_cut_as_one",
    "llama_typo",
    "llama_one_kv_head",
)
BY_HAND = (
    "by_hand_right",
    "by_hand_slope_not_summed",
    "by_hand_slope_averaged",
    "by_hand_frozen",
    "by_hand_half_logits",
    "by_hand_untied",
    "by_hand_alone",
    "by_hand_norm_of_parts",
    "by_hand_norm_of_whole",
    "by_hand_odd_width",
    "fused_halves",
    "fused_unfolded",
    "fused_pairs",
    "fused_by_head",
)
SHIPPED = ("apertus", "gpt_oss", "bert", "lfm2")
BY_EXPERTS = ("gpt_oss", "mixtral", "llama")


def offered(name: str, sequence_parallel: bool) -> bool:
    return sequence_parallel or not name.startswith("routed")


def built_in_cases(model: str, *, tied: bool, parallels: tuple[bool, ...]) -> list[Claim]:
    """Each built-in plan of the model's family; PyTorch's own styles, which would untie a tied head, for an
    untied one only. parallels: with sequence parallelism, without."""
    family = find_model(model).family
    return [
        Claim(
            model,
            builtin_plan(name, sequence_parallel=parallel, family=family).to_toml(),
            f"{model}, {name} {'in parts' if parallel else 'whole'}",
            twin=True,
        )
        for name in builtin_names()
        for parallel in parallels
        if offered(name, parallel) and not (tied and name.endswith("@dtensor"))
    ]


LLAMA, GPT = ("llama3-8b", False), ("gpt-debug?tied=false", False)
TIED_LLAMA, TIED_GPT = ("llama3-8b?tied=true", True), ("gpt-debug", True)
PARALLEL, WHOLE, EITHER = (True,), (False,), (True, False)
# each plan of both engines; test_styles.py proves the gradients of the other pairs
TELLING = {LLAMA: PARALLEL, TIED_GPT: WHOLE}


def built_ins(models: Mapping[tuple[str, bool], tuple[bool, ...]]) -> list[Claim]:
    return [
        claim
        for (model, tied), parallels in models.items()
        for claim in built_in_cases(model, tied=tied, parallels=parallels)
    ]


@pytest.fixture(scope="module")
def found() -> dict[str, Verification]:
    cases = [Claim(MODELS + name, "hf", name) for name in OF_TRANSFORMERS]
    cases += [Claim(f"hf:{name}", "hf", name) for name in SHIPPED]
    cases += [Claim(f"hf:{name}", "hf-ep", f"{name} by experts") for name in BY_EXPERTS]
    cases += built_ins(TELLING)
    # last: one of them ends the launch, and those that start anew needn't import transformers
    cases += [Claim(MODELS + name, "own", name) for name in BY_HAND]
    answers = verify(cases, mesh=Mesh.parse("tp=2"), timeout_s=300)
    assert [answer.model for answer in answers] == [case.model for case in cases]
    return {answer.plan: answer for answer in answers}


def own_faults(each: Verification) -> list[Finding]:
    return [finding for finding in each.wrong if finding.cause not in (Cause.FOLLOWS, Cause.FORWARD)]


RIGHT = (
    "qwen3_as_shipped",
    "by_hand_right",
    "llama_typo",
    "by_hand_norm_of_parts",
    "fused_pairs",
    "fused_by_head",
)


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_plan_is_right(found: dict[str, Verification], name: str) -> None:
    each = found[name]
    assert each.verdict is Verdict.RIGHT
    assert each.proof is not None
    assert each.proof.steps == 2
    assert each.proof.worst_gradient_error < 1e-7
    assert each.proof.weights_error is not None
    assert each.proof.weights_error < 1e-7


def test_the_expert_parallel_plan_that_transformers_ships_is_right_and_shards_what_its_other_does_not(
    found: dict[str, Verification],
) -> None:
    for name in ("gpt_oss", "mixtral"):
        each = found[f"{name} by experts"]
        assert each.verdict is Verdict.RIGHT, each
        assert each.sharded is not None
        assert each.sharded.inner_sharded > 0.9 * each.sharded.inner_total
    assert found["llama by experts"].note == "transformers has no expert-parallel plan for it"


def test_gradients_of_norms_after_a_colwise_projection_are_parts(found: dict[str, Verification]) -> None:
    each = found["qwen3_norms_not_summed"]
    assert each.proof is not None
    assert each.proof.output_error < 1e-10
    names = [
        f"model.layers.{layer}.self_attn.{norm}.weight" for layer in (0, 1) for norm in ("q_norm", "k_norm")
    ]
    assert [finding.subject for finding in each.findings] == names
    assert {finding.cause for finding in each.findings} == {Cause.PARTS_NOT_SUMMED}
    assert {finding.rule for finding in each.findings} == {None}


def test_sequence_parallel_on_a_whole_input_doubles_the_gradient(found: dict[str, Verification]) -> None:
    each = found["llama_norm_sequence_parallel"]
    assert each.verdict is Verdict.WRONG
    assert [finding.subject for finding in each.findings] == [
        f"model.layers.{layer}.post_attention_layernorm.weight" for layer in (0, 1)
    ]
    for finding in each.findings:
        assert finding.cause is Cause.SUMMED_TOO_OFTEN
        assert finding.ratio == pytest.approx(2)
        assert finding.rule == RuleRef("model.layers.*.post_attention_layernorm", "sequence_parallel")
        assert (
            finding.reason
            == "its gradient is 2 times the unsharded one: summed where every rank had the whole"
        )


def test_a_learnable_activation_between_colwise_and_rowwise_is_named(found: dict[str, Verification]) -> None:
    names = {f"model.layers.{layer}.mlp.act_fn.{name}" for layer in (0, 1) for name in ("alpha_p", "alpha_n")}
    assert {finding.subject for finding in found["apertus"].findings} == names
    assert {finding.cause for finding in found["apertus"].findings} == {Cause.PARTS_NOT_SUMMED}


def test_weights_that_lie_in_one_and_are_cut_as_one_are_found_by_a_trial(
    found: dict[str, Verification],
) -> None:
    each = found["mixtral_experts_cut_as_one"]
    output, first, *others = each.findings
    assert output.kind is FindingKind.OUTPUT_DIFFERS
    assert output.reason == (
        "the first value that differs is what model.layers.0.mlp.experts.act_fn takes: it isn't the "
        "unsharded one. model.layers.0.mlp.experts.gate_up_proj: 2 weights lie in it, and it is cut as if it "
        "were one; with each cut by itself, its module is right"
    )
    assert (first.subject, first.cause) == ("model.layers.0.mlp.experts.gate_up_proj", Cause.CUT_AS_ONE)
    assert (
        first.reason
        == "2 weights lie in it, and it is cut as if it were one; with each cut by itself, its module is "
        "right"
    )
    assert {finding.cause for finding in others} == {Cause.FORWARD}


@pytest.mark.parametrize("name", ["fused_halves", "fused_unfolded"])
def test_a_weight_is_cut_in_other_ways_where_what_is_made_of_its_output_is_wrong(
    found: dict[str, Verification], name: str
) -> None:
    output, weight = own_faults(found[name])
    assert (output.kind, output.cause) == (FindingKind.OUTPUT_DIFFERS, Cause.CUT_AS_ONE)
    reason = (
        "2 weights lie in it, and it is cut as if it were one; with each cut by itself, its module is right"
    )
    first = "the first value that differs is what down takes: it isn't the unsharded one"
    assert output.reason == f"{first}. gate_up.weight: {reason}"
    assert (weight.subject, weight.cause, weight.reason) == ("gate_up.weight", Cause.CUT_AS_ONE, reason)
    assert weight.relative_error is not None


def test_what_crashes_is_told_with_what_a_trace_suspects(found: dict[str, Verification]) -> None:
    each = found["by_hand_odd_width"]
    assert each.verdict is Verdict.CRASHES
    sizes = [finding for finding in each.findings if finding.kind is FindingKind.SIZES_NOT_DIVISIBLE]
    assert [finding.subject for finding in sizes] == ["up.weight", "up.bias", "down.weight"]
    assert sizes[0].reason.startswith(
        "tp=2 doesn't divide its dim 0 of 33, which is cut, and a rank's step fails: down raised"
    )
    assert sizes[0].advice == "Use tp in {1, 3, 11, 33}, or leave it whole."


def test_the_norm_that_takes_the_whole_for_a_part_is_told_by_its_gradient(
    found: dict[str, Verification],
) -> None:
    (finding,) = found["by_hand_norm_of_whole"].wrong
    assert (finding.subject, finding.cause) == ("norm.weight", Cause.SUMMED_TOO_OFTEN)
    assert (
        finding.reason == "its gradient is 2 times the unsharded one: summed where every rank had the whole"
    )


def test_a_gradient_that_is_averaged_is_told_from_one_that_is_not_summed(
    found: dict[str, Verification],
) -> None:
    (averaged,), (unsummed,) = (
        own_faults(found["by_hand_slope_averaged"]),
        own_faults(found["by_hand_slope_not_summed"]),
    )
    assert (averaged.subject, averaged.cause) == ("slope", Cause.AVERAGED)
    assert averaged.ratio == pytest.approx(0.5)
    assert (unsummed.subject, unsummed.cause) == ("slope", Cause.PARTS_NOT_SUMMED)


def test_a_parameter_that_sharding_freezes_gets_no_gradient(found: dict[str, Verification]) -> None:
    (finding,) = found["by_hand_frozen"].wrong
    assert (finding.kind, finding.subject, finding.cause) == (
        FindingKind.GRADIENT_MISSING,
        "norm.weight",
        Cause.NOTHING_ARRIVES,
    )
    assert finding.reason == "no gradient arrives on some rank"


def test_logits_that_nobody_gathers_are_found_before_the_loss_fails(found: dict[str, Verification]) -> None:
    (finding,) = found["by_hand_half_logits"].wrong
    assert finding.cause is Cause.NOT_GATHERED
    assert (
        finding.reason
        == "the logits are 16 wide on a rank, the unsharded model's 32, and the loss takes them for whole"
    )


def test_an_untied_weight_is_said_to_be_one_and_once(found: dict[str, Verification]) -> None:
    each = found["by_hand_untied"]
    assert [(finding.kind, finding.subject, finding.cause) for finding in each.wrong] == [
        (FindingKind.GRADIENT_DIFFERS, "embed.weight", Cause.UNTIED)
    ]


def test_a_crash_names_the_module_and_heads_that_do_not_divide(found: dict[str, Verification]) -> None:
    each = found["llama_one_kv_head"]
    assert each.verdict is Verdict.CRASHES
    crash, heads = each.findings
    assert crash.subject == "model.layers.0.self_attn"
    assert (
        heads.reason == "tp=2 doesn't divide the 1 KV heads, and the rule cuts the projection that makes them"
    )
    assert found["lfm2"].findings[0].subject == "lm_head"


def test_a_rank_that_fails_alone_is_that_cases_answer_and_the_others_go_on(
    found: dict[str, Verification],
) -> None:
    each = found["by_hand_alone"]
    assert each.verdict is Verdict.CRASHES
    assert "only here" in each.note
    # a later case, on ranks that were started anew
    assert found["by_hand_norm_of_whole"].verdict is Verdict.WRONG


def test_a_rule_that_matches_nothing_is_said_with_the_nearest_that_does(
    found: dict[str, Verification],
) -> None:
    (finding,) = found["llama_typo"].findings
    assert (finding.kind, finding.subject) == (
        FindingKind.RULE_MATCHES_NOTHING,
        "model.layers.*.mlp.gate_prj",
    )
    assert finding.advice == 'Did you mean "model.layers.*.mlp.gate_proj"?'


def test_a_plan_that_shards_nearly_nothing_is_no_success(found: dict[str, Verification]) -> None:
    each = found["gpt_oss"]
    assert each.verdict is Verdict.NEARLY_NOTHING
    assert each.sharded is not None
    assert each.sharded.inner_sharded == 0


def test_what_has_no_plan_is_skipped_and_never_right(found: dict[str, Verification]) -> None:
    assert found["bert"].verdict is Verdict.SKIPPED
    assert found["bert"].note == "transformers has no tensor-parallel plan for it; shardwise plan makes one"


def test_claims_about_one_model_share_its_unsharded_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forwards = tmp_path / "forwards"
    monkeypatch.setenv("FORWARDS", str(forwards))
    plan = Plan("whole", tuple(Rule(name, Style(StyleName.REPLICATE)) for name in ("embed", "head")))
    named = ("counted", "counted", "counted_too", "counted")
    answers = verify([Claim.of(f"{MODELS}{name}", plan) for name in named], mesh=Mesh((("tp", 2),)))
    assert [each.verdict for each in answers] == [Verdict.NEARLY_NOTHING] * 4
    assert len({each.proof for each in answers}) == 1
    ran = Counter(forwards.read_text().splitlines())
    once = ran["counted too"]
    assert 2 * once < ran["counted"] < 3 * once


def assert_all_right(answers: Iterable[Verification]) -> None:
    for each in answers:
        assert each.verdict is Verdict.RIGHT, (each.model, each.plan, each.findings, each.note)
        assert each.proof is not None
        assert each.proof.dtype == "float64"
        assert max(each.proof.worst_gradient_error, each.proof.output_error) < 1e-12
        assert not each.findings


def test_every_built_in_plan_of_both_engines_is_right(found: dict[str, Verification]) -> None:
    labels = [claim.label for claim in built_ins(TELLING)]
    assert len(labels) == 7 + 3
    assert_all_right(found[label] for label in labels)


@FULL
@pytest.mark.parametrize(
    ("tp", "models", "expected"),
    [
        (2, {LLAMA: WHOLE, TIED_GPT: PARALLEL, TIED_LLAMA: EITHER, GPT: EITHER}, 5 + 5 + 8 + 12),
        # test_styles.py proves the other pairs on as many
        (3, dict.fromkeys((LLAMA, TIED_GPT), PARALLEL), 7 + 5),
        (4, dict.fromkeys((TIED_LLAMA, GPT), PARALLEL), 5 + 7),
    ],
)
def test_every_built_in_plan_is_right_tied_or_not_on_more_ranks(
    tp: int, models: dict[tuple[str, bool], tuple[bool, ...]], expected: int
) -> None:
    claims, settings = built_ins(models), StepSettings(2, 4 * tp)
    assert len(claims) == expected
    assert_all_right(verify(claims, mesh=Mesh((("tp", tp),)), settings=settings, timeout_s=300))
