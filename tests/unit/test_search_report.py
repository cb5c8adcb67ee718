"""Search -> terminal text, words, JSON, and where the picture's dots are. The page in a real browser:
tests/e2e/test_search_html.py."""

import json
import re
from dataclasses import replace

import pytest
from rich.console import Console

from shardwise.cli.search import exit_code
from shardwise.core.case import Case
from shardwise.core.prediction import Term
from shardwise.core.program import MemoryKind
from shardwise.core.search import Considered, Known, Search, Tipping
from shardwise.files.case import read_case
from shardwise.files.document import read_document, write_document
from shardwise.report.common.deliver import show
from shardwise.report.common.room import room_of
from shardwise.report.common.scale import Scale
from shardwise.report.search import commands, rows
from shardwise.report.search.html import search_html
from shardwise.report.search.picture import DRAWN, Picture, picture, pictures
from tests.unit import search_example as example
from tests.unit.comparison_example import HOSTILE_MARKUP, HOSTILE_NAME

GIB = example.GIB
LARGE = example.large(10_000)
SEARCHES = {
    "proved": example.search(),
    "with a gap": example.with_gap(),
    "stopped": example.stopped(),
    "wrong": example.wrong(),
    "nothing fits": example.nothing_fits(),
    "nothing at all": example.nothing_at_all(),
}


def printed(search: Search, width: int = 80, *, colour: bool = False) -> str:
    console = Console(width=width, force_terminal=colour, color_system="standard" if colour else None)
    with console.capture() as captured:
        show(search, "terminal", console)
    return captured.get()


def words(text: str) -> str:
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", text).split())


def drawn(search: Search) -> Picture:
    found = picture(search, search.considered)
    assert found is not None
    return found


def test_the_best_plan_is_told_first_in_words_with_its_time_its_memory_and_its_proof() -> None:
    shown = words(printed(example.search()))
    assert shown.startswith("The best plan for llama3-70b on 64 devices of h100-sxm-80gb")
    for said in (
        "Mesh: fsdp=8,tp=8 Styles: attention, feed_forward, output cut; tok_embeddings rowwise; the sequence "
        "cut between blocks",
        "Step: 8 micro-batches of 1 sequence · selective-ops recompute of 20 layers",
        "Time: a step takes 10.0 s: 410 tokens/s per device.",
        "Memory: 60.0 GiB of 72.0 GiB that it may hold at the peak: optimizer 14.0 GiB, parameters 9.31 GiB",
        "Best in this space by this machine file: none of its 12,345 candidates is faster, in any",
        "Right: outputs, loss, all 148 gradients",
    ):
        assert said in shown
    assert shown.index("Right:") < shown.index("What was refused")


def test_best_in_this_space_is_said_only_where_it_is_proved() -> None:
    for name, search in SEARCHES.items():
        assert ("Best in this space" in words(printed(search))) is (name in ("proved", "wrong")), name


def test_without_a_proof_the_gap_is_told() -> None:
    said = "Not proved to be the best. Something that wasn't looked at could be up to 3.2 % faster."
    assert said in words(printed(example.with_gap()))
    unknown = replace(example.with_gap(), gap=float("inf"))
    assert "How much faster something that wasn't looked at could be isn't known." in words(printed(unknown))


def test_what_was_stopped_is_the_best_so_far_and_says_so() -> None:
    shown = words(printed(example.stopped()))
    assert shown.startswith("The best plan so far for llama3-70b")
    assert "Stopped early (Ctrl-C after 12 s): this is the best so far." in shown


def test_a_plan_that_was_not_verified_says_so_loudly_and_why() -> None:
    said = "NOT VERIFIED: --no-verify. Nothing ran, so whether it trains the right model is not known."
    assert said in words(printed(example.with_gap()))
    assert "NOT VERIFIED. Nothing ran" in words(printed(example.stopped()))
    assert "NOT VERIFIED" not in printed(example.search())


def test_a_plan_that_trains_the_wrong_model_is_not_praised() -> None:
    shown = words(printed(example.wrong()))
    assert "Wrong: the outputs are exact, and 1 of 148 gradients are not the unsharded model's." in shown
    assert "Right:" not in shown


def test_memory_names_what_is_worth_it() -> None:
    shown = rows.memory_text(example.search(), example.BEST.memory)
    tiny = replace(example.BEST.memory, by_kind=(*example.BEST.memory.by_kind, (MemoryKind.INPUT, 1e6)))
    told = rows.memory_text(example.search(), tiny)
    assert told == shown.replace("4.66 GiB,", "4.66 GiB, all else 977 KiB,")


def test_runners_up_are_told_by_what_differs_and_by_the_term_that_costs_them_the_lead() -> None:
    shown = words(printed(example.search(), 120))
    assert "2 fsdp=16,tp=4 10.2 s 1.020 tie" in shown
    assert "2 micro-batches of 2 sequences · nothing recomputed" in shown
    assert "Against plan 1: +500 ms data-parallel communication, -300 ms tensor-parallel" in shown
    assert (
        "Plan 2 lies within 4 %, by which predictions on this machine are wrong: a tie with plan 1." in shown
    )


