"""steps.jsonl of a training run: a StepRecord a line, in order, each step once.

A run that goes on from a checkpoint does the steps after it again; their earlier lines go. A last line that a
dying process left half written goes too.
"""

from collections.abc import Iterator
from pathlib import Path

import msgspec

from shardwise.core.errors import RunError
from shardwise.core.training import StepRecord

NAME = "steps.jsonl"


class StepLog:
    """Opens the log of a folder, or begins one. after: the last step whose line is left. Raises RunError
    where the disk is full or can't be written."""

    def __init__(self, folder: Path, after: int = 0) -> None:
        self.path = folder / NAME
        try:
            kept = b"".join(line for line, record in _lines(self.path) if record.step <= after)
            beside = self.path.with_suffix(".partial")
            beside.write_bytes(kept)
            beside.replace(self.path)
            self._file = self.path.open("ab", buffering=0)
        except OSError as error:
            raise self._lost(error) from None

    def append(self, record: StepRecord) -> None:
        """On disk at once."""
        line = memoryview(msgspec.json.encode(record) + b"\n")
        try:
            while line:  # a disk that has just become full takes a part first
                line = line[self._file.write(line) :]
        except OSError as error:
            raise self._lost(error) from None

    def close(self) -> None:
        self._file.close()

    def _lost(self, error: OSError) -> RunError:
        return RunError(
            f"can't write {self.path}: {error.strerror}. Free space there, and go on from the last "
            "checkpoint with --resume."
        )


def read_steps(folder: Path) -> list[StepRecord]:
    """All whole lines of a folder's log; none where it has none."""
    return [record for _, record in _lines(folder / NAME)]


def _lines(path: Path) -> Iterator[tuple[bytes, StepRecord]]:
    if not path.is_file():
        return
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                return
            try:
                yield line, msgspec.json.decode(line, type=StepRecord)
            except msgspec.MsgspecError:
                return
