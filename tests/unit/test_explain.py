"""explain/: groups, reasons and findings of real programs, and the contrast of two."""

from dataclasses import replace
from functools import lru_cache

import pytest

from shardwise.core.case import StepSettings
from shardwise.core.collective import CollectiveCall, CollectiveKind
from shardwise.core.errors import OptionError
from shardwise.core.explanation import CollectiveGroup, Explanation
from shardwise.core.finding import FindingKind
from shardwise.core.mesh import Mesh
from shardwise.core.placement import Partial, Placement, Replicate, Shard
from shardwise.core.plan import Plan, Rule, Style, StyleName
from shardwise.core.program import Collective, MemoryKind, Phase, Program
from shardwise.core.rule import ModuleKind
from shardwise.explain.contrast import contrast
from shardwise.explain.explain import explain
from shardwise.explain.reasons import carries_out, reason_of
from shardwise.explain.words import relation, size
from shardwise.models.llama import LlamaConfig
from shardwise.models.specs import ModelSpec
from shardwise.parallel.builtin import builtin_names, builtin_plan
from shardwise.trace.trace import trace
from tests.matrix import thinned

LAYERS = 2  # all of them are traced
SPEC = ModelSpec("small", LlamaConfig(96, 48, LAYERS, 4, 2, 64), "")
SETTINGS = StepSettings(2, 16)


@lru_cache(maxsize=32)
def program_of(name: str, device: str = "cuda") -> Program:
    return trace(SPEC, builtin_plan(name), Mesh.parse("tp=2"), SETTINGS, device=device)


@lru_cache(maxsize=32)
def explanation_of(name: str, device: str = "cuda") -> Explanation:
    return explain(program_of(name, device))


def five_gathers() -> Plan:
    """The plan rowwise, in which wq, wk, wv, w1 and w3 each gather their input."""
    plan = builtin_plan("rowwise")
    own = Style(StyleName.COLWISE, input=Shard(1))
    rules = tuple(
        Rule(rule.pattern, own) if rule.pattern.rpartition(".")[2] in ("wq", "wk", "wv", "w1", "w3") else rule
        for rule in plan.rules
        if rule.style.name is not StyleName.GATHER_INPUT
    )
    return Plan("five-gathers", rules)


PLANS = thinned(builtin_names(), lambda name: name in ("rowwise", "colwise", "routed", "rowwise@dtensor"))


@pytest.mark.parametrize("name", PLANS)
def test_groups_hold_every_collective_and_every_byte_of_the_program(name: str) -> None:
    program, explanation = program_of(name), explanation_of(name)
    calls = [item.call for item in program.collectives()]
    assert sum(group.count for group in explanation.collectives) == len(calls)
    assert explanation.wire_bytes == pytest.approx(sum(call.wire_bytes for call in calls))
    assert sum(group.total_bytes for group in explanation.holdings) == sum(
        program.held(kind) for kind in (MemoryKind.PARAMETER, MemoryKind.GRADIENT, MemoryKind.OPTIMIZER)
    )
    assert sum(totals.ops for totals in explanation.phases) == sum(1 for _ in program.ops())
    assert sum(group.total_bytes for group in explanation.copies) == sum(
        op.write_bytes for op in program.ops() if op.kind == "copy"
    )


@pytest.mark.parametrize("name", PLANS)
def test_equal_layers_are_one_line(name: str) -> None:
    counts = {
        group.module: group.count
        for group in explanation_of(name).collectives
        if group.phase is Phase.FORWARD
    }
    assert counts["layers.*.attention"] == counts["layers.*.attention.wo"] == LAYERS


@pytest.mark.parametrize("name", PLANS)
def test_every_collective_and_copy_has_a_reason_that_is_a_sentence(name: str) -> None:
    explanation = explanation_of(name)
    told = [(group.module, group.reason) for group in explanation.collectives]
    told += [(group.module, group.reason) for group in explanation.copies]
    for module, reason in told:
        assert reason.endswith("."), module
        assert "nothing says why" not in reason, module


def group_of(explanation: Explanation, module: str, phase: Phase) -> CollectiveGroup:
    (found,) = (group for group in explanation.collectives if group.module == module and group.phase is phase)
    return found


