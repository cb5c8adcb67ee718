"""The page in a real headless Chromium: it draws, it asks the network for nothing, and names from files stay
text."""

import re
from pathlib import Path

import pytest

from shardwise.core.measurement import Comparison
from shardwise.report.compare.html import comparison_html
from tests.e2e.browser import Browser, Elements, Visit
from tests.matrix import FULL
from tests.unit.comparison_example import (
    HOSTILE_MARKUP,
    HOSTILE_NAME,
    cuda_example,
    example,
    module_only_example,
)

EIGHT_PLANS = (
    "rowwise",
    "colwise",
    "routed",
    "rowwise@dtensor",
    "colwise@dtensor",
    "routed-interleaved",
    "replicated",
    "my-own",
)

WHOLE_STEP_CHARTS = {"chart-step", "chart-ratio", "chart-memory", "chart-wire", "chart-module", "chart-loss"}
MODULE_CHARTS = {"chart-step", "chart-ratio", "chart-memory", "chart-wire"}


@pytest.mark.parametrize(
    ("comparison", "charts"),
    [
        pytest.param(example(("rowwise",), noise=False), WHOLE_STEP_CHARTS, id="one plan", marks=FULL),
        pytest.param(example(EIGHT_PLANS), WHOLE_STEP_CHARTS, id="eight plans", marks=FULL),
        pytest.param(module_only_example(), MODULE_CHARTS, id="one module", marks=FULL),
        pytest.param(cuda_example(), WHOLE_STEP_CHARTS, id="device memory and a lost loss", marks=FULL),
        pytest.param(
            example((HOSTILE_NAME, HOSTILE_MARKUP, "x" * 300)),
            WHOLE_STEP_CHARTS,
            id="hostile names",
            marks=FULL,
        ),
    ],
)
def test_every_chart_is_drawn_offline_and_without_complaint(
    browser: Browser, tmp_path: Path, comparison: Comparison, charts: set[str]
) -> None:
    assert_drawn(browser.visit(comparison_html(comparison), tmp_path), charts)


@pytest.fixture(scope="module")
def three_plans(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Visit:
    return browser.visit(comparison_html(example()), tmp_path_factory.mktemp("page"))


def test_every_chart_of_three_plans_is_drawn_offline_and_without_complaint(three_plans: Visit) -> None:
    assert_drawn(three_plans, WHOLE_STEP_CHARTS)


def assert_drawn(seen: Visit, charts: set[str]) -> None:
    elements = Elements(seen.dom)
    assert seen.console == ()
    assert seen.requests == ()
    assert set(elements.drawings) == charts
    assert all(count > 0 for count in elements.drawings.values()), elements.drawings


def test_a_hostile_name_is_text_and_nothing_else(browser: Browser, tmp_path: Path) -> None:
    seen = browser.visit(comparison_html(example((HOSTILE_NAME, HOSTILE_MARKUP, "<b>&amp;</b>"))), tmp_path)
    elements = Elements(seen.dom)
    assert (seen.console, seen.requests) == ((), ())
    assert "img" not in elements.names
    assert elements.names.count("script") == 3
    assert elements.handlers == []
    labels = re.findall(
        r"<text class=\"ytick\"[^>]*>(.*?)</text>|<g class=\"ytick\"><text[^>]*>(.*?)</text>", seen.dom
    )
    assert any("&lt;/script&gt;" in "".join(label) for label in labels), labels
    assert any("&lt;b&gt;&amp;amp;&lt;/b&gt;" in "".join(label) for label in labels), labels


@FULL  # what forbids it is every page's: test_walkthrough_html.py
def test_a_script_that_slips_into_the_page_does_not_run(browser: Browser, tmp_path: Path) -> None:
    slipped = (
        '<img src=x onerror="document.body.dataset.slipped = 1"><script>document.body.dataset.slipped = '
        "2</script>"
    )
    page = comparison_html(example()).replace("</header>", f"</header>{slipped}")
    seen = browser.visit(page, tmp_path)
    assert "data-slipped" not in seen.dom
    assert any("Content Security Policy" in line for line in seen.console)


def test_charts_follow_the_dark_colour_scheme(browser: Browser, tmp_path: Path, three_plans: Visit) -> None:
    light, dark = "rgb(0, 114, 178)", "rgb(74, 168, 232)"
    seen = browser.visit(comparison_html(example()), tmp_path, is_dark=True)
    assert [light in each.dom for each in (three_plans, seen)] == [True, False]
    assert [dark in each.dom for each in (three_plans, seen)] == [False, True]


def test_what_a_page_asks_the_network_for_and_what_goes_wrong_in_it_is_seen(
    browser: Browser, tmp_path: Path
) -> None:
    (tmp_path / "inner.html").write_text('<!doctype html><img src="http://127.0.0.1:9/inside.png">')
    page = """<!doctype html><iframe src="inner.html"></iframe><img src="http://127.0.0.1:9/picture.png">
    <script>
    setTimeout(() => { console.log("later"); fetch("http://127.0.0.1:9/late"); fails(); }, 5000);
    </script>
    """
    seen = browser.visit(page, tmp_path)
    addresses = {f"http://127.0.0.1:9/{name}" for name in ("inside.png", "picture.png", "late")}
    assert addresses <= set(seen.requests)
    assert "later" in seen.console
    assert any("fails is not defined" in line for line in seen.console)
