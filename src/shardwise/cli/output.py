"""Where a command's answer goes: stdout in one format, and a folder where one is asked for."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from shardwise.core.errors import OptionError
from shardwise.report.common.streams import Console, write_out

if TYPE_CHECKING:
    from shardwise.files.run_folder import RunFolder
    from shardwise.report.common.deliver import Files

OUTPUT = "Output"
TERMINAL, JSON = "terminal", "json"


@dataclass(frozen=True, slots=True)
class Output:
    """form: how the answer goes to stdout; but for the terminal's, nothing else goes there. out: the folder
    of the run, or None."""

    form: str
    out: Path | None

    @property
    def console(self) -> Console:
        return Console(stderr=self.form != TERMINAL)

    def draw(self, document: bytes, draw: Callable[[Console], None]) -> None:
        """The answer, as JSON or drawn."""
        if self.form not in (TERMINAL, JSON):
            raise OptionError(f"--format {self.form}: this answer has no tables. Use {TERMINAL} or {JSON}.")
        if self.form == TERMINAL:
            draw(self.console)
            return
        write_out(document)

    def show(self, result: object) -> None:
        """The answer as data: see report/common/deliver.py."""
        from shardwise.report.common.deliver import show

        show(result, self.form, self.console)

    def deliver(
        self,
        result: object,
        settings: object = None,
        beside: "Callable[[], Files]" = dict,
        page: Callable[[], Mapping[str, object]] = dict,
        most: int | None = None,
    ) -> None:
        """The same, and everything in the folder where one is asked for."""
        from shardwise.report.common.deliver import deliver

        deliver(
            result, self.form, self.console, self.out, settings=settings, beside=beside, page=page, most=most
        )

    def say(self, line: str) -> None:
        """A line beside the answer, as it is."""
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def say_file(self, what: str, name: str) -> None:
        """Where a file of the folder is, if there is one."""
        if self.out is not None:
            self.say(f"{what}: {self.out / name}")

    def keep(
        self, command: str, asked: object, write: "Callable[[RunFolder], Path]", anchor: str = ""
    ) -> None:
        """In the folder, where there is one: what was asked, and what `write` puts beside it; it returns the
        page."""
        if self.out is None:
            return
        from shardwise.files.run_folder import RunFolder

        with RunFolder(self.out, command, datetime.now(UTC), has_events=False) as folder:
            folder.write("settings.json", pretty(asked))
            page = write(folder)
        self.say(f"\nPage: {page}{anchor}")


def write_json(value: Any) -> None:
    """One document on stdout."""
    write_out(pretty(value))


def pretty(value: Any) -> bytes:
    """A JSON document for a reader, with a newline at its end."""
    return msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n"


def speaks() -> bool:
    """Whether this process tells the user: of torchrun's ranks one does."""
    return os.environ.get("RANK", "0") == "0"