@pytest.mark.parametrize(
    ("name", "forward", "backward"),
    [
        ("rowwise", "has zeros for all others", "may have used one of them"),
        ("colwise", "its slice of every token's row", "Whole rows of the own tokens' gradient become slices"),
        ("routed", "Owners send each distinct row once", "sends back as gradient"),
        ("rowwise@dtensor", "has zeros for all others", "may have used one of them"),
    ],
)
def test_the_embedding_s_collectives_are_told_by_its_style(name: str, forward: str, backward: str) -> None:
    explanation = explanation_of(name)
    assert forward in group_of(explanation, "tok_embeddings", Phase.FORWARD).reason
    assert backward in group_of(explanation, "tok_embeddings", Phase.BACKWARD).reason


def test_the_replicated_embedding_has_no_collective_of_its_own() -> None:
    assert not [
        group for group in explanation_of("replicated").collectives if group.module == "tok_embeddings"
    ]


def test_gloo_s_reduce_scatter_is_said_to_be_an_all_to_all() -> None:
    group = group_of(explanation_of("rowwise", "cpu"), "layers.*.attention.wo", Phase.FORWARD)
    assert (group.kind, group.carries_out) == (CollectiveKind.ALL_TO_ALL, CollectiveKind.REDUCE_SCATTER)


def test_an_all_to_all_between_dims_carries_out_itself() -> None:
    group = group_of(explanation_of("colwise"), "tok_embeddings", Phase.FORWARD)
    assert (group.kind, group.carries_out) == (CollectiveKind.ALL_TO_ALL, CollectiveKind.ALL_TO_ALL)


def test_what_routed_sends_is_told_over_all_ranks() -> None:
    group = group_of(explanation_of("routed"), "tok_embeddings", Phase.FORWARD)
    assert group.by_data is not None
    assert 0 < group.by_data.mean_bytes <= group.by_data.max_bytes <= group.by_data.bound_bytes


def kinds(explanation: Explanation) -> list[FindingKind]:
    return [finding.kind for finding in explanation.findings]


def test_dtensor_s_rowwise_embedding_is_found_to_keep_the_whole_gradient() -> None:
    finding = next(
        f
        for f in explanation_of("rowwise@dtensor").findings
        if f.kind is FindingKind.GRADIENT_NOT_AS_PARAMETER
    )
    assert finding.subject == "tok_embeddings.weight"
    assert finding.reason.startswith("its gradient is Replicate [96, 48], 2 times its shard [48, 48]:")
    assert FindingKind.GRADIENT_NOT_AS_PARAMETER not in kinds(explanation_of("colwise@dtensor"))
    assert FindingKind.GRADIENT_NOT_AS_PARAMETER not in kinds(explanation_of("rowwise"))


def test_partial_norm_gradients_are_found_and_counted() -> None:
    finding = next(
        f for f in explanation_of("colwise@dtensor").findings if f.kind is FindingKind.PARTIAL_GRADIENT
    )
    norms = 2 * LAYERS + 1
    assert finding.reason.startswith(f"{norms} gradients stay Partial after the backward")
    assert f"{norms} all-reduces in optimizer" in finding.reason
    assert FindingKind.PARTIAL_GRADIENT not in kinds(explanation_of("colwise"))


def test_modules_that_each_gather_the_same_input_are_found_with_the_advice() -> None:
    program = trace(SPEC, five_gathers(), Mesh.parse("tp=2"), SETTINGS, device="cuda")
    finding = next(f for f in explain(program).findings if f.kind is FindingKind.COLLECTIVES_REPEAT)
    assert finding.subject == "layers.*.attention, layers.*.feed_forward"
    assert (
        "(wq, wk, wv in layers.*.attention; w1, w3 in layers.*.feed_forward): 5 all-gathers per layer "
        "against 2" in finding.reason
    )
    extra = 3 * LAYERS * (2 * 16 * 48 * 4) / 2 / 2**20
    assert f"{extra:,.3g} MiB more on the wire" in finding.reason
    assert finding.advice is not None
    assert "gather_input" in finding.advice
    for name in builtin_names():
        assert FindingKind.COLLECTIVES_REPEAT not in kinds(explanation_of(name))


def collective(before: Placement, after: Placement, kind: CollectiveKind, module: str = "m.w") -> Collective:
    return Collective(
        CollectiveCall(kind, "tp", 2, "float32", 64, 32.0, "forward"), module, None, before, after
    )


def test_collectives_that_undo_one_another_are_found() -> None:
    program = program_of("rowwise")
    gather = collective(Shard(1), Replicate(), CollectiveKind.ALL_GATHER, "a")
    scatter = collective(Replicate(), Shard(1), CollectiveKind.ALL_TO_ALL, "b")
    blocks = (*program.blocks, replace(program.blocks[0], items=(gather, scatter)))
    found = [
        f
        for f in explain(replace(program, blocks=blocks)).findings
        if f.kind is FindingKind.COLLECTIVES_CANCEL
    ]
    assert [f.reason for f in found] == [
        "its all-to-all undoes the all-gather of a with nothing computed between them, 1 times a step"
    ]
    assert FindingKind.COLLECTIVES_CANCEL not in kinds(explanation_of("rowwise"))


