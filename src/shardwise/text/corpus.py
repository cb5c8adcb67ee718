"""The text room's second stage: documents in memory: those of files, or the standard library's own
documentation, which is one.

The built-in corpus is every topic of pydoc_data.topics, then the docstrings and whole-line comments of the
standard library's modules, parsed from their source and never imported. It is the same wherever sys.version
is the same. It is what lets Shardwise run on real text without a download; CPython 3.11 has 3.1 MB of it.
"""

import ast
import sys
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from shardwise.core.errors import TextError
from shardwise.text.documents import TEXT_KEY, documents_of, files_below, names_of

STDLIB_SOURCE = f"Python {sys.version.split()[0]} standard library: its topics, docstrings and comments"

# pydoc_data's text is taken by import; the modules of encodings are generated tables
_NOT_DOCUMENTATION = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data"}
)


@dataclass(frozen=True, slots=True)
class Corpus:
    """Documents, none of them empty, and where they came from in words."""

    documents: tuple[str, ...]
    source: str

    def __post_init__(self) -> None:
        if not any(text.strip() for text in self.documents):
            raise TextError(f"{self.source} holds no text, only blanks. Give files with text in them.")

    @property
    def text(self) -> str:
        """All of it, a line feed between documents."""
        return "\n".join(self.documents)


def load_text(files: Sequence[Path] = (), text_key: str = TEXT_KEY) -> Corpus:
    """The documents of files and directories in the order given, or the built-in corpus, which is one, for
    none."""
    if not files:
        return Corpus((_stdlib_text(),), STDLIB_SOURCE)
    return Corpus(tuple(documents_of(files, text_key)), names_of(files))


def _stdlib_text() -> str:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise TextError(
            "this Python comes without its documentation (pydoc_data). Give text files instead."
        ) from None
    parts = [topics[name] for name in sorted(topics)]
    stdlib = Path(sysconfig.get_path("stdlib"))
    for path in files_below(stdlib, suffixes=frozenset({".py"}), skipped=_NOT_DOCUMENTATION):
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
