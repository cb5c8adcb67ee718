"""Nouns -> terminal tables, JSON and HTML text. The page in a real browser: tests/e2e/test_report_html.py."""

import json
import math
import re
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from shardwise.core.errors import InputError
from shardwise.core.measurement import Comparison, Ratio
from shardwise.files.document import read_document, write_document
from shardwise.report.common import units
from shardwise.report.common.deliver import show
from shardwise.report.common.page import script_json
from shardwise.report.common.plain import plain
from shardwise.report.compare.html import comparison_html, short_name
from shardwise.report.compare.rows import comparison_rows, not_measured
from tests.unit.comparison_example import (
    HOSTILE_MARKUP,
    HOSTILE_NAME,
    cuda_example,
    example,
    module_only_example,
)

LONG_NAME = "a-very-long-plan-name-that-somebody-wrote-to-say-everything@dtensor"


def rendered(comparison: Comparison, width: int, *, colour: bool = False) -> str:
    console = Console(
        width=width, force_terminal=colour, color_system="standard" if colour else None, record=False
    )
    with console.capture() as captured:
        show(comparison, "terminal", console)
    return captured.get()


def own_markup(page: str) -> str:
    """The page without plotly.js, which is full of addresses that it would only load for maps."""
    return re.sub(r"<script>/\*\*\n\* plotly\.js.*?</script>", "", page, count=1, flags=re.DOTALL)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "not measured"),
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (1536 * 2**10, "1.50 MiB"),
        (1023.9 * 2**20, "1.00 GiB"),
        (2.1e9, "1.96 GiB"),
        (math.nan, "NaN B"),
    ],
)
def test_bytes_have_three_digits_and_a_binary_unit(value: float | None, text: str) -> None:
    assert units.format_bytes(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "not measured"),
        (0.0, "0 s"),
        (8.5e-5, "85.0 µs"),
        (0.18349, "183 ms"),
        (0.99996, "1.00 s"),
        (75.0, "75.0 s"),
        (1234.0, "1234 s"),
    ],
)
def test_seconds_have_three_digits_and_a_unit(value: float | None, text: str) -> None:
    assert units.format_seconds(value) == text


def test_other_quantities_read_well() -> None:
    assert units.format_ratio(0.8418) == "0.842"
    assert units.format_ratio(None) == "not measured"
    assert units.format_interval(Ratio(0.8418, 0.811, 12.34, 0.95, 9)) == "0.842 [0.811, 12.3]"
    assert units.format_count(812) == "812"
    assert units.format_error(2.13e-7) == "2.1e-07"
    assert units.format_error(math.nan) == "NaN"
    assert units.format_error(0.0) == "0"
    assert units.format_confidence(0.973) == "97.3 %"
    assert units.format_confidence(0.95) == "95 %"


@given(st.floats(min_value=1e-9, max_value=1e4))
def test_seconds_read_back_within_three_digits(value: float) -> None:
    number, name = units.format_seconds(value).split(" ")
    size = next(unit.size for unit in units.SECOND_UNITS if unit.name == name)
    assert float(number) * size == pytest.approx(value, rel=0.005)


def test_the_second_run_of_the_first_plan_is_the_repeat_and_keeps_its_colour() -> None:
    rows = comparison_rows(example())
    assert [row.is_repeat for row in rows] == [False, False, False, True]
    assert [row.color for row in rows] == [0, 1, 2, 0]
    assert [row.is_first for row in rows] == [True, False, False, False]


def test_a_repeat_without_a_standing_shows_the_noise() -> None:
    comparison = example()
    rows = comparison_rows(replace(comparison, standings=comparison.standings[:3]))
    assert rows[3].ratio == comparison.noise
    assert rows[3].step_s is None


def test_what_was_not_measured_is_named() -> None:
    assert not_measured(example()) == ()
    assert not_measured(module_only_example()) == (
        "the second run of the first plan (A/A), so the noise is unknown",
        "bytes sent on sockets",
        "peak memory",
        "agreement with the unsharded model",
        "losses",
    )


@pytest.mark.parametrize(
    "comparison", [example(), module_only_example(), replace(example(), notes=(), verdict=())]
)
def test_json_round_trips(comparison: Comparison) -> None:
    assert read_document(write_document(comparison), Comparison) == comparison


