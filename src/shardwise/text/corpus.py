"""The text room's first stage: files, or the standard library's own documentation, as one string.

The built-in corpus is every topic of pydoc_data.topics, then the docstrings and whole-line comments of the
standard library's modules, parsed from their source and never imported. It is the same wherever sys.version
is the same. It is what lets Shardwise run on real text without a download; CPython 3.11 has 3.1 MB of it.
"""

import ast
import os
import sys
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from shardwise.core.errors import TextError

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
"""What is read from a directory; a file that is named itself may have any suffix."""

STDLIB_SOURCE = f"Python {sys.version.split()[0]} standard library: its topics, docstrings and comments"

# pydoc_data's text is taken by import; the modules of encodings are generated tables
_NOT_DOCUMENTATION = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data"}
)


@dataclass(frozen=True, slots=True)
class Corpus:
    """Text, and where it came from in words."""

    text: str
    source: str

    def __post_init__(self) -> None:
        if not self.text.strip():
            raise TextError(f"{self.source} holds no text, only blanks. Give files with text in them.")


def load_text(files: Sequence[Path] = ()) -> Corpus:
    """The text of files and directories in the order given, or the built-in corpus for none."""
    if not files:
        return Corpus(_stdlib_text(), STDLIB_SOURCE)
    texts = [text for path in files for text in _texts(path)]
    named = ", ".join(shown(path) for path in files[:3])
    more = f" and {len(files) - 3} more" if len(files) > 3 else ""
    return Corpus("\n".join(texts), named + more)


def shown(path: Path) -> str:
    """The path as text that can be printed and written as JSON, whatever bytes its name has."""
    return str(path).encode("utf-8", "replace").decode("utf-8")


def _texts(path: Path) -> Iterator[str]:
    if path.is_dir():
        files = list(_files_below(path, suffixes=TEXT_SUFFIXES, skipped=frozenset()))
        if not files:
            raise TextError(
                f'directory "{shown(path)}" holds no text files (*.txt, *.md, *.rst, *.py, ...). '
                "Name the files themselves."
            )
        yield from map(_read, files)
    elif path.is_file():
        text = _read(path)
        if not text.strip():
            raise TextError(f'text file "{shown(path)}" is empty. Leave it out, or give one with text in it.')
        yield text
    else:
        give = "Give UTF-8 text files, or directories of them."
        if path.exists():
            raise TextError(f'"{shown(path)}" is neither a file nor a directory. {give}')
        raise TextError(f'text file "{shown(path)}" doesn\'t exist. {give}')


def _read(path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8").removeprefix("\ufeff")
    except OSError as error:
        raise TextError(
            f'text file "{shown(path)}" can\'t be read: {error.strerror}. '
            "Check its permissions, or leave it out."
        ) from None
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


def _files_below(root: Path, *, suffixes: frozenset[str], skipped: frozenset[str]) -> Iterator[Path]:
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


def _stdlib_text() -> str:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise TextError(
            "this Python comes without its documentation (pydoc_data). Give text files instead."
        ) from None
    parts = [topics[name] for name in sorted(topics)]
    stdlib = Path(sysconfig.get_path("stdlib"))
    for path in _files_below(stdlib, suffixes=frozenset({".py"}), skipped=_NOT_DOCUMENTATION):
        parts.extend(documentation_of(path.read_bytes()))
    # a docstring may spell a lone surrogate, which no UTF-8 text can hold
    return "\n\n".join(parts).encode("utf-8", "replace").decode("utf-8")


def documentation_of(source: bytes) -> list[str]:
    """A Python module's docstrings, then its whole-line comments; none where it doesn't parse."""
    try:
        text = source.decode("utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return []
    lines = (line.strip() for line in text.splitlines())
    comments = "\n".join(line.lstrip("#").strip() for line in lines if line.startswith("#"))
    return [*_docstrings(tree), *([comments] if comments.strip() else [])]


def _docstrings(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        docstring = ast.get_docstring(node)
        if docstring:
            yield docstring
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt | ast.ExceptHandler | ast.match_case):
            yield from _docstrings(child)
