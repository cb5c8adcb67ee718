"""Plans as data: patterns, arguments, TOML there and back, and every error word for word."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardwise.core.argument_cut import ArgumentCut
from shardwise.core.errors import PlanError
from shardwise.core.held import Held, size_on_a_rank, why_not_shared
from shardwise.core.placement import Partial, Placement, Replicate, Shard, format_placement, parse_placement
from shardwise.core.plan import (
    Engine,
    Ownership,
    Plan,
    ReduceScatter,
    Rule,
    Style,
    StyleName,
    suggest,
    suggest_pattern,
)
from shardwise.parallel.ownership import PieceOrder

PLACEMENTS: st.SearchStrategy[Placement] = st.one_of(
    st.integers(-9, 9).map(Shard), st.just(Replicate()), st.just(Partial())
)
DIMS = st.integers(-9, 9)
PIECES = st.lists(st.integers(1, 9999), min_size=2, max_size=4).map(tuple)
SHARED = st.lists(st.tuples(st.integers(1, 99), st.integers(0, 9)), min_size=1, max_size=4).map(
    lambda many: (tuple(size * (count or 1) for size, count in many), tuple(count for _, count in many))
)
NAMES = st.lists(st.text('abc_."é', min_size=1, max_size=4).filter(lambda n: all(n.split("."))), unique=True)
HELD = st.one_of(
    st.builds(Held, DIMS.map(Shard), st.just(()) | PIECES),
    st.builds(
        lambda dim, shared: Held(Shard(dim), shared[0], parts=shared[1]),
        DIMS,
        SHARED.filter(lambda shared: any(shared[1])),
    ),
    st.builds(Held, st.just(Replicate()), gradient=st.none() | st.just(Partial())),
)
LEVELS = st.text("abc_01*", min_size=1, max_size=4)
PATTERNS = st.lists(LEVELS, min_size=1, max_size=4).map(".".join)
MODULES = st.lists(st.text("abc_01", min_size=1, max_size=4), min_size=1, max_size=5).map(".".join)


@st.composite
def styles(draw: st.DrawFn) -> Style:
    name = draw(st.sampled_from(StyleName))
    allowed = name.arguments
    return Style(
        name,
        input=draw(st.none() | PLACEMENTS) if allowed & {"input", "from"} else None,
        output=draw(st.none() | PLACEMENTS) if "output" in allowed else None,
        ownership=draw(st.sampled_from(Ownership)) if "ownership" in allowed else Ownership.CONTIGUOUS,
        pieces=draw(st.just(()) | PIECES) if "pieces" in allowed else (),
        parameters=tuple((key, draw(HELD)) for key in draw(NAMES)) if "parameters" in allowed else (),
        divide=tuple(draw(NAMES)) if "divide" in allowed else (),
        gradient=draw(st.none() | st.just(Partial())) if "gradient" in allowed else None,
    )


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    patterns = draw(
        st.lists(
            PATTERNS | st.text(min_size=1).filter(lambda p: all(p.split("."))),
            min_size=1,
            max_size=5,
            unique=True,
        )
    )
    return Plan(
        draw(st.text(min_size=1)),
        tuple(Rule(pattern, draw(styles())) for pattern in patterns),
        draw(st.sampled_from(Engine)),
        draw(st.sampled_from(ReduceScatter)),
    )


def rule(pattern: str, style: StyleName = StyleName.ROWWISE) -> Rule:
    return Rule(pattern, Style(style))


@pytest.mark.parametrize(
    ("pattern", "module", "matches"),
    [
        ("output", "output", True),
        ("output", "outputs", False),
        ("output", "layers.output", False),
        ("layers.*.wq", "layers.0.wq", True),
        ("layers.*.wq", "layers.31.wq", True),
        ("layers.*.wq", "layers.wq", False),
        ("layers.*.wq", "layers.0.attention.wq", False),
        ("layers.*", "layers.0", True),
        ("layers.*", "layers.0.attention", False),
        ("**.wq", "wq", True),
        ("**.wq", "layers.0.attention.wq", True),
        ("**.wq", "layers.0.attention.xwq", False),
        ("layers.**", "layers", True),
        ("layers.**", "layers.0.attention.wq", True),
        ("layers.**.wq", "layers.wq", True),
        ("**.**.wq", "a.wq", True),
        ("**", "anything.at.all", True),
        ("layers.*.w*", "layers.0.w1", True),
        ("layers.*.w*", "layers.0.v1", False),
        ("*_norm", "attention_norm", True),
        ("a+b", "a+b", True),
        ("a+b", "aab", False),
        ("[ab]", "a", False),
    ],
)
def test_a_star_is_one_level_and_two_are_any_number(pattern: str, module: str, matches: bool) -> None:
    assert rule(pattern).matches(module) is matches


@given(MODULES)
def test_a_name_without_stars_matches_itself_only(module: str) -> None:
    assert rule(module).matches(module)
    assert not rule(module).matches(f"{module}.x")
    assert not rule(module).matches(f"x.{module}")


@given(MODULES, st.data())
def test_a_level_may_be_a_star_and_levels_two(module: str, data: st.DataObject) -> None:
    parts = module.split(".")
    first = data.draw(st.integers(0, len(parts) - 1))
    last = data.draw(st.integers(first, len(parts)))
    assert rule(".".join([*parts[:first], "*", *parts[first + 1 :]])).matches(module)
    assert rule(".".join([*parts[:first], "**", *parts[last:]])).matches(module)


@given(PATTERNS, MODULES)
def test_patterns_match_as_the_plain_definition_says(pattern: str, module: str) -> None:
    def by_definition(levels: list[str], names: list[str]) -> bool:
        if not levels:
            return not names
        if levels[0] == "**":
            return any(by_definition(levels[1:], names[skip:]) for skip in range(len(names) + 1))
        one_level = re.compile("".join("[^.]*" if c == "*" else re.escape(c) for c in levels[0]))
        return (
            bool(names) and one_level.fullmatch(names[0]) is not None and by_definition(levels[1:], names[1:])
        )

    assert rule(pattern).matches(module) is by_definition(pattern.split("."), module.split("."))


def test_many_stars_take_no_time() -> None:
    assert not rule(".".join(["**", "*"] * 12) + ".x").matches(".".join(["a"] * 40))


def test_the_later_of_two_rules_holds() -> None:
    plan = Plan("p", (rule("layers.**.wq", StyleName.COLWISE), rule("layers.0.wq", StyleName.REPLICATE)))
    assert plan.rule_for("layers.0.wq") is plan.rules[1]
    assert plan.rule_for("layers.1.wq") is plan.rules[0]
    assert plan.rule_for("output") is None


@given(PLACEMENTS)
def test_a_placement_reads_its_own_text(placement: Placement) -> None:
    assert parse_placement(format_placement(placement)) == placement
    assert parse_placement(str(placement)) == placement


@pytest.mark.parametrize(
    "text", ["", "shard", "shard()", "shard(x)", "shard(1", "shard(100)", "sharded(1)", "replicated"]
)
def test_what_is_no_placement_is_refused(text: str) -> None:
    with pytest.raises(
        ValueError, match=re.escape(f'"{text}" is no placement. Allowed: shard(DIM), replicate, partial.')
    ):
        parse_placement(text)


@given(styles())
def test_a_style_reads_its_own_value(style: Style) -> None:
    assert Style.from_value(style.to_value()) == style


@given(plans())
def test_a_plan_reads_its_own_toml(plan: Plan) -> None:
    assert Plan.from_toml(plan.to_toml()) == plan


def test_a_plan_file_is_short_to_read() -> None:
    plan = Plan(
        "mine",
        (
            rule("tok_embeddings"),
            Rule("layers.*.attention", Style(StyleName.GATHER_INPUT, input=Shard(1))),
            Rule("output", Style(StyleName.COLWISE, input=Shard(1), output=Shard(-1))),
        ),
        reduce_scatter=ReduceScatter.BACKEND,
    )
    assert plan.to_toml() == (
        'name = "mine"\n'
        'engine = "native"\n'
        'reduce_scatter = "backend"\n'
        "[rules]\n"
        '"tok_embeddings" = "rowwise"\n'
        '"layers.*.attention" = { style = "gather_input", from = "shard(1)" }\n'
        '"output" = { style = "colwise", input = "shard(1)", output = "shard(-1)" }\n'
    )


@pytest.mark.parametrize("name", ["😀", "\x7f", 'quote " and \\', "two\nlines", "\u2028"])
def test_any_name_survives_toml(name: str) -> None:
    plan = Plan(name, (rule("a"),))
    assert Plan.from_toml(plan.to_toml()) == plan


def test_a_plan_without_a_name_is_named_after_its_source() -> None:
    assert Plan.from_toml('[rules]\n"a" = "rowwise"', "plans/mine.toml").name == "plans/mine.toml"


def test_plans_are_equal_by_value() -> None:
    assert Plan("p", (rule("a"),)) == Plan("p", (rule("a"),))
    assert len({Plan("p", (rule("a"),)), Plan("p", (rule("a"),))}) == 1


def test_a_rule_says_how_parameters_are_held_and_what_counts_them() -> None:
    plan = Plan(
        "fused",
        (
            Rule("h.*.qkv", Style(StyleName.COLWISE, pieces=(3072, 1024, 1024), divide=("nf",))),
            Rule(
                "h.*.mixer",
                Style(
                    StyleName.LOCAL,
                    parameters=(
                        ("A_log", Held(Shard(0))),
                        ("conv.weight", Held(Shard(0), (8, 2))),
                        ("scale", Held(Replicate(), gradient=Partial())),
                    ),
                    divide=("num_heads", "config.num_attention_heads"),
                ),
            ),
            Rule("h.*.q_norm", Style(StyleName.REPLICATE, gradient=Partial())),
        ),
    )
    assert plan.to_toml() == (
        'name = "fused"\n'
        'engine = "native"\n'
        "[rules]\n"
        '"h.*.qkv" = { style = "colwise", pieces = "3072+1024+1024", divide = ["nf"] }\n'
        '"h.*.mixer" = { style = "local", parameters = { A_log = "shard(0)", "conv.weight" = "shard(0: 8+2)"'
        ', scale = "replicate, gradient partial" }, divide = ["num_heads", "config.num_attention_heads"] }\n'
        '"h.*.q_norm" = { style = "replicate", gradient = "partial" }\n'
    )
    assert Plan.from_toml(plan.to_toml()) == plan
    assert plan.rules[0].style.arguments == "pieces=3072+1024+1024, divide=nf"


def test_a_plan_may_say_that_the_gradient_of_every_input_is_a_part() -> None:
    rule = Rule("h.*.experts", Style(StyleName.GATHER_INPUT, output=Replicate(), every_input=True))
    text = Plan("experts", (rule,)).to_toml()
    assert '"h.*.experts" = { style = "gather_input", output = "replicate", every_input = true }' in text
    assert Plan.from_toml(text).rules == (rule,)
    with pytest.raises(PlanError, match=r"every_input is 1\. Allowed: true, false\."):
        Plan.from_toml(text.replace("true", "1"))


def test_a_plan_may_say_of_which_constants_a_rank_takes_its_part() -> None:
    cut = (("alibi", ArgumentCut(0, 16)), ("bias", ArgumentCut(-1)))
    rule = Rule("h.*.attn", Style(StyleName.LOCAL, cut=cut))
    text = Plan("slopes", (rule,)).to_toml()
    assert 'cut = { alibi = "shard(0) of every 16", bias = "shard(-1)" }' in text
    assert Plan.from_toml(text).rules == (rule,)


@given(plans(), st.dictionaries(PATTERNS, st.text()))
def test_comments_stand_above_their_rules_and_change_nothing(plan: Plan, comments: dict[str, str]) -> None:
    told = {**comments, plan.rules[0].pattern: "one class of 32 heads\n\x00 q, k, v"}
    text = plan.to_toml(comments=told)
    assert Plan.from_toml(text) == plan
    assert "[rules]\n# one class of 32 heads\n#   q, k, v\n" in text


@given(HELD)
def test_how_a_parameter_is_held_reads_its_own_text(held: Held) -> None:
    assert Held.parse(str(held)) == held


def test_what_a_parameter_that_is_cut_has_is_no_part() -> None:
    with pytest.raises(ValueError, match="what is cut is cut alike"):
        Held(Shard(0), gradient=Partial())
    with pytest.raises(ValueError, match="whole has no pieces"):
        Held(Replicate(), (1, 2))
    assert Held(Replicate(), gradient=Partial()).gradient_on(2) == Partial()
    assert Held(Shard(1), (1, 2)).gradient_on(2) == Shard(1)


def test_what_ranks_share_is_cut_in_memory_where_its_pieces_divide_by_them() -> None:
    held = Held.parse("shard(0: 32+8/1)")
    assert (held.kept_on(4), held.gradient_on(4)) == (Shard(0), Shard(0))
    assert (held.kept_on(16), held.gradient_on(16)) == (Replicate(), Partial())


@given(SHARED, st.integers(1, 12))
def test_what_ranks_use_of_pieces_is_what_they_share_out(
    shared: tuple[tuple[int, ...], tuple[int, ...]], ranks: int
) -> None:
    pieces, parts = shared
    if why_not_shared(pieces, parts, ranks) is not None:
        return
    order = PieceOrder(pieces, ranks, 0, parts)
    own = [order.ids_of(rank) for rank in range(ranks)]
    assert {len(ids) for ids in own} == {size_on_a_rank(pieces, parts, ranks)}
    assert sorted(set(torch.cat(own).tolist())) == list(range(sum(pieces)))
    assert all(bool((ids.diff() > 0).all()) for ids in own)


STYLES = (
    "rowwise, colwise, routed, replicated, sequence_parallel, gather_input, replicate, local, whole, "
    "split_input, experts"
)
HOW = 'Allowed: "shard(DIM)", "shard(DIM: SIZE+SIZE)" in pieces, "replicate", "replicate, gradient partial".'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "rules",
            "mine.toml: not valid TOML: Expected '=' after a key in a key/value pair (at end of document).",
        ),
        (
            'nme = "x"',
            'mine.toml: unknown key "nme". Allowed: context_attention, engine, name, reduce_scatter, rules.',
        ),
        ("", 'mine.toml: no [rules] table. Write [rules] and then "MODULE.PATTERN" = "STYLE" lines.'),
        (
            "rules = 3",
            "mine.toml: rules is 3, and not a table. "
            'Write [rules] and then "MODULE.PATTERN" = "STYLE" lines.',
        ),
        ('name = 3\n[rules]\n"a" = "rowwise"', "mine.toml: name is 3. Write it in quotes."),
        ('name = ""\n[rules]\n"a" = "rowwise"', "mine.toml: a plan needs a name."),
        (
            "[rules]",
            'mine.toml: plan "mine.toml" has no rules. Write at least one: "MODULE.PATTERN" = "STYLE".',
        ),
        (
            'engine = "nativ"\n[rules]\n"a" = "rowwise"',
            'mine.toml: engine is "nativ". Did you mean "native"? Allowed: native, dtensor.',
        ),
        (
            'reduce_scatter = "x"\n[rules]\n"a" = "rowwise"',
            'mine.toml: reduce_scatter is "x". Allowed: auto, backend, pairwise.',
        ),
        (
            '[rules]\n"a..b" = "rowwise"',
            'mine.toml: rule "a..b": "a..b" is no pattern. Write a dotted module name; * is one level, ** '
            "any number.",
        ),
        (
            '[rules]\n"" = "rowwise"',
            'mine.toml: rule "": "" is no pattern. Write a dotted module name; * is one level, ** any '
            "number.",
        ),
        (
            '[rules]\n"a" = "colwize"',
            f'mine.toml: rule "a": style is "colwize". Did you mean "colwise"? Allowed: {STYLES}.',
        ),
        (
            '[rules]\n"a" = 3',
            'mine.toml: rule "a": a style is a name or a table such as { style = "rowwise" }, not 3.',
        ),
        (
            '[rules]\n"a" = { output = "shard(1)" }',
            f'mine.toml: rule "a": style is missing. Allowed: {STYLES}.',
        ),
        (
            '[rules]\n"a" = { style = "rowwise", out = "shard(1)" }',
            'mine.toml: rule "a": style rowwise takes no argument "out". Allowed: divide, gradient, input, '
            "output, parameters, pieces.",
        ),
        (
            '[rules]\n"a" = { style = "sequence_parallel", output = "shard(1)" }',
            'mine.toml: rule "a": style sequence_parallel takes no argument "output". Allowed: none.',
        ),
        (
            '[rules]\n"a" = { style = "gather_input", input = "shard(1)" }',
            'mine.toml: rule "a": style gather_input takes no argument "input". Allowed: cut, '
            "divide, every_input, from, output, parameters.",
        ),
        (
            '[rules]\n"a" = { style = "rowwise", output = "shard" }',
            'mine.toml: rule "a": output: "shard" is no placement. Allowed: shard(DIM), replicate, partial.',
        ),
        (
            '[rules]\n"a" = { style = "routed", ownership = "interleave" }',
            'mine.toml: rule "a": ownership is "interleave". Did you mean "interleaved"? Allowed: '
            "contiguous, interleaved.",
        ),
        (
            '[rules]\n"a" = { style = "colwise", pieces = "8" }',
            'mine.toml: rule "a": pieces: pieces are 8. Give two sizes or more, each at least 1.',
        ),
        (
            '[rules]\n"a" = { style = "colwise", pieces = "8+0" }',
            'mine.toml: rule "a": pieces: pieces are 8+0. Give two sizes or more, each at least 1.',
        ),
        (
            '[rules]\n"a" = { style = "colwise", parameters = "weight" }',
            'mine.toml: rule "a": parameters is \'weight\'. Write a table such as { weight = "shard(0)" }.',
        ),
        (
            '[rules]\n"a" = { style = "colwise", parameters = { weight = "cut" } }',
            f'mine.toml: rule "a": parameters: "weight": "cut" says no way to hold a parameter. {HOW}',
        ),
        (
            '[rules]\n"a" = { style = "local", parameters = { "a..b" = "replicate" } }',
            'mine.toml: rule "a": parameters: "a..b" is no name. Write a dotted name, from the module on.',
        ),
        (
            '[rules]\n"a" = { style = "local", divide = "heads" }',
            'mine.toml: rule "a": divide is \'heads\'. Write a list of names such as ["num_heads"].',
        ),
        (
            '[rules]\n"a" = { style = "local", divide = ["heads", "heads"] }',
            'mine.toml: rule "a": divide has "heads" twice. Keep one.',
        ),
        (
            '[rules]\n"a" = { style = "local", cut = "alibi" }',
            'mine.toml: rule "a": cut is \'alibi\'. Write a table such as { alibi = "shard(0)" }.',
        ),
        (
            '[rules]\n"a" = { style = "local", cut = { alibi = "shard(0) of 4" } }',
            'mine.toml: rule "a": cut: "alibi": "shard(0) of 4" is no cut of an argument. Allowed: '
            '"shard(DIM)", "shard(DIM) of every SIZE".',
        ),
        (
            '[rules]\n"a" = { style = "replicate", gradient = "whole" }',
            'mine.toml: rule "a": gradient is "whole". Allowed: partial.',
        ),
    ],
)
def test_a_wrong_plan_file_is_one_line(text: str, message: str) -> None:
    with pytest.raises(PlanError) as caught:
        Plan.from_toml(text, "mine.toml")
    assert str(caught.value) == message


def test_toml_nested_beyond_reading_is_one_line() -> None:
    with pytest.raises(PlanError, match=r"^plan: not valid TOML: "):
        Plan.from_toml("a = " + "[" * 100_000)


def test_two_rules_with_one_pattern_are_refused() -> None:
    with pytest.raises(PlanError, match=r'^plan "p" has two rules "a"\. Keep one\.$'):
        Plan("p", (rule("a"), rule("b"), rule("a", StyleName.COLWISE)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"name": StyleName.ROUTED, "output": Shard(1)},
            'style routed takes no argument "output". Allowed: ownership.',
        ),
        (
            {"name": StyleName.SPLIT_INPUT, "output": Shard(1)},
            'style split_input takes no argument "output". Allowed: divide, parameters.',
        ),
        (
            {"name": StyleName.REPLICATE, "input": Shard(1)},
            'style replicate takes no argument "input". Allowed: gradient.',
        ),
        (
            {"name": StyleName.ROWWISE, "ownership": Ownership.INTERLEAVED},
            'style rowwise takes no argument "ownership". Allowed: divide, gradient, input, output, '
            "parameters, pieces.",
        ),
    ],
)
def test_a_style_refuses_arguments_that_it_does_not_take(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(PlanError) as caught:
        Style(**arguments)  # type: ignore[arg-type]
    assert str(caught.value) == message


MODULE_NAMES = [
    "",
    "tok_embeddings",
    "layers",
    "layers.0",
    "layers.0.attention",
    "layers.0.attention.wq",
    "layers.11.attention.wq",
    "output",
]


def test_the_nearest_pattern_has_stars_for_layer_numbers() -> None:
    assert suggest_pattern("layers.*.atention.wq", MODULE_NAMES) == "layers.*.attention.wq"
    assert suggest_pattern("layers.3.attentio.wq", MODULE_NAMES) == "layers.*.attention.wq"
    assert suggest_pattern("zzz", MODULE_NAMES) is None
    inside = [f"blocks.{layer}.{place}" for layer in range(3) for place in range(3)]
    assert suggest_pattern("block.*.2", inside) == "blocks.*.2"
    assert suggest_pattern("block.1.2", inside) == "blocks.*.2"
    assert suggest_pattern("block.*.7", inside) == "blocks.*.*"


def test_the_nearest_name_is_suggested_where_one_is_near() -> None:
    assert suggest("rowise", ["rowwise", "colwise"]) == ' Did you mean "rowwise"?'
    assert suggest("zzz", ["rowwise", "colwise"]) == ""


def test_a_rule_says_its_pattern_and_style() -> None:
    assert str(rule("layers.*.wq", StyleName.COLWISE)) == '"layers.*.wq" (colwise)'
    assert str(Style(StyleName.COLWISE, output=Shard(-1))) == "colwise(output=shard(-1))"