def test_each_decision_that_differs_is_named() -> None:
    best = example.candidate("pp=2,fsdp=4,tp=8")
    for changed in (
        example.candidate("pp=2,fsdp=8,tp=4"),
        replace(best, micro_batch=2),
        replace(best, recompute="full", recomputed=3),
        replace(best, recompute="full", recomputed=4),
        replace(best, chunks=2, schedule="interleaved"),
        replace(best, reshard=False),
        replace(best, styles=tuple((group, "whole") for group, _ in best.styles)),
    ):
        assert rows.what_differs(changed, best), changed
    assert rows.what_differs(best, best) == ""


def test_a_machine_file_that_says_nothing_of_its_errors_is_said_to() -> None:
    shown = words(printed(example.with_gap()))
    assert "Plan 2 lies too near for any prediction: a tie with plan 1. The machine file doesn't say" in shown
    untied = replace(example.with_gap(), found=(example.BEST, example.THIRD))
    assert rows.ties_text(untied).startswith("The machine file doesn't say how wrong predictions on it are")


def test_where_nothing_fits_the_smallest_is_named() -> None:
    shown = words(printed(example.nothing_fits()))
    assert "None of 12,345 candidates fits in 72.0 GiB a device." in shown
    assert "The smallest that was looked at needs 75.0 GiB: fsdp=32,tp=2" in shown
    assert "each candidate was refused" in words(printed(example.nothing_at_all()))
    stopped = words(printed(replace(example.nothing_fits(), stopped="by Ctrl-C")))
    assert "No plan is known yet to fit" in stopped
    assert "None of" not in stopped
    early = words(printed(replace(example.nothing_at_all(), candidates=104, stopped="by Ctrl-C")))
    assert "No plan is known yet: none was predicted." in early
    assert "GiB a device" not in early


def test_the_exit_code_is_1_where_no_plan_was_found_or_one_is_wrong() -> None:
    assert exit_code(example.search()) == exit_code(example.stopped()) == 0
    assert exit_code(replace(example.nothing_at_all(), stopped="by Ctrl-C")) == 1
    assert exit_code(example.wrong()) == 1


def test_what_bounds_ruled_out_and_what_was_not_looked_at_are_counted_apart() -> None:
    told = rows.effort_text(replace(example.search(), ruled_out=12_000, unlooked=314))
    assert told.endswith("from 96 traced pieces, 12,000 ruled out by bounds, 314 not looked at.")
    assert rows.effort_text(example.search()).endswith("from 96 traced pieces.")


def test_what_decides_is_told_by_how_much_a_constant_must_change() -> None:
    less, none, more = example.search().tippings
    assert rows.tipping_text(less) == "plan 2, at 0.62 times its value or less"
    assert rows.tipping_text(none) == "plan 1, at between a quarter and 4 times its value"
    assert rows.tipping_text(more) == "plan 3, at 3.1 times its value or more"
    said = "Plan 1 stays the best at between a quarter and 4 times the value of: memory, rate."
    assert said in words(printed(example.search()))
    assert rows.tipping_text(Tipping("x", 2.0)) == "another plan, at 2 times its value or more"


def test_refusals_are_counted_with_their_reasons_the_most_frequent_first() -> None:
    shown = words(printed(example.search()))
    assert "more than 72 GiB of a device 1,204 tp=8 doesn't divide 4 KV heads" in shown


def test_costs_name_what_a_plan_loses_by_and_what_it_wins_back() -> None:
    costs = ((Term.DATA, 0.5), (Term.BUBBLE, 0.4), (Term.LAUNCH, 0.1), (Term.TENSOR, -0.3))
    told = (
        "+500 ms data-parallel communication, +400 ms pipeline bubble, -300 ms tensor-parallel communication"
    )
    assert rows.costs_text(costs) == told
    assert rows.costs_text(()) == ""


@pytest.mark.parametrize("search", SEARCHES.values(), ids=SEARCHES.keys())
def test_json_round_trips_and_says_what_follows(search: Search) -> None:
    document = write_document(search)
    assert write_document(read_document(document, Search)) == document
    table = json.loads(document)
    assert table["is_proved"] is search.is_proved
    assert all("mesh" not in each["candidate"] for each in table["considered"])


def test_commands_that_go_on_are_ones_that_a_shell_can_run() -> None:
    search = example.search()
    assert dict(commands.next_commands(search, 0)) == {
        "prove it": "shardwise verify plan-1.toml --model llama3-70b --mesh tp=8",
        "predict it": "shardwise predict --config case-1.toml",
        "export it": "shardwise export --config case-1.toml --as pytorch --out mine",
    }
    assert list(dict(commands.next_commands(search, 2))) == ["predict it"]
    proved = replace(search, found=(replace(example.BEST, proof_mesh="fsdp=2,tp=2"),))
    assert commands.next_commands(proved, 0)[0][1].endswith("--mesh fsdp=2,tp=2")
    odd = dict(commands.next_commands(example.hostile("a; rm -rf b"), 0))
    assert "'a; rm -rf b'" in odd["prove it"]