def test_a_rule_that_matched_nothing_is_found() -> None:
    program = program_of("rowwise")
    rules = (*program.rules, replace(program.rules[0], pattern="encoder.*", modules=()))
    (finding,) = (
        f
        for f in explain(replace(program, rules=rules)).findings
        if f.kind is FindingKind.RULE_MATCHES_NOTHING
    )
    assert finding.subject == "encoder.*"


def test_what_nobody_told_is_not_guessed() -> None:
    call = CollectiveCall(CollectiveKind.ALL_TO_ALL, "tp", 2, "float32", 64, 32.0, "forward")
    assert reason_of(Collective(call, "m.experts")) == (
        "all-to-all in experts; nothing says why: it is called in code that tells no placements, as DTensor "
        "and the native engine do."
    )


def test_sums_and_gathers_are_told_by_their_placements() -> None:
    assert "products are summands" in reason_of(
        collective(Partial(), Shard(1), CollectiveKind.REDUCE_SCATTER)
    )
    assert "needs whole sequences" in reason_of(collective(Shard(1), Replicate(), CollectiveKind.ALL_GATHER))


def test_what_slices_of_experts_give_is_told_as_that() -> None:
    each = replace(
        collective(Partial(), Replicate(), CollectiveKind.ALL_REDUCE, "mlp.mixture"),
        module_kind=ModuleKind.EXPERTS,
    )
    assert reason_of(each) == (
        "Each rank has a slice of every expert, and multiplied each token by those of the experts that the "
        "router chose for it: the products are summands."
    )
    backward = replace(each, call=replace(each.call, phase="backward"))
    assert "how much each of its experts counts for a token" in reason_of(backward)


def test_a_contrast_names_what_only_one_plan_has() -> None:
    found = contrast(explanation_of("rowwise"), explanation_of("colwise"))
    assert [(group.kind, group.module) for group in found.only_first] == [
        (CollectiveKind.REDUCE_SCATTER, "tok_embeddings"),
        (CollectiveKind.ALL_GATHER, "tok_embeddings"),
    ]
    assert [(group.kind, group.module) for group in found.only_second] == [
        (CollectiveKind.ALL_TO_ALL, "tok_embeddings")
    ] * 2
    assert found.different == ()
    assert any(line.startswith("rowwise sends ") for line in found.lines)


def test_a_contrast_with_itself_finds_nothing() -> None:
    found = contrast(explanation_of("rowwise"), explanation_of("rowwise"))
    assert (found.only_first, found.only_second, found.different) == ((), (), ())
    assert all(line.startswith("Both ") for line in found.lines)


def test_plans_on_two_meshes_can_t_be_contrasted() -> None:
    other = replace(explanation_of("rowwise"), axes=(("tp", 4),))
    with pytest.raises(OptionError, match="two plans are compared on the same axes"):
        contrast(explanation_of("rowwise"), other)


@pytest.mark.parametrize(
    ("kind", "stands_for"),
    [
        (kind, CollectiveKind.REDUCE_SCATTER if kind is CollectiveKind.ALL_TO_ALL else kind)
        for kind in CollectiveKind
    ],
)
def test_of_all_collectives_that_cut_a_sum_only_an_all_to_all_stands_for_another(
    kind: CollectiveKind, stands_for: CollectiveKind
) -> None:
    assert carries_out(collective(Partial(), Shard(1), kind)) is stands_for


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (100.0, 100.4, "about the same"),
        (100.0, 99.6, "about the same"),
        (100.0, 132.0, "1.32 times as much"),
        (100.0, 68.6, "68.6 % of that"),
    ],
)
def test_how_much_one_is_of_the_other_is_said_so_that_it_can_t_be_misread(
    first: float, second: float, expected: str
) -> None:
    assert relation(first, second) == expected


@pytest.mark.parametrize(
    ("n_bytes", "expected"),
    [(2**17, "0.125 MiB"), (64 * 2**20, "64 MiB"), (9000 * 2**20, "9,000 MiB"), (12.34 * 2**30, "12.3 GiB")],
)
def test_sizes_in_sentences(n_bytes: float, expected: str) -> None:
    assert size(n_bytes) == expected
