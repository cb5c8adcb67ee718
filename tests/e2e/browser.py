"""Pages in a real headless Chromium: what a page shows, says and asks for, with a person at it or without.

One browser is started for all pages (it takes seconds) and spoken to over two pipes: DevTools' protocol, each
message JSON and a NUL. Each page is seen in a tab of its own; tabs share a process, which takes longer to
start than most pages do. Our pages keep nothing in a browser.
"""

import fcntl
import html
import json
import os
import re
import select
import shutil
import signal
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from shardwise.report.common.page import csp_hash

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--renderer-process-limit=1",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--remote-debugging-pipe",
)
# where the browser reads and writes
_READS, _WRITES = 3, 4
_OFF_THE_WAY = 10
# what a page waits for comes at once: the time that it sees is not ours
_SEEN_MS = 10_000
_HEIGHT = 900
_PATIENCE_S = 120.0
_LOCAL = ("file:", "data:", "blob:", "about:")

# what a person could see and do: the steps in sight, keys, and what a screen reader is told
PERSON = """
const seen = [];
const inSight = (step) => step.getClientRects().length;
const steps = () => [...document.querySelectorAll(".step")].filter(inSight);
const shown = () => steps().map((step) => step.dataset.address);
const live = () => document.getElementById("live").textContent;
const look = (what) => seen.push([what, shown().join(" "), decodeURI(location.hash), live()]);
const press = (key, more = {}) =>
    document.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true, ...more }));
const wait = () => new Promise((done) => setTimeout(done, 50));
const told = () => { document.body.dataset.seen = JSON.stringify(seen); };
"""


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


def driven(page: str, script: str) -> str:
    """The page with a person at it: one more script, which its policy is told of."""
    script = PERSON + f"(async () => {{ {script} told(); }})();"
    allowed = re.sub(
        r"script-src ('sha256-[^']+')", lambda found: f"script-src {found[1]} {csp_hash(script)}", page
    )
    return allowed.replace("</body>", f"<script>{script}</script></body>")


def seen_by(dom: str) -> list[list[str]]:
    """What the person at a page saw."""
    found = re.search(r'data-seen="([^"]*)"', dom)
    assert found, "the person never finished"
    seen: list[list[str]] = json.loads(html.unescape(found[1]))
    return seen


def installed() -> str | None:
    """The browser's path."""
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


@contextmanager
def started(path: str, profile: Path) -> Iterator["Browser"]:
    """A browser that ends with the block. profile: an empty folder for what it keeps."""
    (their_in, our_out), (our_in, their_out) = os.pipe(), os.pipe()
    theirs = [fcntl.fcntl(each, fcntl.F_DUPFD_CLOEXEC, _OFF_THE_WAY) for each in (their_in, their_out)]
    for each in (their_in, their_out):
        os.close(each)
    pid = os.posix_spawn(
        path,
        [path, *OPTIONS, f"--user-data-dir={profile}"],
        os.environ,
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
            (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
            (os.POSIX_SPAWN_DUP2, theirs[0], _READS),
            (os.POSIX_SPAWN_DUP2, theirs[1], _WRITES),
        ],
    )
    for each in theirs:
        os.close(each)
    browser = Browser(our_in, our_out)
    try:
        yield browser
        browser.ask("Browser.close")
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        raise
    finally:
        os.close(our_out)
        os.close(our_in)
        os.waitpid(pid, 0)


class Browser:
    """A running browser. came_in, sent_to: file descriptors."""

    def __init__(self, came_in: int, sent_to: int) -> None:
        self._in = came_in
        self._out = sent_to
        self._asked = 0
        self._rest = b""
        self._messages: deque[dict[str, Any]] = deque()

    def visit(
        self, page: str, directory: Path, *, address: str = "", width: int = 1200, is_dark: bool = False
    ) -> Visit:
        """Opens a page as a file in the directory, and waits until it has come to rest. address: where in the
        page, as in a link to it. width: of the window, in pixels. is_dark: the person likes dark colours."""
        file = directory / "page.html"
        file.write_text(page, encoding="utf-8")
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable", session)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
        self.ask("Emulation.setEmulatedMedia", session, features=[scheme])
        self.ask(
            "Emulation.setDeviceMetricsOverride",
            session,
            width=width,
            height=_HEIGHT,
            deviceScaleFactor=1,
            mobile=False,
        )
        self._messages.clear()
        self.ask("Page.navigate", session, url=file.as_uri() + address)
        events = self._until("Page.loadEventFired")
        self.ask(
            "Emulation.setVirtualTimePolicy", session, policy="pauseIfNetworkFetchesPending", budget=_SEEN_MS
        )
        events += self._until("Emulation.virtualTimeBudgetExpired")
        whole = "(document.doctype ? '<!doctype html>' : '') + document.documentElement.outerHTML"
        dom = self.ask("Runtime.evaluate", session, expression=whole, returnByValue=True)["result"]["value"]
        self.ask("Target.closeTarget", targetId=target)
        addresses = [
            event["params"]["request"]["url"]
            for event in events
            if event["method"] == "Network.requestWillBeSent"
        ]
        return Visit(
            dom,
            tuple(line for event in events for line in _said(event)),
            tuple(address for address in addresses if not address.startswith(_LOCAL)),
        )

    def ask(self, method: str, session: str | None = None, **parameters: object) -> dict[str, Any]:
        """What the browser answers. Events that come before are kept for who waits for them."""
        self._asked += 1
        number = self._asked
        message = {"id": number, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._out, data) :]
        earlier = []
        while (answer := self._next()).get("id") != number:
            earlier.append(answer)
        self._messages.extendleft(reversed(earlier))
        assert "error" not in answer, (method, answer["error"])
        found: dict[str, Any] = answer["result"]
        return found

    def _until(self, method: str) -> list[dict[str, Any]]:
        """The events up to the first of this method."""
        events = []
        while (event := self._next()).get("method") != method:
            events.append(event)
        return events

    def _next(self) -> dict[str, Any]:
        if self._messages:
            return self._messages.popleft()
        deadline_s = time.monotonic() + _PATIENCE_S
        while b"\0" not in self._rest:
            ready, *_ = select.select([self._in], [], [], max(0.0, deadline_s - time.monotonic()))
            assert ready, "the browser says nothing"
            data = os.read(self._in, 1 << 20)
            assert data, "the browser has ended"
            self._rest += data
        first, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(first)
        return message


def _said(event: dict[str, Any]) -> list[str]:
    """What an event adds to the page's console."""
    parameters = event["params"]
    match event["method"]:
        case "Runtime.consoleAPICalled":
            return [" ".join(str(each.get("value", each)) for each in parameters["args"])]
        case "Runtime.exceptionThrown":
            return [str(parameters["exceptionDetails"])]
        case "Log.entryAdded":
            return [parameters["entry"]["text"]]
    return []
