"""The text room's first stage: what the user names -> documents, one after the other, never all in memory
at once.

A text file is a document; a record of a JSON lines or Parquet file is one; of a folder all files with known
suffixes are read, in sorted order. Empty documents are passed over.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from shardwise.core.errors import TextError
from shardwise.core.shown import shown as shown_text
from shardwise.text import records

TEXT_SUFFIXES = frozenset(
    [
        ".txt",
        ".md",
        ".rst",
        ".py",
        ".c",
        ".cpp",
        ".cu",
        ".h",
        ".go",
        ".html",
        ".java",
        ".js",
        ".rs",
        ".tex",
        ".ts",
    ]
)
"""What is read as text from a directory; a file that is named itself may have any suffix."""
RECORDS = {".jsonl": records.json_lines, ".parquet": records.parquet}
"""Files of records, by their suffix: in a directory and named themselves."""
TEXT_KEY = "text"


def documents_of(files: Sequence[Path], text_key: str = TEXT_KEY) -> Iterator[str]:
    """The documents of files and directories in the order given. text_key: which key or column of a record
    is its text. Raises TextError, which names the file and the line, record or offset."""
    for path in files:
        for text in _documents(path, text_key):
            if text:
                yield text


def names_of(files: Sequence[Path]) -> str:
    """Where documents come from, in words."""
    named = ", ".join(shown(path) for path in files[:3])
    return named + (f" and {len(files) - 3} more" if len(files) > 3 else "")


def shown(path: Path) -> str:
    """The path as text that can be printed and written as JSON, whatever bytes its name has."""
    return str(path).encode("utf-8", "replace").decode("utf-8")


def _documents(path: Path, text_key: str) -> Iterator[str]:
    if path.is_dir():
        suffixes = TEXT_SUFFIXES | frozenset(RECORDS)
        files = list(files_below(path, suffixes=suffixes, skipped=frozenset()))
        if not files:
            raise TextError(
                f'directory "{shown(path)}" holds no text files (*.txt, *.md, *.rst, *.py, ..., *.jsonl, '
                "*.parquet). Name the files themselves."
            )
        for file in files:
            yield from _file(file, text_key)
    elif path.is_file():
        is_empty = True
        for text in _file(path, text_key):
            is_empty = is_empty and not text.strip()
            yield text
        if is_empty:
            raise TextError(f'text file "{shown(path)}" is empty. Leave it out, or give one with text in it.')
    else:
        give = "Give UTF-8 text files, or directories of them."
        if path.exists():
            raise TextError(f'"{shown(path)}" is neither a file nor a directory. {give}')
        raise TextError(f'text file "{shown(path)}" doesn\'t exist. {give}')


def _file(path: Path, text_key: str) -> Iterator[str]:
    read = RECORDS.get(path.suffix.lower())
    if read is None:
        yield _read(path)
        return
    try:
        yield from read(path, shown(path), text_key)
    except OSError as error:
        raise _unreadable(path, error) from None


def _read(path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8").removeprefix("\ufeff")
    except OSError as error:
        raise _unreadable(path, error) from None
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise TextError(
            f'text file "{shown(path)}" is not UTF-8: byte 0x{byte:02x} at offset {error.start}. '
            "Convert it to UTF-8, or leave it out."
        ) from None
    if "\0" in text:
        raise TextError(
            f'text file "{shown(path)}" is binary: it has a NUL byte. Give UTF-8 text, or leave it out.'
        )
    return text


def _unreadable(path: Path, error: OSError) -> TextError:
    return TextError(
        f'text file "{shown(path)}" can\'t be read: {error.strerror or shown_text(error)}. '
        "Check its permissions, or leave it out."
    )


def files_below(root: Path, *, suffixes: frozenset[str], skipped: frozenset[str]) -> Iterator[Path]:
    """Files by suffix, sorted, a folder's own before its subfolders'; without hidden folders, those in
    `skipped`, and links to folders."""

    def refuse(error: OSError) -> None:
        raise TextError(
            f'directory "{shown(Path(error.filename))}" can\'t be read: {error.strerror}. '
            "Check its permissions."
        ) from None

    for folder, folders, names in os.walk(root, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in skipped)
        for name in sorted(names):
            path = Path(folder, name)
            if path.suffix.lower() in suffixes and path.is_file():
                yield path
