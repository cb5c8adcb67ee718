"""A reader that goes away (`shardwise ... | head`): what is left to say goes nowhere, and nothing ends."""

import os
import sys
from collections.abc import Iterator

import pytest

from shardwise.cli.output import Output
from shardwise.cli.progress import ProgressLine
from shardwise.report.common.streams import write_out


@pytest.fixture
def nobody_reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    streams = []
    for name in ("stdout", "stderr"):
        reads, writes = os.pipe()
        os.close(reads)
        streams.append(os.fdopen(writes, "w"))
        monkeypatch.setattr(sys, name, streams[-1])
    yield
    for stream in streams:
        stream.close()  # flushes what is left, as the process's end does


def test_what_nobody_reads_is_dropped(nobody_reads: None) -> None:
    for form in ("terminal", "json"):
        for _ in range(2):
            Output(form, None).say("a line")
    write_out(b"a document")
    with ProgressLine() as progress:
        progress("a line")
        progress("another")
