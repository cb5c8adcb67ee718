"""The page in a real headless Chromium: it draws, it asks the network for nothing, and names from files stay
text."""

import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import pytest

from shardwise.core.measurement import Comparison
from shardwise.report.compare.html import comparison_html
from tests.unit.comparison_example import (
    HOSTILE_MARKUP,
    HOSTILE_NAME,
    cuda_example,
    example,
    module_only_example,
)

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
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


@dataclass(frozen=True, slots=True)
class Visit:
    """What a browser made of a page: its DOM afterwards, its console, and every address that the page asked
    for."""

    dom: str
    console: tuple[str, ...]
    requests: tuple[str, ...]


class Elements(HTMLParser):
    """Names of all elements, and for each chart the number of plotly's drawings in its figure."""

    def __init__(self, dom: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.drawings: dict[str, int] = {}
        self.handlers: list[str] = []
        self._chart = ""
        self.feed(dom)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.names.append(tag)
        self.handlers += [name for name in given if name.startswith("on")]
        identity = given.get("id") or ""
        if identity.startswith("chart-"):
            self._chart = identity
            self.drawings[identity] = 0
        if "main-svg" in (given.get("class") or "").split() and self._chart:
            self.drawings[self._chart] += 1

    def handle_endtag(self, tag: str) -> None:
        if tag == "figure":
            self._chart = ""


@pytest.fixture(scope="module")
def browser() -> str:
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(
            f"THE PAGE WAS NOT SEEN BY A BROWSER: none of {', '.join(BROWSERS)} is installed (apt-get "
            "install chromium)"
        )
    return found


def visit(browser: str, page: str, directory: Path, *options: str) -> Visit:
    (directory / "page.html").write_text(page, encoding="utf-8")
    log = directory / "net.json"
    ended = subprocess.run(
        [
            browser,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--disable-dev-shm-usage",
            "--host-resolver-rules=MAP * ~NOTFOUND",
            "--enable-logging=stderr",
            "--window-size=1200,900",
            "--virtual-time-budget=10000",
            f"--user-data-dir={directory / 'profile'}",
            f"--log-net-log={log}",
            *options,
            "--dump-dom",
            (directory / "page.html").as_uri(),
        ],
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    written = json.loads(log.read_text(encoding="utf-8"))
    started = written["constants"]["logEventTypes"]["URL_REQUEST_START_JOB"]
    asked = (event.get("params", {}) for event in written["events"] if event["type"] == started)
    # the browser asks its maker for the time and for updates, whatever the page: those requests come from no
    # origin
    requests = tuple(
        found["url"] for found in asked if "url" in found and found["initiator"] != "not an origin"
    )
    console = tuple(line for line in ended.stderr.splitlines() if "CONSOLE" in line)
    return Visit(
        ended.stdout,
        console,
        tuple(url for url in requests if not url.startswith(("file:", "data:", "blob:"))),
    )


@pytest.mark.parametrize(
    ("comparison", "charts"),
    [
        pytest.param(example(), WHOLE_STEP_CHARTS, id="three plans"),
        pytest.param(example(("rowwise",), noise=False), WHOLE_STEP_CHARTS, id="one plan"),
        pytest.param(example(EIGHT_PLANS), WHOLE_STEP_CHARTS, id="eight plans"),
        pytest.param(module_only_example(), MODULE_CHARTS, id="one module"),
        pytest.param(cuda_example(), WHOLE_STEP_CHARTS, id="device memory and a lost loss"),
        pytest.param(
            example((HOSTILE_NAME, HOSTILE_MARKUP, "x" * 300)), WHOLE_STEP_CHARTS, id="hostile names"
        ),
    ],
)
def test_every_chart_is_drawn_offline_and_without_complaint(
    browser: str, tmp_path: Path, comparison: Comparison, charts: set[str]
) -> None:
    seen = visit(browser, comparison_html(comparison), tmp_path)
    elements = Elements(seen.dom)
    assert seen.console == ()
    assert seen.requests == ()
    assert set(elements.drawings) == charts
    assert all(count > 0 for count in elements.drawings.values()), elements.drawings


def test_a_hostile_name_is_text_and_nothing_else(browser: str, tmp_path: Path) -> None:
    seen = visit(browser, comparison_html(example((HOSTILE_NAME, HOSTILE_MARKUP, "<b>&amp;</b>"))), tmp_path)
    elements = Elements(seen.dom)
    assert "img" not in elements.names
    assert elements.names.count("script") == 3
    assert elements.handlers == []
    labels = re.findall(
        r"<text class=\"ytick\"[^>]*>(.*?)</text>|<g class=\"ytick\"><text[^>]*>(.*?)</text>", seen.dom
    )
    assert any("&lt;/script&gt;" in "".join(label) for label in labels), labels
    assert any("&lt;b&gt;&amp;amp;&lt;/b&gt;" in "".join(label) for label in labels), labels


def test_a_script_that_slips_into_the_page_does_not_run(browser: str, tmp_path: Path) -> None:
    slipped = (
        '<img src=x onerror="document.body.dataset.slipped = 1"><script>document.body.dataset.slipped = '
        "2</script>"
    )
    page = comparison_html(example()).replace("</header>", f"</header>{slipped}")
    seen = visit(browser, page, tmp_path)
    assert "data-slipped" not in seen.dom
    assert any("Content Security Policy" in line for line in seen.console)


def test_charts_follow_the_dark_colour_scheme(browser: str, tmp_path: Path) -> None:
    light, dark = (tmp_path / "light", tmp_path / "dark")
    light.mkdir()
    dark.mkdir()
    page = comparison_html(example())
    assert "rgb(0, 114, 178)" in visit(browser, page, light).dom
    assert "rgb(74, 168, 232)" in visit(browser, page, dark, "--blink-settings=preferredColorScheme=0").dom


def test_the_network_log_would_show_a_request(browser: str, tmp_path: Path) -> None:
    seen = visit(browser, '<!doctype html><img src="http://127.0.0.1:9/picture.png">', tmp_path)
    assert "http://127.0.0.1:9/picture.png" in seen.requests
