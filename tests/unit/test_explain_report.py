"""Explanation and Contrast -> terminal, JSON and HTML text. The page in a real browser:
tests/e2e/test_explain_html.py."""

import html
import json
import math
import re
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from shardwise.core.collective import CollectiveKind
from shardwise.core.errors import InputError
from shardwise.core.explanation import CollectiveGroup, Contrast, Explanation
from shardwise.core.placement import Partial, Replicate, Shard
from shardwise.core.plan import StyleName
from shardwise.core.program import Phase
from shardwise.core.rule import RuleRef
from shardwise.files.document import read_document, write_document
from shardwise.report.common import units
from shardwise.report.common.deliver import show
from shardwise.report.explain import contrasts, rows
from shardwise.report.explain.band import Stop, bands
from shardwise.report.explain.html import contrast_html, explanation_html, memory_chart, wire_chart
from tests.unit.comparison_example import HOSTILE_MARKUP, HOSTILE_NAME
from tests.unit.explanation_example import (
    BY_DATA,
    EMBEDDING_REASON,
    GRADIENT_FINDING,
    LAYERS,
    MIB,
    alone_example,
    contrast_example,
    dtensor_example,
    explanation,
    group,
    hostile_example,
)

WIDTHS = (80, 100, 150)
EXAMPLES = {
    "rowwise": explanation(),
    "colwise": explanation("colwise"),
    "routed": explanation("routed"),
    "dtensor": dtensor_example(),
    "alone": alone_example(),
}
HUGE = "x" * 10_000_000

each_example = pytest.mark.parametrize("example", EXAMPLES.values(), ids=EXAMPLES.keys())
each_width = pytest.mark.parametrize("width", WIDTHS)


def printed(noun: Explanation | Contrast, width: int, *, colour: bool = False) -> str:
    console = Console(width=width, force_terminal=colour, color_system="standard" if colour else None)
    with console.capture() as captured:
        show(noun, "terminal", console)
    return captured.get()


def words_of(text: str) -> str:
    """The printed text on one line, so that it doesn't matter where it was broken."""
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", text).split())


