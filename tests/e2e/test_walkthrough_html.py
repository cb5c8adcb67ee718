"""The walk-through's page in a real headless Chromium: it steps, by keys and by address, asks the network for
nothing, and stays whole on paper."""

import json
import re
from pathlib import Path

import pytest

from shardwise.report.walkthrough.html import walkthrough_html
from shardwise.walkthrough.record import record_walkthrough
from shardwise.walkthrough.subject import subjects
from shardwise.walkthrough.words import Explained, explain_walkthrough
from tests.e2e.browser import Browser, Elements, driven, seen_by
from tests.matrix import FULL
from tests.unit.comparison_example import HOSTILE_MARKUP


@pytest.fixture(scope="module")
def walkthroughs() -> list[Explained]:
    return [explain_walkthrough(record_walkthrough(subject)) for subject in subjects()]


def test_keys_go_through_every_step_forward_and_back(
    browser: Browser, tmp_path: Path, walkthroughs: list[Explained]
) -> None:
    script = """
    await wait(); look("start"); press("ArrowRight"); look("one");
    for (let i = 0; i < 30; i++) press("ArrowRight");
    look("right"); press("ArrowLeft"); look("left"); press("Home"); look("home"); press("End"); look("end");
    press("ArrowLeft", { altKey: true }); look("alt");
    """
    visited = browser.visit(driven(walkthrough_html(walkthroughs), script), tmp_path)
    last = len(walkthroughs[0].steps) + 1
    assert visited.console == ()
    assert visited.requests == ()
    assert [(what, shown) for what, shown, *_ in seen_by(visited.dom)] == [
        ("start", "embedding/rowwise/1"),
        ("one", "embedding/rowwise/2"),
        ("right", f"embedding/rowwise/{last}"),
        ("left", f"embedding/rowwise/{last - 1}"),
        ("home", "embedding/rowwise/1"),
        ("end", f"embedding/rowwise/{last}"),
        ("alt", f"embedding/rowwise/{last}"),
    ]


def test_a_step_is_read_out_and_the_address_follows_it(
    browser: Browser, tmp_path: Path, walkthroughs: list[Explained]
) -> None:
    script = """
    await wait(); press("ArrowRight"); look("second"); document.getElementById("next").click(); look("third");
    """
    seen = seen_by(browser.visit(driven(walkthrough_html(walkthroughs), script), tmp_path).dom)
    for number, (_, shown, address, live) in enumerate(seen, start=2):
        step = walkthroughs[0].steps[number - 1]
        assert shown == f"embedding/rowwise/{number}"
        assert address == f"#embedding/rowwise/{number}"
        assert live.startswith(
            f"Step {number} of {len(walkthroughs[0].steps) + 1} · forward. {step.title}. {step.words}"
        )


def test_every_step_of_every_walk_through_can_be_reached_by_its_address_and_fits_a_phone(
    browser: Browser, tmp_path: Path, walkthroughs: list[Explained]
) -> None:
    addresses = [
        f"{walk.subject}/{number}" for walk in walkthroughs for number in range(1, len(walk.steps) + 2)
    ]
    visits = """{
      location.hash = address; await wait(); look(address);
      seen.at(-1).push(String(page.scrollWidth <= page.clientWidth));
    }"""
    script = f"const page = document.documentElement; for (const address of {json.dumps(addresses)}) {visits}"
    visited = browser.visit(driven(walkthrough_html(walkthroughs), script), tmp_path, width=420)
    assert visited.console == ()
    assert visited.requests == ()
    assert [(asked, shown, fits) for asked, shown, _, _, fits in seen_by(visited.dom)] == [
        (address, address, "true") for address in addresses
    ]


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("embedding/routed/4", "embedding/routed/4"),
        ("loss/vocab_parallel", "loss/vocab_parallel/1"),
        ("embedding/colwise/999", "embedding/colwise/9"),
        ("no/such/3", "embedding/rowwise/1"),
    ],
)
def test_a_link_opens_its_step(
    browser: Browser, tmp_path: Path, walkthroughs: list[Explained], address: str, shown: str
) -> None:
    page = driven(walkthrough_html(walkthroughs), 'await wait(); look("opened");')
    assert seen_by(browser.visit(page, tmp_path, address=f"#{address}").dom)[0][1] == shown


