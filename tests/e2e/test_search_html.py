"""The page of search in a real headless Chromium: it asks the network for nothing, shows all that was
considered, tells what a dot is, copies a plan, and fits a phone."""

from pathlib import Path

import pytest

from shardwise.report.search.html import search_html
from tests.e2e.browser import Browser, Elements, driven, seen_by
from tests.unit import search_example as example
from tests.unit.comparison_example import HOSTILE_MARKUP, HOSTILE_NAME

SEARCHES = {
    "proved": example.search,
    "with a gap": example.with_gap,
    "stopped": example.stopped,
    "nothing fits": example.nothing_fits,
    "nothing at all": example.nothing_at_all,
    "ten thousand": example.large,
    "long names": lambda: example.hostile("y" * 300),
}


@pytest.mark.parametrize("which", SEARCHES)
def test_the_page_is_drawn_offline_without_complaint_and_fits_a_phone(
    browser: Browser, tmp_path: Path, which: str
) -> None:
    page = search_html(SEARCHES[which]())
    script = """
    for (const fold of document.querySelectorAll("details")) fold.open = true;
    const root = document.documentElement;
    seen.push([String(root.scrollWidth), String(root.clientWidth)]);
    """
    for width in (420, 1200):
        seen = browser.visit(driven(page, script), tmp_path, width=width)
        assert seen.console == ()
        assert seen.requests == ()
        assert Elements(seen.dom).handlers == []
        ((content, screen),) = seen_by(seen.dom)
        assert int(content) <= int(screen)


def test_dots_lie_in_their_picture_and_tell_what_they_are_when_pointed_at(
    browser: Browser, tmp_path: Path
) -> None:
    script = """
    const box = (element) => element.getBoundingClientRect(), send = (element, what) =>
      element.dispatchEvent(new PointerEvent(what, { bubbles: true }));
    const plot = document.querySelector(".plot"), plane = box(plot.querySelector(".plane"));
    const dots = [...plot.querySelectorAll(".dot-at .mark")];
    const inside = dots.filter((dot) =>
      box(dot).left >= plane.left - 8 && box(dot).right <= plane.right + 8 &&
      box(dot).top >= plane.top - 8 && box(dot).bottom <= plane.bottom + 8 && box(dot).width > 4);
    const refused = dots.filter((dot) => dot.classList.contains("refused"));
    const end = box(plot.querySelector(".end")).left;
    const areBeyond = refused.every((dot) => box(dot).right > end);
    seen.push([String(dots.length), String(inside.length), String(areBeyond)]);
    send(plot.querySelector(".dot-at .mark.found"), "pointerover");
    seen.push([plot.querySelector(".told").textContent]);
    """
    (counts, told) = seen_by(browser.visit(driven(search_html(example.search()), script), tmp_path).dom)
    # all that was considered, and a ring around each found one
    assert counts == ["42", "42", "true"]
    assert told[0].startswith("Plan 1, fsdp=8,tp=8 · micro-batch 1")


def test_a_click_selects_the_plan_s_file_to_be_copied(browser: Browser, tmp_path: Path) -> None:
    script = """
    const button = document.querySelector(".file button.copy");
    button.click();
    await wait();
    seen.push([String(button.hidden), String(getSelection()).trim()]);
    """
    ((hidden, selected),) = seen_by(
        browser.visit(driven(search_html(example.search()), script), tmp_path).dom
    )
    assert hidden == "false"
    assert selected == example.PLAN.strip()


@pytest.mark.parametrize("text", [HOSTILE_NAME, HOSTILE_MARKUP, "</style><b>", "<svg onload=alert(1)>"])
def test_a_hostile_name_is_text_and_nothing_else(browser: Browser, tmp_path: Path, text: str) -> None:
    seen = browser.visit(search_html(example.hostile(text)), tmp_path)
    elements = Elements(seen.dom)
    assert elements.names.count("script") == 2
    assert not {"img", "b"} & set(elements.names)
    assert elements.handlers == []
    assert seen.console == ()
