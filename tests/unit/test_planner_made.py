"""What the planner makes: the same as the rules that people wrote by hand, where it can; and in words why
not, where it can't."""

import pytest
import torch

from shardwise.core.argument_cut import ArgumentCut
from shardwise.core.dims import DimClass
from shardwise.core.errors import PlanError
from shardwise.core.held import parse_pieces
from shardwise.core.made_plan import MadePlan
from shardwise.core.mesh import Mesh
from shardwise.core.placement import Partial, Replicate, Shard
from shardwise.core.plan import Plan, Style, StyleName
from shardwise.dims.sizes import Size
from shardwise.models.source import find_model
from shardwise.parallel.builtin import builtin_plan
from shardwise.planner.groups import groups_of
from shardwise.planner.make import Wish, forward_of, make_dims, make_plan
from tests.distributed.own_modules_cases import CASES
from tests.matrix import FULL

LATER = {
    # GPT's positions are as long as the embedding's output: the sequence is cut behind it, at the first layer
    "tok_embeddings": (
        Style(StyleName.ROWWISE, output=Replicate()),
        Style(StyleName.ROWWISE, output=Shard(1)),
    ),
    "layers.0": (Style(StyleName.SPLIT_INPUT), None),
    "pos_embeddings": (Style(StyleName.REPLICATE), Style(StyleName.REPLICATED, output=Shard(1))),
}
WHOLE = {
    # a table that every rank has whole and reads as it is: any leaf's style says so, too
    "pos_embeddings": (Style(StyleName.REPLICATE), Style(StyleName.REPLICATED, output=Replicate()))
}
DIFFERENCES = {("gpt-debug", True): LATER, ("gpt-debug", False): WHOLE}


def style_of(plan: Plan, module: str) -> Style | None:
    """With a look-up's default said."""
    rule = plan.rule_for(module)
    if rule is not None and rule.style == Style(StyleName.ROWWISE):
        return Style(StyleName.ROWWISE, output=Shard(1))
    return rule.style if rule is not None else None


def made(model: str, tp: int, *, sequence: bool = True) -> MadePlan:
    return make_plan(find_model(model), Wish(Mesh.parse(f"tp={tp}"), sequence=sequence))


def named(model: str, tp: int, name: str) -> list[DimClass]:
    found = make_dims(find_model(model), Wish(Mesh.parse(f"tp={tp}"))).classes
    return [each for each in found if each.name == name]


@pytest.mark.parametrize("sequence", [True, False])
@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("model", ["llama3-debug", "gpt-debug"])
def test_the_made_plan_is_the_one_that_was_written_by_hand(model: str, tp: int, sequence: bool) -> None:
    source = find_model(model)
    own = made(model, tp, sequence=sequence).plan
    by_hand = builtin_plan("rowwise", family=source.family, sequence_parallel=sequence)
    styles = {
        name: (style_of(own, name), style_of(by_hand, name))
        for name, _ in source.build(dtype=torch.bfloat16).named_modules()
    }
    differences = {name: pair for name, pair in styles.items() if pair[0] != pair[1]}
    assert differences == DIFFERENCES.get((model, sequence), {})


def test_a_model_of_few_positions_has_the_plan_of_one_of_many() -> None:
    assert made("gpt-debug?max_seq=7", 2).plan.rules == made("gpt-debug", 2).plan.rules


def test_every_rule_has_its_reason_and_the_file_reads_back_as_the_plan() -> None:
    one = made("llama3-debug", 2)
    assert {rule.pattern for rule in one.plan.rules} == set(one.comments)
    assert all(one.comments.values())
    assert Plan.from_toml(one.to_toml()) == one.plan


def test_a_plan_is_made_the_same_twice() -> None:
    assert made("hf:qwen3", 2).to_toml() == made("hf:qwen3", 2).to_toml()


# -------------------------------------------------------------------------------------- what is left whole


ALONE = Style(StyleName.COLWISE, output=Replicate())


def test_projections_of_key_value_heads_that_are_fewer_than_ranks_are_cut_alone_and_say_why() -> None:
    """4 of them over 8 ranks: attention is computed whole on every rank, feed-forwards are cut."""
    one = made("llama3-debug", 8)
    for name in ("wq", "wo"):
        assert style_of(one.plan, f"layers.3.attention.{name}") == ALONE
        assert "8 ranks don't divide its 4" in one.comments[f"layers.*.attention.{name}"]
    assert style_of(one.plan, "layers.3.attention") == Style(StyleName.WHOLE)
    assert style_of(one.plan, "layers.3.feed_forward.w1") == Style(StyleName.COLWISE)


def test_a_projection_to_a_low_rank_is_cut_alone_below_its_attention() -> None:
    """A norm of the latents and the heads after it speak against any other cut of it."""
    one = made("tests.distributed.mixed_modules:latent", 2)
    alone = [rule.pattern for rule in one.plan.rules if rule.style == ALONE]
    assert len(alone) == 2
    for pattern in alone:
        assert pattern.startswith("layers.*.mixer.")
        assert "gathered at once" in one.comments[pattern]
    around = style_of(one.plan, "layers.0.mixer")
    assert around is not None
    assert around.name is StyleName.GATHER_INPUT


