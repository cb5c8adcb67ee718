"""Where what a user reads goes: stdout or stderr, whose reader may go away (`shardwise ... | head`). What is
left to say then goes nowhere, and the command goes on: its run, its files and its exit code are as ever."""

import os
import sys
from typing import IO, Any

import rich.console


class Console(rich.console.Console):
    """rich's own ends the process when its reader is gone."""

    def on_broken_pipe(self) -> None:
        silence(self.file)


def write_out(document: bytes) -> None:
    """On stdout."""
    try:
        sys.stdout.buffer.write(document)
        sys.stdout.buffer.flush()
    except BrokenPipeError:
        silence(sys.stdout)


def write_error(line: str) -> None:
    """A line on stderr."""
    try:
        print(line, file=sys.stderr, flush=True)
    except BrokenPipeError:
        silence(sys.stderr)


def silence(stream: IO[Any]) -> None:
    """A stream without a reader: what is written to it from now on is dropped, at the process's end too."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