def text_of(page: str) -> str:
    """What a reader sees of a page, on one line."""
    body = re.sub(r"<(script|style)>.*?</\1>", " ", page, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", "", body)).replace("\u00ad", "").split())


def every_drawing(noun: Explanation | Contrast) -> dict[str, str]:
    page = explanation_html(noun) if isinstance(noun, Explanation) else contrast_html(noun)
    return {
        **{f"terminal {width}": words_of(printed(noun, width)) for width in WIDTHS},
        "page": text_of(page),
    }


# -- words


@pytest.mark.parametrize(
    ("share", "text"),
    [(0.0, "0 %"), (1.0, "100 %"), (0.5, "50 %"), (0.99997, "99.997 %"), (0.00004, "0.004 %")],
)
def test_a_share_is_never_rounded_to_all_or_nothing(share: float, text: str) -> None:
    assert units.format_share(share) == text


@given(st.floats(min_value=0, max_value=1))
def test_any_share_reads_back_within_half_a_percent(share: float) -> None:
    assert float(units.format_share(share).removesuffix(" %")) == pytest.approx(share * 100, abs=0.5)


@pytest.mark.parametrize(
    ("flops", "text"),
    [(0, "0"), (512, "512 FLOP"), (17_568_563_724_288, "17.6 TFLOP"), (None, "not measured")],
)
def test_flops_have_three_digits_and_a_decimal_prefix(flops: int | None, text: str) -> None:
    assert units.format_flops(flops) == text


def test_a_few_bytes_are_whole_ones() -> None:
    assert units.format_bytes(7.0) == "7 B"


@pytest.mark.parametrize(
    ("kind", "share"),
    [
        (CollectiveKind.ALL_GATHER, "7/8"),
        (CollectiveKind.ALL_REDUCE, "2 x 7/8"),
        (CollectiveKind.BROADCAST, "all"),
    ],
)
def test_what_goes_over_the_wire_is_a_fraction_of_the_payload(kind: CollectiveKind, share: str) -> None:
    assert rows.wire_share(group(kind, Phase.FORWARD, "m", Partial(), Replicate())) == share


@pytest.mark.parametrize(
    ("payload", "wire", "share"),
    [(100, 0.0, "none"), (100, 31.0, None), (0, 0.0, None), (100, math.inf, None)],
)
def test_what_is_no_simple_fraction_is_not_called_one(payload: int, wire: float, share: str | None) -> None:
    found = replace(explanation().collectives[0], payload_bytes=payload, wire_bytes=wire)
    assert rows.wire_share(found) == share


def test_a_collective_that_stands_for_another_says_so() -> None:
    found = explanation().collectives[0]
    assert rows.carried_out_as(found) is None
    summed = replace(found, kind=CollectiveKind.ALL_TO_ALL)
    chunked = replace(found, carries_out=CollectiveKind.ALL_TO_ALL, kind=CollectiveKind.ALL_GATHER)
    odd = replace(found, carries_out=CollectiveKind.BROADCAST, kind=CollectiveKind.ALL_REDUCE)
    assert [rows.carried_out_as(each) for each in (summed, chunked, odd)] == [
        "all-to-all + sum",
        "all-gather + chunk",
        "all-reduce",
    ]


def test_a_placement_that_nobody_told_is_said_to_be_so() -> None:
    found = explanation().collectives[0]
    assert rows.placement_change(found) == "Partial -> Shard(1)"
    assert rows.placement_change(replace(found, after=None)) == "Partial -> not told"
    assert rows.placement_change(replace(found, before=None, after=None)) == "not told"


def test_what_goes_from_stage_to_stage_has_no_placement_to_tell() -> None:
    one = explanation()
    passed = replace(
        one.collectives[0], before=None, after=None, kind=CollectiveKind.SEND, carries_out=CollectiveKind.SEND
    )
    for where, text in every_drawing(replace(one, collectives=(passed,))).items():
        assert "not told" not in text, where
    for where, text in every_drawing(dtensor_example()).items():
        assert "Placement placement" not in text, where


def test_the_sums_are_those_of_the_groups() -> None:
    example = explanation()
    in_layers, whole = rows.layer_tally(example), rows.tally(example.collectives)
    edges = rows.tally(group for group in example.collectives if group.phase not in rows.LAYER_PHASES)
    assert in_layers.wire_bytes + edges.wire_bytes == whole.wire_bytes == example.wire_bytes
    assert in_layers.count + edges.count == whole.count == sum(found.count for found in example.collectives)
    assert str(in_layers) == f"{2 * LAYERS + 1} all-gathers, {2 * LAYERS + 1} reduce-scatters, 504 MiB sent"
    assert [row.phase for row in rows.phase_rows(example)] == [
        Phase.FORWARD,
        Phase.LOSS,
        Phase.BACKWARD,
        Phase.CLIP,
        Phase.OPTIMIZER,
    ]


def test_a_gradient_is_told_where_it_is_not_as_its_parameter() -> None:
    table, norm = dtensor_example().holdings[0], alone_example().holdings[0]
    axes = (("tp", 8),)
    assert rows.gradient_text(explanation().holdings[0], axes) == "the same"
    assert rows.gradient_text(table, axes) == "Replicate [1024, 64]"
    assert rows.gradient_text(norm, axes) == "none"
    two = replace(
        table,
        placement=(Replicate(), Shard(0)),
        grad_placement=(Partial(), Shard(0)),
        grad_shape=table.local_shape,
    )
    assert rows.placements_text(two.placement, (("dp", 2), ("tp", 4))) == "dp: Replicate, tp: Shard(0)"
    assert rows.gradient_text(two, (("dp", 2), ("tp", 4))) == "dp: Partial, tp: Shard(0)"


def test_a_finding_that_both_plans_have_stands_once() -> None:
    example = dtensor_example()
    other = replace(example, plan="other", findings=(GRADIENT_FINDING,))
    found = contrasts.findings_of(contrast_example(example, other))
    assert [(label, finding.subject) for label, finding in found] == [
        ("rowwise@dtensor", "layers.*.misspelt"),
        ("both plans", "tok_embeddings.weight"),
    ]


# -- the picture of a layer


def stops(found: tuple[Stop, ...]) -> list[str]:
    return [stop.label if stop.group is None else f"<{stop.group.kind.value}>" for stop in found]


def test_collectives_stand_between_the_modules_and_the_backward_is_the_mirror_of_the_forward() -> None:
    forward, backward = bands(explanation())
    assert (forward.layers, stops(forward.first)) == (LAYERS, ["tok_embeddings", "<reduce_scatter>"])
    assert stops(forward.layer) == ["attention_norm", "<all_gather>", "attention", "<reduce_scatter>"]
    assert stops(backward.layer) == ["<all_gather>", "attention", "<reduce_scatter>", "attention_norm"]
    assert stops(backward.last) == ["<all_gather>", "tok_embeddings"]


def test_an_embedding_exchanges_after_its_look_up_and_before_its_backward() -> None:
    forward, backward = bands(explanation("colwise"))
    assert stops(forward.first) == ["tok_embeddings", "<all_to_all>"]
    assert stops(backward.last) == ["<all_to_all>", "tok_embeddings"]


def test_logits_are_gathered_after_the_head_and_its_input_before_it() -> None:
    example = explanation()
    for dim, order in (
        (1, ["<all_gather>", "norm"]),
        (2, ["norm", "<all_gather>"]),
        (-1, ["norm", "<all_gather>"]),
    ):
        gather = group(CollectiveKind.ALL_GATHER, Phase.FORWARD, "norm", Shard(dim), Replicate())
        forward, _ = bands(replace(example, collectives=(*example.collectives, gather)))
        assert stops(forward.last) == order


def test_a_module_that_the_model_lists_last_but_runs_first_is_left_out() -> None:
    example = explanation()
    table, norm, query, out, last = example.holdings
    forward, _ = bands(replace(example, holdings=(table, query, out, norm, last)))
    assert stops(forward.layer) == ["<all_gather>", "attention", "<reduce_scatter>"]


def test_where_the_modules_order_contradicts_the_step_only_the_collectives_are_drawn() -> None:
    example = explanation()
    swapped = [example.collectives[index] for index in (0, 2, 1, *range(3, len(example.collectives)))]
    forward, _ = bands(replace(example, collectives=tuple(swapped)))
    assert stops(forward.layer) == ["<reduce_scatter>", "<all_gather>"]


@settings(max_examples=50)
@given(st.permutations(range(len(explanation().collectives))), st.permutations(range(5)))
def test_a_picture_has_every_collective_of_its_phase_once(order: list[int], holdings: list[int]) -> None:
    example = explanation()
    shuffled = replace(
        example,
        collectives=tuple(example.collectives[index] for index in order),
        holdings=tuple(example.holdings[index] for index in holdings),
    )
    for band in bands(shuffled):
        drawn = [
            stop.group
            for part in (band.first, band.layer, band.last)
            for stop in part
            if stop.group is not None
        ]
        wanted = [found for found in shuffled.collectives if found.phase == band.phase]
        assert sorted(map(repr, drawn)) == sorted(map(repr, wanted))
        in_layer = [stop.group for stop in band.layer if stop.group is not None]
        assert in_layer == [found for found in wanted if found.module.startswith("layers.*")]


def test_without_layers_the_model_is_one_row() -> None:
    forward, backward = bands(replace(explanation(), layers=None))
    assert (forward.layers, forward.layer, forward.last) == (None, (), ())
    assert len([stop for stop in (*forward.first, *backward.first) if stop.group is not None]) == 6


def test_what_sends_nothing_has_no_picture() -> None:
    assert bands(alone_example()) == ()


# -- the terminal and the page


@each_width
@pytest.mark.parametrize("colour", [False, True])
@each_example
def test_the_terminal_keeps_within_its_width_in_every_size(
    example: Explanation, width: int, colour: bool
) -> None:
    plain_text = re.sub(r"\x1b\[[0-9;]*m", "", printed(example, width, colour=colour))
    assert max(map(len, plain_text.splitlines())) <= width
    assert ("\x1b[" in printed(example, width, colour=colour)) == colour


def test_everything_of_an_explanation_is_shown() -> None:
    example = explanation()
    for where, text in every_drawing(example).items():
        for wanted in (
            "llama3-example",
            "1.23 B parameters",
            "rowwise",
            "native",
            "tp=8",
            "rank 0 of 8",
            "cuda",
            "sequence 2,048 = 8,192 tokens",
            "float32",
            EMBEDDING_REASON,
            "layers.*.attention.wo",
            "reduce-scatter",
            "28.0 MiB",
            "7/8",
            f"x {LAYERS}",
            "9 all-gathers, 9 reduce-scatters, 504 MiB sent",
            "layers.*.attention.wq.weight",
            "[64, 64]",
            "[8, 64]",
            "99.997 %",
            "700 MiB",
            "in the loss, at aten::exp in (loss)",
            "layers.*.held_0",
            "3.00 TFLOP",
            "9.00 TFLOP",
            "layers.*.copied_0",
            "rowwise(output=shard(1))",
            "Attention is worked out as it runs on a CPU.",
        ):
            assert wanted in text, (where, wanted)


def test_the_smaller_copies_and_holders_are_summed_up() -> None:
    for width in WIDTHS:
        text = words_of(printed(explanation(), width))
        assert "3 more 12 24.0 MiB" in text
        assert "6 more 24 69.0 MiB" in text
        assert "layers.*.copied_8" not in text
    page = text_of(explanation_html(explanation()))
    assert re.search(r"1 more *4 *4\.00 MiB", page)
    assert re.search(r"4 more *16 *42\.0 MiB", page)


def test_what_the_data_decide_is_told_with_mean_largest_rank_and_bound() -> None:
    for where, text in every_drawing(explanation("routed")).items():
        assert (
            "Decided by the data: this rank sends 2.50 MiB, the ranks 3.00 MiB on average, rank 3 most "
            "with 5.00 MiB" in text
        ), where
        assert "no batch needs more than 28.0 MiB" in text, where
    assert BY_DATA.max_rank == 3


def test_findings_come_right_after_the_headline_with_their_advice() -> None:
    for where, text in every_drawing(dtensor_example()).items():
        assert GRADIENT_FINDING.advice, where
        assert (
            text.index("2 findings")
            < text.index(GRADIENT_FINDING.advice)
            < text.index("misspelt")
            < text.index("7/8")
        ), where
        assert "Replicate [1024, 64]" in text, where
        assert "not told" in text, where
        assert "Copies 32.0 MiB to and from its buffers each time." in text, where
        assert "as all-to-all + sum" in text, where


def test_absent_things_are_said_to_be_absent() -> None:
    text = words_of(printed(alone_example(), 80))
    for wanted in (
        "None: this rank exchanges nothing in a step.",
        "None: no op of the step only copies.",
        "before the step's first op",
        "gradient none",
        "unknown",
        "one rank",
    ):
        assert wanted in text, wanted
    page = text_of(explanation_html(alone_example()))
    for wanted in (
        "Nothing: the step has no collectives.",
        "None: no op of the step only copies.",
        "No findings.",
    ):
        assert wanted in page, wanted
    assert "In each layer" not in page


def test_ops_that_are_unknown_are_named_and_their_flops_called_unknown() -> None:
    assert "their FLOPs are unknown and not in the sums: 2 in forward." in words_of(
        printed(explanation(), 100)
    )
    assert "Not in the catalogue of ops, so their FLOPs are unknown" in text_of(
        explanation_html(explanation())
    )
    known = replace(explanation(), phases=explanation().phases[1:])
    assert "unknown" not in words_of(printed(known, 100))


@each_width
def test_a_contrast_shows_both_plans_then_what_sets_them_apart_then_the_verdict(width: int) -> None:
    text = words_of(printed(contrast_example(), width))
    order = (
        "rowwise against colwise for llama3-example",
        "all-to-alls 0 2",
        "Collectives that only rowwise has",
        "Collectives that only colwise has",
        "Collectives that both have",
        "What it comes to",
        "colwise sends less over the wire.",
    )
    assert [text.index(part) for part in order] == sorted(text.index(part) for part in order)


def test_a_contrast_page_begins_with_the_verdict_and_draws_both_on_one_scale() -> None:
    contrast = contrast_example()
    page = text_of(contrast_html(contrast))
    assert (
        page.index("colwise sends less over the wire.")
        < page.index("Side by side")
        < page.index("only rowwise has")
    )
    assert "Forward, rowwise" in page
    assert "Forward, colwise" in page
    chart = wire_chart((contrast.first, contrast.second))
    assert [bar.label for bar in chart.bars[:2]] == ["forward, rowwise", "forward, colwise"]
    widest = max(sum(part.percent for part in bar.segments) for bar in chart.bars)
    assert widest == pytest.approx(100)
    assert sum(part.percent for part in chart.bars[1].segments) < 95


def test_bars_have_the_sizes_of_what_they_show() -> None:
    held, at_peak = memory_chart((explanation(),)).bars
    assert (held.total, at_peak.total) == ("401 MiB", "700 MiB")
    assert [part.percent for part in at_peak.segments] == pytest.approx([100 / 7, 200 / 7, 350 / 7, 50 / 7])
    assert wire_chart((alone_example(),)).bars == ()


def test_a_ratio_is_given_where_there_is_one() -> None:
    found = {row.label: row for row in contrasts.rows_of(contrast_example())}
    assert (found["all-to-alls"].first, found["all-to-alls"].second) == ("0", "2")
    assert found["FLOPs"].ratio == "equal"
    assert found["forward"].ratio == "x 0.903"
    alone = contrast_example(explanation(), replace(alone_example(), phases=explanation().phases))
    assert (
        next(row for row in contrasts.rows_of(replace(alone, different=())) if row.label == "forward").ratio
        == "none"
    )


@pytest.mark.parametrize(
    "text",
    [HOSTILE_NAME, HOSTILE_MARKUP, "[bold red]not markup[/]", "\x1b[31mred\x1b[0m\u202e\r\n", "</style><b>"],
)
def test_hostile_names_stay_text(text: str) -> None:
    example = hostile_example(text)
    contrast = Contrast(
        example,
        example,
        example.collectives[:1],
        (),
        ((example.collectives[0], example.collectives[1]),),
        (text,),
    )
    for width in WIDTHS:
        for drawn in (printed(example, width), printed(contrast, width)):
            assert "\x1b" not in drawn
            assert "\r" not in drawn
            assert "\u202e" not in drawn
            assert max(map(len, drawn.splitlines())) <= width
    for page in (explanation_html(example), contrast_html(contrast)):
        assert page.count("<script") == 1
        assert page.count("</style>") == 1
        assert "<img" not in page
        assert "<b>" not in page
        assert "\x1b" not in page
    assert "<b>" not in explanation_html(explanation(), text)
    assert read_document(write_document(example), Explanation) == example


def test_what_nobody_would_read_is_cut_where_it_is_drawn_and_whole_in_the_json() -> None:
    example = hostile_example(HUGE)
    assert len(explanation_html(example)) < 300_000
    assert len(printed(example, 100)) < 300_000
    one = replace(explanation(), model=HUGE)
    assert read_document(write_document(one), Explanation).model == HUGE


@each_example
def test_the_page_loads_nothing_and_is_small(example: Explanation) -> None:
    page = explanation_html(example, "walkthrough.html#embedding/rowwise")
    assert len(page) < 100_000
    assert 'href="walkthrough.html#embedding/rowwise"' in page
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", page)
    assert "url(" not in page
    assert "default-src 'none'" in page
    assert "<a " not in explanation_html(example)


# -- JSON


@each_example
def test_json_round_trips(example: Explanation) -> None:
    assert read_document(write_document(example), Explanation) == example
    contrast = (
        contrast_example(example, explanation())
        if example.collectives
        else Contrast(example, example, (), (), (), ())
    )
    assert read_document(write_document(contrast), Contrast) == contrast


placements = st.sampled_from([Replicate(), Partial()]) | st.builds(Shard, st.integers(-9, 9))


@given(
    st.builds(
        replace,
        st.just(explanation("routed").collectives[0]),
        module=st.text(st.characters(codec="utf-8")),
        kind=st.sampled_from(CollectiveKind),
        phase=st.sampled_from(Phase),
        before=st.none() | placements,
        after=st.none() | placements,
        count=st.integers(0, 2**53),
        payload_bytes=st.integers(0, 2**62),
        wire_bytes=st.floats(allow_nan=False),
        by_data=st.none() | st.just(BY_DATA),
        rule=st.none()
        | st.builds(RuleRef, st.text(st.characters(codec="utf-8")), st.sampled_from(StyleName)),
    )
)
def test_json_round_trips_any_collective(found: CollectiveGroup) -> None:
    example = replace(explanation(), collectives=(found,))
    assert read_document(write_document(example), Explanation) == example


def test_json_has_its_version_first_placements_as_in_plans_and_what_is_worked_out() -> None:
    document = write_document(explanation())
    assert document.startswith(b'{\n  "schema_version": 1,')
    assert document.endswith(b"}\n")
    table = json.loads(document)
    assert table["wire_bytes"] == explanation().wire_bytes
    assert table["collectives"][1]["before"] == "shard(1)"
    assert table["collectives"][1]["after"] == "replicate"
    assert table["collectives"][1]["total_wire_bytes"] == LAYERS * 28 * MIB
    assert table["holdings"][0]["total_bytes"] == 4 * MIB
    assert table["held"] == [["parameter", 100 * MIB], ["gradient", 101 * MIB], ["optimizer", 200 * MIB]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda table: table.update(rank="zero"),
            "e.json: not a saved explanation: Expected `int`, got `str` - at `$.rank`. ",
        ),
        (
            lambda table: table.pop("plan"),
            "e.json: not a saved explanation: Object missing required field `plan` - at `$`. ",
        ),
        (
            lambda table: table["collectives"][0].update(before="torn"),
            'e.json: not a saved explanation: "torn" is no placement. Allowed: shard(DIM), replicate, '
            "partial - at `$.collectives[0].before`. ",
        ),
        (
            lambda table: table["collectives"][0].update(before=3),
            "e.json: not a saved explanation: Expected `str`, got `int` - at `$.collectives[0].before`. ",
        ),
        (lambda table: table.update(axes=[["tp"]]), "Expected `array` of length 2, got 1 - at `$.axes[0]`. "),
        (lambda table: table.update(axes={}), "Expected `array` - at `$.axes`. "),
        (lambda table: table.update(settings=[]), "Expected `object` - at `$.settings`. "),
        (lambda table: table["peak"].update(phase="nap"), "Invalid enum value 'nap' - at `$.peak.phase`. "),
        (
            lambda table: table.update(schema_version=2),
            "e.json: schema_version is 2; this Shardwise reads 1. ",
        ),
    ],
)
def test_json_that_is_no_explanation_says_why(change: object, message: str) -> None:
    table = json.loads(write_document(explanation()))
    assert callable(change)
    change(table)
    with pytest.raises(InputError) as raised:
        read_document(json.dumps(table).encode(), Explanation, "e.json")
    assert message in str(raised.value)


def test_json_that_is_a_contrast_is_no_explanation() -> None:
    with pytest.raises(InputError, match="missing required field `model`"):
        read_document(write_document(contrast_example()), Explanation)


def test_unknown_fields_are_ignored() -> None:
    table = json.loads(write_document(explanation()))
    table["new"] = table["settings"]["new"] = [1, {"a": None}]
    assert read_document(json.dumps(table).encode(), Explanation) == explanation()


def test_drawing_an_explanation_imports_no_torch() -> None:
    program = (
        "import sys, shardwise.report.explain.html, shardwise.files.document, "
        "shardwise.report.explain.tables;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