def test_what_the_forward_does_not_use_is_cut_all_the_same() -> None:
    one = made("tests.unit.mixed_models:spared", 2)
    for name, style in (("spare", ALONE), ("table", Style(StyleName.ROWWISE, output=Replicate()))):
        assert style_of(one.plan, name) == style
        assert one.comments[name] == "nothing uses it: each rank keeps its part"


def test_where_the_forward_writes_how_many_groups_there_are_the_heads_of_each_are_cut() -> None:
    """Two groups on every rank; the sizes of a group stand in a tuple."""
    plan = made("tests.distributed.own_modules:by_group", 2).plan
    around, taken = (style_of(plan, f"blocks.0.mixer{name}") for name in ("", ".o"))
    assert around is not None
    assert taken is not None
    assert around.divide == ("sizes[0]", "sizes[1]", "sizes[2]")
    assert taken.pieces == (16, 16)


def test_query_heads_are_cut_in_each_group_where_key_value_heads_do_not_divide() -> None:
    """And the norm of all queries gathers them in the model's own order."""
    plan = made("tests.distributed.own_modules:normed_groups", 2).plan
    found = {name: style_of(plan, f"blocks.0.mixer.{name}") for name in ("q", "q_norm", "o")}
    assert all(style is not None and style.pieces == (16, 16, 16) for style in found.values())


PHI = (
    "hf:phi3?num_hidden_layers=2,hidden_size=96,num_attention_heads=6,num_key_value_heads=2,vocab_size=300,"
    "pad_token_id=0"
)
FALCON = (
    "hf:falcon?num_hidden_layers=2,hidden_size=96,num_attention_heads=6,num_kv_heads=2,vocab_size=300,"
    "new_decoder_architecture=true"
)


@pytest.mark.parametrize("model", [PHI, FALCON])
def test_a_weight_of_query_key_and_value_counts_the_query_heads_that_are_cut_and_says_why_it_is_whole(
    model: str,
) -> None:
    cut = next(each for each in named(model, 3, "heads") if each.is_cut)
    assert (cut.units, cut.width) == (3, 32)  # one of 16 in each KV head's group
    (whole,) = [each for each in made(model, 3).whole if "self_att" in each.pattern]
    assert whole.reason == "the heads (2): 3 ranks don't divide its 2"


def test_a_table_that_the_model_makes_for_all_heads_is_cut_where_attention_takes_it() -> None:
    """An entry for each head of each sequence; each sequence's heads are a run of 4."""
    one = made("tests.distributed.own_modules:Sloped", 2)
    own = style_of(one.plan, "blocks.1.mixer")
    assert own is not None
    assert own.cut == (("bias", ArgumentCut(0, 4)),)
    assert own.divide == ("num_heads",)


def test_key_value_heads_go_with_the_query_heads_that_they_serve() -> None:
    (heads,) = named("llama3-debug", 4, "KV heads")
    assert heads.units == 4
    held = {(each.parameter.rpartition("attention.")[2], each.dim): each.held for each in heads.members}
    assert held == {
        ("wq.weight", 0): "shard(0)",
        ("wk.weight", 0): "shard(0)",
        ("wv.weight", 0): "shard(0)",
        ("wo.weight", 1): "shard(1)",
    }


@pytest.mark.parametrize("model", ["llama3-debug?vocab_size=33", "gpt-debug?vocab_size=33"])
def test_an_odd_vocabulary_is_cut_all_the_same(model: str) -> None:
    one = made(model, 2)
    assert style_of(one.plan, "output") == Style(StyleName.COLWISE, input=Shard(1), output=Shard(-1))
    assert style_of(one.plan, "tok_embeddings") is not None
    assert not any("tok_embeddings" in each.pattern for each in one.whole)


def test_an_odd_inner_width_is_left_whole_and_says_so() -> None:
    one = made("llama3-debug?ffn_hidden=33", 2)
    reasons = {each.pattern: each.reason for each in one.whole}
    assert "2 ranks don't divide its 33" in reasons["layers.*.feed_forward.w1.weight"]
    assert style_of(one.plan, "layers.0.attention.wq") == Style(StyleName.COLWISE)


def test_a_hidden_width_that_a_weight_has_on_both_sides_is_not_cut() -> None:
    """Without a norm nothing else speaks against it: the residual ties a square weight's two dims."""
    (hidden,) = named("tests.unit.mixed_models:square", 2, "hidden width")
    assert "a tensor has it in two of its dims" in hidden.obstacles
    assert not hidden.is_cut


def test_heads_that_a_table_is_sliced_for_are_not_cut() -> None:
    """slopes[:heads] with half the heads would be the first half on every rank."""
    (heads,) = named("tests.unit.mixed_models:sloped", 2, "heads")
    assert any(why.startswith("slice gives every rank all of it") for why in heads.obstacles)
    assert not heads.is_cut


