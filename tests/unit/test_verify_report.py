"""Verifications as text, JSON and a page: invented ones, in the proportions of real ones."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from shardwise.core.errors import StalledError
from shardwise.core.finding import Cause, Finding, FindingKind
from shardwise.core.rule import RuleRef
from shardwise.core.sharded import Sharded
from shardwise.core.verification import Proof, Verdict, Verification, VerificationRun
from shardwise.files.document import read_document, write_document
from shardwise.report.common.deliver import show
from shardwise.report.verify import rows
from shardwise.report.verify.html import verification_html
from shardwise.verify.claim import Claim

HOSTILE = "</script><img src=x onerror=alert(1)>[bold]\x1b[31m"
PROOF = Proof("float64", 2e-16, 1e-10, 1e-16, 0.0, 27, "layers.1.norm.weight", 4e-16, 2, 1e-16, 3e-16)
RIGHT = Verification(
    "hf:qwen3", "hf", 2, "its small twin", 86_400, Sharded(100, 98, 80, 80), PROOF, (), "", 1.5
)


def difference(name: str, cause: Cause, error: float = 2.0, ratio: float | None = None) -> Finding:
    return Finding(
        FindingKind.GRADIENT_DIFFERS, name, "nothing sums it", error, ratio, "Sum it.", cause, None
    )


WRONG = replace(
    RIGHT,
    model="hf:apertus",
    proof=replace(PROOF, steps=0, weights_error=None, norm_error=None, worst_gradient_error=2.8),
    findings=(
        difference("layers.0.act.alpha", Cause.PARTS_NOT_SUMMED, 2.2),
        difference("layers.1.act.alpha", Cause.PARTS_NOT_SUMMED, 2.8),
        replace(difference("embed.weight", Cause.FOLLOWS, float("inf")), follows="layers.1.act.alpha"),
    ),
)
CRASH = Verification(
    "hf:lfm2",
    "hf",
    2,
    "",
    None,
    None,
    None,
    (Finding(FindingKind.CRASHES, "lm_head", "lm_head raised it"),),
    "lm_head raised it",
    0.1,
)
SKIPPED = Verification("hf:bert", "hf", 2, "", None, None, None, (), "there is no plan", 0.1)
LITTLE = replace(
    RIGHT, model="hf:gpt_oss", findings=(Finding(FindingKind.LITTLE_IS_SHARDED, "plan", "0.0% are sharded"),)
)


NOT_PROVED = replace(RIGHT, proof=None, is_static=True)
SUSPECTED = replace(
    NOT_PROVED,
    model="hf:apertus",
    findings=tuple(
        Finding(
            FindingKind.SUSPECTED,
            f"layers.{n}.act.alpha",
            "nothing sums it",
            advice="Sum it.",
            cause=Cause.PARTS_NOT_SUMMED,
        )
        for n in (0, 1)
    ),
)
STATIC = (
    NOT_PROVED,
    SUSPECTED,
    replace(NOT_PROVED, findings=LITTLE.findings),
    replace(NOT_PROVED, note="Its step can't be traced, so only its parameters were looked at: it raised"),
    replace(SKIPPED, is_static=True),
    replace(CRASH, is_static=True),
)


def run(*cases: Verification) -> VerificationRun:
    return VerificationRun("tp=2", "cpu", 2, 16, "2026-01-02T03:04:05+00:00", (("torch", "2.13.0"),), cases)


def text(found: VerificationRun) -> str:
    console = Console(record=True, width=80, file=io.StringIO())
    show(found, "terminal", console)
    return console.export_text()


def test_a_verdict_is_the_worst_that_is_known_and_skipped_is_never_right() -> None:
    assert [each.verdict for each in (RIGHT, WRONG, CRASH, SKIPPED, LITTLE)] == [
        Verdict.RIGHT,
        Verdict.WRONG,
        Verdict.CRASHES,
        Verdict.SKIPPED,
        Verdict.NEARLY_NOTHING,
    ]
    assert [run(each).is_no for each in (RIGHT, WRONG, CRASH, SKIPPED, LITTLE)] == [
        False,
        True,
        True,
        False,
        True,
    ]


def test_a_time_out_is_no_crash() -> None:
    silent = StalledError("nothing was heard from any rank for 120 s, so they were stopped.")
    answer = Claim("llama3-8b", "hf", "hf").timed_out(Verification("llama3-8b", "hf", 2), silent)
    assert answer.verdict is Verdict.TIMED_OUT
    assert run(answer).is_no
    assert rows.verdict_text(answer) == (
        "Timed out, so nothing is proved: nothing was heard from any rank for 120 s, so they were stopped."
    )


def test_without_a_proof_nothing_is_right() -> None:
    assert [each.verdict for each in STATIC] == [
        Verdict.NOT_PROVED,
        Verdict.SUSPECTED,
        Verdict.NEARLY_NOTHING,
        Verdict.NOT_PROVED,
        Verdict.SKIPPED,
        Verdict.SUSPECTED,
    ]
    assert [run(each).is_no for each in STATIC] == [False, True, True, False, False, True]


def test_static_answers_say_that_nothing_was_proved() -> None:
    assert [rows.verdict_text(each) for each in STATIC] == [
        "Nothing found statically; not proved.",
        "Suspected, before anything ran: layers.*.act.alpha: nothing sums it",
        "Not proved, and there is little to prove: 0.0% are sharded",
        "Nothing found statically; not proved. Its step can't be traced, so only its parameters were "
        "looked at: it raised",
        "Skipped, so nothing is proved: there is no plan",
        "Suspected, before anything ran: lm_head raised it",
    ]
    found = " ".join(text(run(*STATIC)).split())
    assert (
        "1 shards nearly nothing, 2 suspected, 2 not proved, 1 skipped: tp=2, batch 2, 16 tokens each, "
        "traced and not run" in found
    )
    assert "Its step can't be traced" in found
    assert read_document(write_document(run(*STATIC)), VerificationRun) == run(*STATIC)
    page = verification_html(replace(run(*STATIC), device="none"))
    assert "Nothing was run" in page
    assert "The same weights run" not in page


@pytest.mark.parametrize(
    "kind", [FindingKind.RULE_MATCHES_NOTHING, FindingKind.RULE_IS_SHADOWED, FindingKind.DROPOUT_MAY_DIFFER]
)
def test_a_note_makes_no_plan_wrong(kind: FindingKind) -> None:
    assert replace(RIGHT, findings=(Finding(kind, "x", "y"),)).verdict is Verdict.RIGHT


def test_findings_that_differ_in_the_layer_are_one() -> None:
    (group,) = rows.tree(WRONG)
    assert (group.subject, group.figures) == ("layers.*.act.alpha", ("220 % to 280 % off", "2 layers"))
    assert [each.subject for each in group.under] == ["embed.weight"]


def test_a_ratio_is_told_where_it_tells_something() -> None:
    doubled, other = (
        difference("a", Cause.SUMMED_TOO_OFTEN, 1.0, 2.0),
        difference("b", Cause.PARTS_NOT_SUMMED, 1.0, 0.31),
    )
    assert [group.figures for group in rows.grouped([doubled, other])] == [
        ("100 % off", "2 times the unsharded one"),
        ("100 % off",),
    ]


def test_the_terminal_tells_one_case_in_full() -> None:
    found = " ".join(text(run(WRONG)).replace("│", " ").split())
    assert "Wrong: the outputs are exact, and 3 of 27 gradients are not the unsharded model's." in found
    assert (
        "layers.*.act.alpha 220 % to 280 % off, 2 layers Nothing sums it. no rule holds for it Sum it."
        in found
    )
    assert "Sum it. └ What follows: embed.weight (nothing sums it)." in found


def test_the_terminal_tells_many_cases_in_a_table_and_those_that_are_not_right_below() -> None:
    found = " ".join(text(run(RIGHT, WRONG, CRASH, SKIPPED, LITTLE)).split())
    assert (
        "1 right, 1 wrong, 1 shards nearly nothing, 1 crashes, 1 skipped: tp=2 on cpu, batch 2, 16 tokens "
        "each, no dropout" in found
    )
    assert "hf:lfm2 hf crashes What was found: lm_head raised it" in found
    assert "hf:bert hf skipped What was found: there is no plan" in found
    assert (
        "hf:gpt_oss hf shards nearly nothing 100 % 4.0e-16 27 in float64 What was found: 0.0% are sharded"
        in found
    )


def test_json_holds_all_of_it_an_infinite_error_too() -> None:
    found = run(RIGHT, WRONG, CRASH, SKIPPED, LITTLE)
    document = write_document(found)
    assert b'"Infinity"' in document
    assert read_document(document, VerificationRun) == found


def test_hostile_names_stay_text() -> None:
    hostile = replace(
        WRONG,
        model=HOSTILE,
        plan=HOSTILE,
        findings=(difference(HOSTILE, Cause.UNKNOWN), difference("x", Cause.FOLLOWS)),
    )
    for found in (run(hostile), run(hostile, replace(CRASH, note=HOSTILE))):
        page = verification_html(found)
        assert "<img" not in page
        assert "&lt;/script&gt;" in page
        assert "\x1b" not in page
        assert "\x1b[31m" not in text(found)
        assert "[bold]" in text(found)


def test_the_page_names_the_rule_that_holds_a_parameter() -> None:
    by_rule = replace(difference("w", Cause.AVERAGED), rule=RuleRef("layers.*", "colwise"))
    page = verification_html(run(replace(WRONG, findings=(by_rule,))))
    assert "rule &#34;layers.*&#34; (colwise)" in page


def test_the_page_has_every_case() -> None:
    page = verification_html(run(RIGHT, WRONG, CRASH, SKIPPED, LITTLE))
    for model in ("hf:qwen3", "hf:apertus", "hf:lfm2", "hf:bert", "hf:gpt_oss"):
        assert model in page
    assert page.count('class="case ') == 4  # a skipped one is in the table only