def test_each_plan_has_a_file_and_a_case_that_asks_for_it() -> None:
    search = example.search()
    files = commands.plan_files(search)
    assert sorted(files) == ["case-1.toml", "case-2.toml", "case-3.toml", "plan-1.toml", "plan-2.toml"]
    assert files["plan-1.toml"] == example.PLAN
    for index, found in enumerate(search.found):
        asked = read_case(files[f"case-{index + 1}.toml"], "it", "predict", (), {"predict": ()})
        case = Case.of(**asked)
        assert case.step == found.settings
        assert case.mesh.world_size == found.candidate.mesh.world_size == 64
        assert (case.model, case.machine) == (search.model, search.machine.name)
    assert case.plans == ("unsharded",)


def test_every_candidate_is_a_dot_or_in_one_that_says_how_many() -> None:
    for search in (example.search(), LARGE):
        found = drawn(search)
        marks = (*found.dots, *found.edge)
        assert sum(dot.count for dot in marks) == len(search.considered) == found.considered
        assert all(f"and {dot.count - 1:,} more here" in dot.text for dot in marks if dot.count > 1)
    assert len(marks) < len(LARGE.considered)


def test_what_only_its_time_s_bound_is_known_of_lies_at_the_edge_and_is_said_to() -> None:
    found = drawn(example.search())
    assert len(found.edge) == 6
    assert all("at least" in dot.text and "iB" not in dot.text for dot in found.edge)
    assert "Marks at the left edge are 6 that are too slow whatever they hold" in rows.drawn_text(
        example.search(), found
    )


def test_ten_thousand_candidates_make_a_picture_of_bounded_size_that_says_so() -> None:
    search = LARGE
    found = drawn(search)
    assert len(found.dots) <= DRAWN
    said = rows.drawn_text(search, found)
    assert said.startswith(
        f"10,000 candidates as {len(found.dots) + len(found.edge):,} marks: those that would lie upon one"
    )
    assert "The other 2,345 were ruled out together with others" in said
    assert len(search_html(search)) < 2_000_000


def test_faster_is_lower_smaller_is_further_left_and_what_does_not_fit_lies_beyond_the_line() -> None:
    for search in (example.search(), LARGE):
        found = drawn(search)
        assert found.limit is not None
        for dot in found.dots:
            assert 0 <= dot.x <= 100
            assert 0 <= dot.y <= 100
            assert (dot.x > found.limit) is (dot.kind == "refused")
        best, second, third = found.found
        own = [dot for dot in found.dots if dot.kind == "predicted"]
        assert sorted((dot.x, dot.y) for dot in own) == sorted((dot.x, dot.y) for dot in found.found)
        assert best.y > second.y > third.y
        assert best.x < second.x < third.x


def test_large_ranges_have_equal_ratios_at_equal_distances_and_small_ones_do_not() -> None:
    assert drawn(LARGE).logs == ("memory", "time")
    assert "time" not in drawn(example.search()).logs
    wide, narrow = Scale.over([1.0, 100.0]), Scale.over([10.0, 20.0])
    assert wide.at(10.0) == pytest.approx(50)
    assert narrow.at(15.0) == pytest.approx(50)


def test_what_has_no_time_is_left_out_and_said() -> None:
    sizes = ((0.0, GIB), (-1.0, GIB), (float("inf"), GIB), (float("nan"), GIB))
    odd = [Considered(example.candidate(), time, size, Known.BOUND, True) for time, size in sizes]
    search = replace(example.search(), considered=example.considered(*odd))
    found = drawn(search)
    assert (found.considered, found.left_out) == (39, 4)
    assert "4 more have no time, and aren't drawn" in rows.drawn_text(search, found)


def test_one_candidate_alone_and_equal_ones_have_a_picture() -> None:
    one = Considered(example.candidate(), 1.0, GIB, Known.PREDICTED, True)
    for considered in ((one,), (one, one, one)):
        search = replace(example.search(), found=(), considered=considered)
        assert len(drawn(search).dots) == 1
        assert drawn(search).x_ticks
        assert drawn(search).y_ticks
    assert pictures(example.nothing_at_all()) == ()


def test_a_second_picture_shows_what_is_near_the_best_where_most_is_far_from_it() -> None:
    whole, near = pictures(LARGE)
    assert near.considered < whole.considered / 2
    assert len(near.found) == 3


@pytest.mark.parametrize(
    "text", [HOSTILE_NAME, HOSTILE_MARKUP, "\x1b]0;gone\x07", "[red]not red[/]", "x" * 100_000]
)
def test_hostile_names_stay_text_in_the_terminal(text: str) -> None:
    shown = printed(example.hostile(text), colour=True)
    assert "\x07" not in shown
    assert "\x1b]" not in shown
    assert len(shown) < 60_000


def test_the_room_is_found_by_the_noun_s_type() -> None:
    assert room_of(example.search()).name == "search"
