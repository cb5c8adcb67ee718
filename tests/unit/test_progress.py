"""How far a command is, on stderr: a bar on a terminal, elsewhere a few lines; and what it has found."""

import io
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
