"""The pages of predict in a real headless Chromium: they ask the network for nothing, draw their bars, sort,
and fit a phone."""

from pathlib import Path

import pytest

from shardwise.core.sweep import Refusal
from shardwise.report.predict.html import prediction_html
from shardwise.report.predict.sweep_html import sweep_html
from tests.e2e.browser import Browser, Elements, driven, seen_by
from tests.unit.comparison_example import HOSTILE_MARKUP, HOSTILE_NAME
from tests.unit.prediction_example import TOO_MUCH, hostile_run, run_of, two_plans
from tests.unit.test_predict_sweep import hostile_sweep, point, sweep_of

SWEEP = sweep_of(
    point(300),
    point(200, plan="colwise"),
    point(900, memory=TOO_MUCH),
    refused=(Refusal("rowwise", "too few heads", 3),),
)
PAGES = {
    "one plan": prediction_html(run_of()),
    "two plans": prediction_html(two_plans()),
    "sweep": sweep_html(SWEEP),
    "nothing found": sweep_html(sweep_of()),
    "hostile names": prediction_html(hostile_run("y" * 300)),
    "hostile sweep": sweep_html(hostile_sweep("y" * 300)),
}

each_page = pytest.mark.parametrize("page", PAGES.values(), ids=PAGES.keys())


@each_page
def test_the_page_is_drawn_offline_and_without_complaint(browser: Browser, tmp_path: Path, page: str) -> None:
    seen = browser.visit(page, tmp_path)
    assert seen.console == ()
    assert seen.requests == ()
    assert Elements(seen.dom).handlers == []


def test_every_bar_has_its_size_and_the_capacity_is_a_line(browser: Browser, tmp_path: Path) -> None:
    script = """
    const box = (element) => element.getBoundingClientRect();
    for (const chart of ["chart-terms", "chart-memory"]) {
      const bars = [...document.querySelectorAll(`#${chart} .bar`)];
      const parts = bars.flatMap((bar) => [...bar.children]);
      const isSeen = parts.every((part) => box(part).width >= 2 &&
        getComputedStyle(part).backgroundColor !== "rgba(0, 0, 0, 0)");
      const lines = [...document.querySelectorAll(`#${chart} .limit`)];
      const places = lines.map((line) =>
        Math.round(100 * (box(line).left - box(bars[0]).left) / box(bars[0]).width));
      seen.push([chart, String(bars.length), String(parts.length), String(isSeen), ...places.map(String)]);
    }
    """
    found = seen_by(browser.visit(driven(PAGES["two plans"], script), tmp_path).dom)
    # 80 GB of a scale that ends at the 90 GB of the plan that doesn't fit
    assert found == [["chart-terms", "2", "8", "true"], ["chart-memory", "2", "10", "true", "89", "89"]]


def test_a_click_sorts_the_sweep(browser: Browser, tmp_path: Path) -> None:
    script = """
    const table = document.querySelector("table[data-sortable]");
    const note = () => seen.push([...table.tBodies[0].rows].map((row) => row.cells[4].textContent.trim()));
    note();
    table.tHead.rows[0].cells[4].querySelector("button").click();
    note();
    """
    as_it_was, sorted_rows = seen_by(browser.visit(driven(PAGES["sweep"], script), tmp_path).dom)
    assert as_it_was == ["188", "125", "562"]
    assert sorted_rows == ["562", "188", "125"]


@pytest.mark.parametrize("width", [420, 1200])
@each_page
def test_nothing_is_wider_than_the_screen(browser: Browser, tmp_path: Path, page: str, width: int) -> None:
    script = """
    for (const fold of document.querySelectorAll("details")) fold.open = true;
    const root = document.documentElement;
    seen.push([String(root.scrollWidth), String(root.clientWidth)]);
    """
    ((content, screen),) = seen_by(browser.visit(driven(page, script), tmp_path, width=width).dom)
    assert int(content) <= int(screen)


@pytest.mark.parametrize("text", [HOSTILE_NAME, HOSTILE_MARKUP, "</style><b>", "<svg onload=alert(1)>"])
def test_a_hostile_name_is_text_and_nothing_else(browser: Browser, tmp_path: Path, text: str) -> None:
    for page in (prediction_html(hostile_run(text)), sweep_html(hostile_sweep(text))):
        seen = browser.visit(page, tmp_path)
        elements = Elements(seen.dom)
        assert elements.names.count("script") == 1
        assert not {"img", "b", "svg"} & set(elements.names)
        assert elements.handlers == []
        assert seen.console == ()
