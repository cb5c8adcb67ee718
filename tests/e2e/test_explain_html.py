"""The page of explain in a real headless Chromium: it asks the network for nothing, draws its charts, sorts,
and fits a phone."""

from pathlib import Path

import pytest

from shardwise.core.explanation import Contrast
from shardwise.report.explain.html import contrast_html, explanation_html
from tests.e2e.browser import Browser, Elements, driven, seen_by
from tests.matrix import FULL
from tests.unit.comparison_example import HOSTILE_MARKUP, HOSTILE_NAME
from tests.unit.explanation_example import (
    alone_example,
    contrast_example,
    dtensor_example,
    explanation,
    hostile_example,
)

PAGES = {
    "one plan": explanation_html(explanation("routed"), "walkthrough.html#embedding/routed"),
    "findings": explanation_html(dtensor_example()),
    "nothing sent": explanation_html(alone_example()),
    "two plans": contrast_html(contrast_example()),
    "hostile names": explanation_html(hostile_example("y" * 300)),
}

each_page = pytest.mark.parametrize("page", PAGES.values(), ids=PAGES.keys())


@each_page
def test_the_page_is_drawn_offline_and_without_complaint(browser: Browser, tmp_path: Path, page: str) -> None:
    seen = browser.visit(page, tmp_path)
    assert seen.console == ()
    assert seen.requests == ()
    assert Elements(seen.dom).handlers == []


def test_every_bar_has_its_size(browser: Browser, tmp_path: Path) -> None:
    script = """
    const width = (element) => element.getBoundingClientRect().width;
    for (const chart of ["chart-wire", "chart-memory"]) {
      const bars = [...document.querySelectorAll(`#${chart} .bar`)];
      const parts = bars.flatMap((bar) => [...bar.children]);
      const isSeen = parts.every((part) => width(part) >= 2 &&
        getComputedStyle(part).backgroundColor !== "rgba(0, 0, 0, 0)");
      const fits = bars.every((bar) => 
        [...bar.children].at(-1).getBoundingClientRect().right <= bar.getBoundingClientRect().right + 6);
      seen.push([chart, String(bars.length), String(parts.length), String(isSeen), String(fits)]);
    }
    """
    found = seen_by(browser.visit(driven(PAGES["two plans"], script), tmp_path).dom)
    assert found == [["chart-wire", "8", "14", "true", "true"], ["chart-memory", "4", "14", "true", "true"]]


def test_the_backward_is_drawn_under_the_forward_the_other_way_round(
    browser: Browser, tmp_path: Path
) -> None:
    script = """
    const layers = [...document.querySelectorAll(".band .layer")];
    for (const layer of layers) {
      const stops = [...layer.querySelectorAll(".stop")].sort((a, b) =>
        a.getBoundingClientRect().left - b.getBoundingClientRect().left);
      seen.push(stops.map((stop) => (stop.querySelector(".what") || stop).textContent.trim()));
    }
    """
    forward, backward = seen_by(browser.visit(driven(PAGES["one plan"], script), tmp_path).dom)
    assert forward == ["attention_norm", "all-gather", "attention", "reduce-scatter"]
    assert backward == ["attention_norm", "reduce-scatter", "attention", "all-gather"]


def test_a_click_sorts_a_table_and_each_reason_stays_under_its_row(browser: Browser, tmp_path: Path) -> None:
    script = """
    const table = document.querySelector("table.groups");
    const note = (what) => seen.push([what,
      ...[...table.tBodies].map((body) => body.rows[0].cells[2].textContent.trim())]);
    const reasons = () => seen.push([
      String([...table.tBodies].every((body) => body.rows[1].textContent.includes("needs it")))]);
    const button = table.tHead.rows[0].cells[2].querySelector("button");
    note("as it was"); button.click();
    note(table.tHead.rows[0].cells[2].getAttribute("aria-sort")); reasons();
    button.click(); note(table.tHead.rows[0].cells[2].getAttribute("aria-sort"));
    table.tHead.rows[0].cells[1].querySelector("button").click();
    note(table.tHead.rows[0].cells[1].getAttribute("aria-sort"));
    """
    order = ["x 1", "x 4", "x 4", "x 4", "x 4", "x 1", "x 3", "x 1"]
    found = seen_by(browser.visit(driven(PAGES["one plan"], script), tmp_path).dom)
    assert found == [
        ["as it was", *order],
        ["descending", "x 4", "x 4", "x 4", "x 4", "x 3", "x 1", "x 1", "x 1"],
        ["true"],
        ["ascending", "x 1", "x 1", "x 1", "x 3", "x 4", "x 4", "x 4", "x 4"],
        ["ascending", *order],
    ]


@pytest.mark.parametrize("width", [420, pytest.param(700, marks=FULL), 1200])
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
    example = hostile_example(text)
    for page in (
        explanation_html(example),
        contrast_html(Contrast(example, example, example.collectives, (), (), (text,))),
    ):
        seen = browser.visit(page, tmp_path)
        elements = Elements(seen.dom)
        assert elements.names.count("script") == 1
        assert not {"img", "b", "svg"} & set(elements.names)
        assert elements.handlers == []
        assert seen.console == ()


def test_a_script_that_slips_into_the_page_does_not_run(browser: Browser, tmp_path: Path) -> None:
    slipped = (
        '<img src=x onerror="document.body.dataset.slipped = 1"><script>document.body.dataset.slipped = '
        "2</script>"
    )
    seen = browser.visit(PAGES["one plan"].replace("</main>", f"</main>{slipped}"), tmp_path)
    assert "data-slipped" not in seen.dom
    assert any("Content Security Policy" in line for line in seen.console)


def test_colours_follow_the_dark_scheme(browser: Browser, tmp_path: Path) -> None:
    page = driven(PAGES["findings"], "seen.push([getComputedStyle(document.body).backgroundColor]);")
    light, dark = tmp_path / "light", tmp_path / "dark"
    light.mkdir()
    dark.mkdir()
    assert seen_by(browser.visit(page, light).dom) == [["rgb(255, 255, 255)"]]
    assert seen_by(browser.visit(page, dark, is_dark=True).dom) == [["rgb(20, 23, 27)"]]