def test_arrows_join_the_block_that_leaves_to_the_block_that_comes(
    browser: Browser, tmp_path: Path, walkthroughs: list[Explained]
) -> None:
    script = """
    location.hash = "embedding/rowwise/5"; await wait();
    for (const group of document.querySelectorAll(".step.now .arrows g"))
        seen.push([group.getAttribute("class"), String(group.querySelector(".stays") !== null)]);
    """
    found = seen_by(browser.visit(driven(walkthrough_html(walkthroughs), script), tmp_path).dom)
    assert sorted(found) == [["r0", "false"], ["r0", "true"], ["r1", "false"], ["r1", "true"]]


@FULL  # on a phone: above
def test_nothing_is_wider_than_the_screen(
    browser: Browser, tmp_path: Path, walkthroughs: list[Explained]
) -> None:
    script = """
    const page = document.documentElement, steps = [...document.querySelectorAll(".step")];
    for (const step of steps) {
      location.hash = step.dataset.address; await wait();
      if (page.scrollWidth > page.clientWidth) seen.push([step.dataset.address, String(page.scrollWidth)]);
    }
    seen.push(["all", String(steps.length)]);
    """
    visited = browser.visit(driven(walkthrough_html(walkthroughs), script), tmp_path)
    assert seen_by(visited.dom) == [["all", str(sum(len(walk.steps) + 1 for walk in walkthroughs))]]


def test_without_its_script_every_step_is_in_sight(
    browser: Browser, tmp_path: Path, walkthroughs: list[Explained]
) -> None:
    page = driven(walkthrough_html(walkthroughs), 'seen.push(["steps", String(steps().length)]);')
    without = re.sub(r"<script>\"use strict\".*?</script>", "", page, count=1, flags=re.DOTALL)
    assert without != page
    assert seen_by(browser.visit(without, tmp_path).dom) == [
        ["steps", str(sum(len(walk.steps) + 1 for walk in walkthroughs))]
    ]


def test_a_hostile_module_name_is_text_and_nothing_else(browser: Browser, tmp_path: Path) -> None:
    names = (HOSTILE_MARKUP, "</script><script>document.body.dataset.slipped = 1</script>", "</style><b>")
    page = walkthrough_html(
        [explain_walkthrough(record_walkthrough("embedding/rowwise", module=name)) for name in names]
    )
    visited = browser.visit(page, tmp_path)
    elements = Elements(visited.dom)
    assert "img" not in elements.names
    assert "b" not in elements.names
    assert elements.names.count("script") == 1
    assert elements.handlers == []
    assert "data-slipped" not in visited.dom
    assert visited.console == ()


def test_a_script_that_slips_into_the_page_does_not_run(
    browser: Browser, tmp_path: Path, walkthroughs: list[Explained]
) -> None:
    slipped = (
        '<img src=x onerror="document.body.dataset.slipped = 1">'
        "<script>document.body.dataset.slipped = 2</script>"
    )
    visited = browser.visit(
        walkthrough_html(walkthroughs[:1]).replace("</main>", f"</main>{slipped}"), tmp_path
    )
    assert "data-slipped" not in visited.dom
    assert any("Content Security Policy" in line for line in visited.console)


def test_colours_follow_the_dark_scheme(
    browser: Browser, tmp_path: Path, walkthroughs: list[Explained]
) -> None:
    script = "await wait(); seen.push([getComputedStyle(document.body).backgroundColor]);"
    page = driven(walkthrough_html(walkthroughs[:1]), script)
    light, dark = tmp_path / "light", tmp_path / "dark"
    light.mkdir()
    dark.mkdir()
    assert seen_by(browser.visit(page, light).dom) == [["rgb(255, 255, 255)"]]
    assert seen_by(browser.visit(page, dark, is_dark=True).dom) == [["rgb(20, 23, 27)"]]
