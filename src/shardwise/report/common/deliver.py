"""A verb's result, delivered: on stdout in one format, and in a run folder in all of them."""

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console

from shardwise.core.errors import OptionError
from shardwise.core.plan import suggest
from shardwise.files.document import settings_document
from shardwise.files.run_folder import RunFolder
from shardwise.report.common.formats import format_named, formats
from shardwise.report.common.room import room_of
from shardwise.report.common.streams import write_out

TERMINAL = "terminal"
Files = Mapping[str, bytes | str]


def check_format(name: str) -> None:
    """Raises OptionError for a format that there isn't."""
    if name not in formats():
        raise OptionError(f'--format is "{name}".{suggest(name, formats())} Allowed: {", ".join(formats())}.')


def deliver(
    result: object,
    form: str,
    console: Console,
    out: Path | None = None,
    *,
    settings: object = None,
    beside: Callable[[], Files] = dict,
    page: Callable[[], Mapping[str, object]] = dict,
    most: int | None = None,
) -> None:
    """The result on stdout as `form` says; with `out`, a run folder of settings.json, what stands `beside`,
    and the result in every format.

    console: where a terminal's report and the page's path go. page: what the HTML page needs besides the
    result. most: how many rows a terminal shows of a table that has many.
    """
    room = room_of(result)
    show(result, form, console, most)
    if out is None:
        return
    with RunFolder(out, room.name, datetime.now(UTC), has_events=False) as folder:
        folder.write("settings.json", settings_document(settings))
        for name, content in beside().items():
            folder.write(name, content)
        path = write_all(result, folder, **page())
    console.print(f"\nPage: {path}", markup=False, highlight=False, soft_wrap=True)


def show(result: object, form: str, console: Console, most: int | None = None) -> None:
    """On stdout: drawn for the console, or the format's texts one after another."""
    check_format(form)
    module = format_named(form)
    if form == TERMINAL:
        module.show(room_of(result), result, console, most)
        return
    write_out(b"\n".join(module.files(room_of(result), result).values()))


def write_all(result: object, folder: RunFolder, **page: object) -> Path:
    """The result in every format; returns the page's path."""
    room = room_of(result)
    for form in formats():
        for name, content in format_named(form).files(room, result, **page).items():
            folder.write(name, content)
    return folder.path / f"{room.name}.html"