@given(
    label=st.text(),
    losses=st.lists(st.floats(allow_nan=False)).map(tuple),
    sent_bytes=st.none() | st.floats(allow_nan=False),
)
def test_json_round_trips_any_name_and_number(
    label: str, losses: tuple[float, ...], sent_bytes: float | None
) -> None:
    comparison = example(("rowwise",), noise=False)
    run = replace(comparison.measurements[0], label=label, losses=losses, sent_bytes=sent_bytes)
    comparison = replace(comparison, measurements=(run,))
    if any(0xD800 <= ord(character) <= 0xDFFF for character in label):
        return
    assert read_document(write_document(comparison), Comparison) == comparison


def test_json_is_one_valid_document_with_its_version_first() -> None:
    def refuse(name: str) -> float:
        raise AssertionError(f"{name} is no JSON")

    document = write_document(cuda_example())
    assert document.startswith(b'{\n  "schema_version": 1,')
    assert document.endswith(b"}\n")
    table = json.loads(document, parse_constant=refuse)
    assert table["measurements"][1]["losses"] == [10.5, 9.0, "NaN", "Infinity", "-Infinity"]


def test_json_keeps_nan_and_infinity_and_a_plan_called_nan() -> None:
    comparison = cuda_example()
    named = replace(
        comparison, measurements=tuple(replace(run, label="NaN") for run in comparison.measurements)
    )
    read = read_document(write_document(named), Comparison)
    losses = read.measurements[1].losses
    assert math.isnan(losses[2])
    assert losses[3:] == (math.inf, -math.inf)
    assert read.measurements[1].agreement is not None
    assert math.isnan(read.measurements[1].agreement.loss_error)
    assert read.measurements[0].label == "NaN"


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (
            b"{",
            "run.json: not valid JSON: Input data was truncated. Give the JSON file that shardwise compare "
            "wrote.",
        ),
        (
            b"[]",
            "run.json: schema_version is None; this Shardwise reads 1. "
            "Draw it with the version of Shardwise that wrote it, or run the comparison again.",
        ),
        (
            b'{"schema_version": 2}',
            "run.json: schema_version is 2; this Shardwise reads 1. "
            "Draw it with the version of Shardwise that wrote it, or run the comparison again.",
        ),
        (
            write_document(example()).replace(b'"rounds": 21', b'"rounds": "21"'),
            "run.json: not a saved comparison: Expected `int`, got `str` - at `$.rounds`. Give the JSON "
            "file that shardwise compare wrote.",
        ),
        (
            write_document(example()).replace(b'"median": 0.94', b'"median": null'),
            "run.json: not a saved comparison: Expected `float`, got `null` - at "
            "`$.standings[1].ratio.median`. Give the JSON file that shardwise compare wrote.",
        ),
    ],
)
def test_json_that_is_no_comparison_says_why(document: bytes, message: str) -> None:
    with pytest.raises(InputError) as caught:
        read_document(document, Comparison, "run.json")
    assert str(caught.value) == message


@pytest.mark.parametrize("width", [80, 100, 160])
@pytest.mark.parametrize("colour", [False, True])
def test_the_terminal_shows_every_plan_at_every_width(width: int, colour: bool) -> None:
    plans = ("rowwise", "colwise", "routed", "rowwise@dtensor")
    output = rendered(example(plans), width, colour=colour)
    visible = re.sub(r"\x1b\[[0-9;]*m", "", output)
    for plan in (*plans, "rowwise (again)"):
        assert re.search(rf"^{re.escape(plan)} +\d+ ms ", visible, flags=re.MULTILINE), plan
    assert ("\x1b[" in output) is colour
    assert max(len(line) for line in visible.splitlines()) <= width
    assert "noise (A/A)" in visible
    assert "…" not in visible
    for number in (
        "0.940 [0.922, 0.958]",
        "1.004 [0.986, 1.022]",
        "174 MiB",
        "900 MiB",
        "2.2e-15 ok",
        "41.0 ms",
        "all_to_all",
    ):
        assert number in visible, number
    assert "Verdict" in visible


@pytest.mark.parametrize("width", [80, 160])
def test_the_terminal_names_what_disagrees_and_where(width: int) -> None:
    output = rendered(cuda_example(), width)
    assert "5.0e-01 WRONG" in output
    assert "layers.0.attention_norm.weight: the gradient is half" in output
    assert "Not measured in this run: bytes sent on sockets." in output