def test_a_table_of_which_somebody_reads_a_row_by_its_number_is_whole_and_so_is_the_head_that_shares_it() -> (
    None
):
    """Row 37 of a rank's part would be another one."""
    one = made("tests.unit.mixed_models:padded", 2)
    assert style_of(one.plan, "embed") == Style(StyleName.REPLICATE)
    assert style_of(one.plan, "head") == Style(StyleName.REPLICATE)
    assert style_of(one.plan, "layers.0.q") == Style(StyleName.COLWISE)


def test_what_counts_heads_is_divided_wherever_it_is_written() -> None:
    """Attention's own number, and a group norm's; not how often a key head is repeated."""
    plan = made("tests.unit.mixed_models:grouped", 2).plan
    divided = {rule.pattern: rule.style.divide for rule in plan.rules if rule.style.divide}
    assert divided == {"layers.*": ("heads",), "layers.*.norm": ("num_groups",)}


def test_statistics_over_a_width_are_why_it_is_not_cut() -> None:
    (hidden,) = named("llama3-debug", 2, "hidden width")
    assert not hidden.is_cut
    assert hidden.obstacles
    assert {"layers.*.attention_norm", "norm"} <= set(hidden.whole_at)


def test_a_made_plan_holds_no_number_of_the_trace() -> None:
    """Sizes that know where they come from stay in the trace."""
    one = made("hf:phi3", 2)
    numbers = [n for rule in one.plan.rules for n in rule.style.pieces]
    assert numbers
    assert not any(isinstance(n, Size) for n in numbers)


@pytest.mark.parametrize(
    ("mesh", "style"),
    [
        ("ep=2", "experts(output=replicate, parameters={w1: shard(1), w2: shard(2), w3: shard(1)})"),
        ("ep=4,tp=2", "experts(output=replicate, parameters={w1: shard(1), w2: shard(2), w3: shard(1)})"),
        ("tp=2", "gather_input"),
    ],
)
def test_experts_are_cut_by_expert_where_the_mesh_has_an_axis_for_them(mesh: str, style: str) -> None:
    own = make_plan(find_model("moe-debug"), Wish(Mesh.parse(mesh)))
    rule = own.plan.rule_for("layers.3.feed_forward.experts")
    assert rule is not None
    assert str(rule.style).startswith(style)
    whole = {each.pattern for each in own.whole}
    assert not any("experts" in pattern for pattern in whole)
    assert ("layers.*.attention.wq.weight" in whole) == (Mesh.parse(mesh).tp == 1)
    assert ("to those that the router chose" in own.comments[rule.pattern]) == (mesh != "tp=2")


def test_experts_that_the_mesh_cannot_share_evenly_are_refused_up_front() -> None:
    message = r"^layers\.0\.feed_forward\.experts has 8 experts, which ep=3 can't share evenly\. Use ep in "
    message += r"\{1, 2, 4, 8\}\.$"
    with pytest.raises(PlanError, match=message):
        make_plan(find_model("moe-debug"), Wish(Mesh.parse("ep=3,tp=2")))


def test_inside_a_look_up_each_rank_sees_its_own_rows_alone() -> None:
    at = [each.name for each in CASES].index("a table that norms its rows")
    rule = made(f"tests.distributed.own_modules_cases:case_{at}", 2).plan.rule_for("embed.norm")
    assert rule is not None
    assert rule.style == Style(StyleName.REPLICATE, gradient=Partial())


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize(
    ("case", "key", "pieces"),
    [
        ("fewer key and value heads than ranks", "blocks.0.mixer.k", "8/2"),
        (
            "query, key and value in one weight, fewer key and value heads than ranks",
            "blocks.0.mixer.qkv",
            "32+8/2+8/2",
        ),
    ],
)
def test_ranks_share_key_heads_where_there_are_fewer_and_have_their_part_of_the_query_heads(
    case: str, key: str, pieces: str, tp: int
) -> None:
    at = [each.name for each in CASES].index(case)
    plan = made(f"tests.distributed.own_modules_cases:case_{at}", tp).plan
    rule = plan.rule_for(key)
    assert rule is not None
    assert rule.style.name is StyleName.COLWISE
    sizes, parts = parse_pieces(pieces)
    if tp == 2:  # none is shared then
        assert (rule.style.pieces, rule.style.parts) == (sizes if len(sizes) > 1 else (), ())
    else:
        assert (rule.style.pieces, rule.style.parts) == (sizes, parts)


@FULL
def test_one_forward_does_for_any_number_of_plans() -> None:
    source, mesh = find_model("moe-debug"), Mesh.parse("tp=2")
    whole = frozenset({"layers.*.attention"})
    wishes = [
        Wish(mesh, whole=whole),
        Wish(Mesh.parse("tp=4"), sequence=False),
        Wish(Mesh.parse("ep=2,tp=2")),
        Wish(mesh),
    ]
    forward, alone = forward_of(source), [make_plan(source, wish) for wish in wishes]
    for wish, expected in zip([*wishes, wishes[0]], [*alone, alone[0]], strict=True):
        assert make_plan(source, wish, forward=forward) == expected
    of_one = groups_of(source, mesh, 4096, forward)
    assert of_one == groups_of(source, mesh, 4096)
    assert of_one
