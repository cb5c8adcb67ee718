"""How far a command is, on stderr: a bar on a terminal, elsewhere a few lines; and what it has found."""

import io
import re
import sys

import pytest

from shardwise.cli.progress import ProgressLine
from shardwise.verbs.progress import so_far


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_without_a_terminal_the_best_so_far_is_said_when_it_changes_and_not_with_every_try(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with ProgressLine() as progress:
        progress("reading the model")
        for best in ("12.0 s, tp=8", "10.0 s, fsdp=8"):
            for tried in range(50):
                progress(so_far(f"{tried} tried", best), tried, 100)
    assert capsys.readouterr().err.splitlines() == [
        "shardwise: reading the model",
        "shardwise: 0 tried; best so far: 12.0 s, tp=8",
        "shardwise: 0 tried; best so far: 10.0 s, fsdp=8",
    ]


def test_on_a_terminal_the_best_so_far_stands_on_a_line_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    with ProgressLine() as progress:
        progress(so_far("tracing fsdp=8,tp=8", f"10.0 s: {'fsdp=16,tp=4 ' * 12}"), 3, 40)
    lines = [line for line in shown.getvalue().splitlines() if "best so far: 10.0 s" in line]
    assert lines
    assert all("tracing" not in line and "\u2026" in line for line in lines)
    assert "3/40" in shown.getvalue()


def test_without_a_terminal_a_long_run_says_a_line_now_and_then_and_the_last(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with ProgressLine(every_s=3600) as progress:
        progress("reading text")
        for done in range(1, 5001):
            progress(f"loss {done / 1000:.4f}\nnorm 1", done, 5000)
    assert capsys.readouterr().err.splitlines() == [
        "shardwise: reading text",
        "shardwise: 1 of 5,000: loss 0.0010, norm 1",
        "shardwise: 5,000 of 5,000: loss 5.0000, norm 1",
    ]


def test_a_line_that_stays_stands_above_the_bar_and_not_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = Terminal()
    said: list[str] = []
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    with ProgressLine() as progress:
        progress("loss 5.0\nnorm 1", 3, 40)
        progress.above("steps take [2] s", said.append)
    assert not said
    assert any(
        re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line).strip("\r") == "steps take [2] s"
        for line in shown.getvalue().splitlines()
    )
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with ProgressLine() as progress:
        progress.above("steps take [2] s", said.append)
    assert said == ["steps take [2] s"]