@pytest.mark.parametrize("width", [80, 160])
def test_the_terminal_leaves_out_what_one_module_does_not_have(width: int) -> None:
    output = rendered(module_only_example(), width)
    assert "tok_embeddings alone, forward + backward" in output
    assert "per s" not in output
    assert "noise (A/A)" not in output
    assert "peak" not in output.split("Not measured")[0]


@pytest.mark.parametrize("width", [60, 80, 160])
def test_hostile_names_stay_text_in_the_terminal(width: int) -> None:
    output = rendered(example((HOSTILE_NAME, HOSTILE_MARKUP, LONG_NAME)), width)
    assert "[bold" in output
    assert r"\x1b[31m" in output.replace("\n", "").replace(" ", "")
    assert "\x1b" not in output
    assert "\u2028" not in output


def test_control_characters_are_made_visible() -> None:
    assert plain("a\x1b[2Jb\nc\u202ed é") == "a\\x1b[2Jb\\nc\\u202ed é"


@pytest.mark.parametrize(
    "comparison", [example(), module_only_example(), cuda_example(), example((HOSTILE_NAME, HOSTILE_MARKUP))]
)
def test_the_page_loads_nothing(comparison: Comparison) -> None:
    markup = own_markup(comparison_html(comparison))
    assert len(markup) < 200_000
    assert not re.search(
        r"(src|href|action|srcset|poster)\s*=\s*[\"']?[a-z]*:?//", markup.replace("&lt;", "<")
    )
    assert not re.search(r"<(link|img|iframe|object|embed|base|form)\b", markup)
    assert "@import" not in markup
    assert "url(" not in markup
    assert "default-src 'none'" in markup
    assert set(re.findall(r"https?://[^\s\"'<]+", markup)) == {"http://www.w3.org/2000/svg"}


def test_hostile_names_stay_text_in_the_page() -> None:
    comparison = example((HOSTILE_NAME, HOSTILE_MARKUP, LONG_NAME))
    run = replace(comparison.measurements[1], plan_toml=f'name = "{HOSTILE_NAME}"', plan_name=HOSTILE_NAME)
    comparison = replace(
        comparison,
        model=HOSTILE_NAME,
        notes=(HOSTILE_NAME,),
        verdict=(HOSTILE_NAME,),
        measurements=(comparison.measurements[0], run, *comparison.measurements[2:]),
        environment=replace(
            comparison.environment,
            command=HOSTILE_NAME,
            machine=HOSTILE_NAME,
            variables=((HOSTILE_NAME, HOSTILE_NAME),),
        ),
    )
    page = comparison_html(comparison)
    assert "<img" not in own_markup(page)
    assert page.count("</script>") == 3
    assert "&lt;/script&gt;&lt;img src=x onerror=alert(1)&gt;" in page


@given(st.text())
def test_data_in_the_page_is_inert_and_reads_back(text: str) -> None:
    if any(0xD800 <= ord(character) <= 0xDFFF for character in text):
        return
    embedded = str(script_json({"name": text}))
    assert not set("<>&\u2028\u2029") & set(embedded)
    assert json.loads(embedded) == {"name": text}


def test_numbers_that_are_not_finite_are_gaps_in_the_page() -> None:
    assert script_json((1.0, math.nan, math.inf)) == "[1.0,null,null]"


def test_long_names_keep_head_and_tail() -> None:
    assert short_name("rowwise") == "rowwise"
    assert short_name(LONG_NAME) == "a-very-long…@dtensor"
    assert len(short_name(LONG_NAME)) == 20


def test_the_page_says_what_was_not_measured_and_warns_of_gloo_only_on_gloo() -> None:
    page = own_markup(comparison_html(module_only_example()))
    assert "The noise floor was not measured." in page
    assert "Caution: gloo" in page
    assert 'id="chart-loss"' not in page
    assert "Caution: gloo" not in own_markup(comparison_html(cuda_example()))


def test_a_template_is_compiled_once_for_all_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    first = comparison_html(module_only_example())

    def compiled_again(*_: object, **__: object) -> None:
        raise AssertionError("a template is compiled again")

    monkeypatch.setattr("jinja2.Environment.compile", compiled_again)
    assert comparison_html(module_only_example()) == first


def test_report_imports_no_torch() -> None:
    code = (
        "import sys, shardwise.report.compare.html, shardwise.files.document, "
        "shardwise.report.compare.tables; print([name for name in ('torch', 'numpy') if name in sys.modules])"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )
