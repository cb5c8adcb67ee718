"""Which checkpoints a folder has, and which are whole.

The quick check reads the manifest and looks at the sizes of its files; the full one reads every byte. A line
says why a newer one was passed over.
"""

import re
import shutil
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from shardwise.core.errors import CheckpointError
from shardwise.core.shown import shown
from shardwise.core.training import Saved
from shardwise.train.checkpoints.form import MANIFEST, File, Manifest, read_manifest

PARTIAL, REMOVED = ".partial", ".removed"
_STEP = re.compile(r"step-(0|[1-9][0-9]{0,17})")
_NAMED = re.compile(r"step-.*")
_AT_ONCE = 16 << 20
_LARGEST_MANIFEST = 1 << 28


@dataclass(frozen=True, slots=True)
class Found:
    """The newest checkpoint that is whole. path, manifest: None where there is none. passed_over: a line for
    each newer one that isn't; checked: whether every byte was read."""

    path: Path | None = None
    manifest: Manifest | None = None
    passed_over: tuple[str, ...] = ()
    checked: bool = False

    @property
    def saved(self) -> Saved | None:
        return self.manifest.saved if self.manifest is not None else None


def folder_of(step: int) -> str:
    return f"step-{step}"


def find(folder: Path, *, full: bool = True) -> Found:
    """The newest published and whole checkpoint in a folder. full: all bytes are read; else sizes are looked
    at."""
    passed_over: list[str] = []
    for path, problem, manifest in candidates(folder):
        if manifest is not None and full:
            problem = next(filter(None, (damage(path, file) for file in manifest.files)), None)
        if manifest is None or problem is not None:
            passed_over.append(f"{path.name}: {problem}.")
            continue
        return Found(path, manifest, tuple(passed_over), full)
    return Found(passed_over=tuple(passed_over))


def candidates(folder: Path) -> Iterator[tuple[Path, str | None, Manifest | None]]:
    """What is called a checkpoint, newest first: its manifest where the quick check finds no fault, else what
    is wrong."""
    for path in sorted(_named(folder), key=_newest_first):
        try:
            yield path, None, looked_at(path)
        except CheckpointError as error:
            yield path, str(error), None


def _named(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if _NAMED.fullmatch(path.name)]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(
            f"checkpoints {folder}: {error.strerror}. Choose a folder that can be read."
        ) from None


def _newest_first(path: Path) -> tuple[int, str]:
    number = re.match(r"step-([0-9]{1,18})", path.name)
    return (-int(number[1]) if number else 1, path.name)


def step_of(path: Path) -> int | None:
    """None for what isn't published."""
    found = _STEP.fullmatch(path.name)
    return int(found[1]) if found else None


def looked_at(path: Path) -> Manifest:
    """The quick check of one. Raises CheckpointError, whose text is what is wrong."""
    if path.name.endswith(PARTIAL):
        raise CheckpointError("half-written: it was never published")
    if path.name.endswith(REMOVED):
        raise CheckpointError("half-removed")
    step = step_of(path)
    if step is None or not path.is_dir() or path.is_symlink():
        raise CheckpointError("is no folder that Shardwise named")
    try:
        if not stat.S_ISREG((path / MANIFEST).lstat().st_mode):
            raise CheckpointError(f"{MANIFEST} is no plain file")
        with (path / MANIFEST).open("rb") as opened:
            document = opened.read(_LARGEST_MANIFEST)
    except FileNotFoundError:
        raise CheckpointError(f"has no {MANIFEST}: nothing that Shardwise published") from None
    except OSError as error:
        raise CheckpointError(f"{MANIFEST} can't be read: {error.strerror}") from None
    manifest = read_manifest(document)
    if manifest.saved.step != step:
        raise CheckpointError(f"says that it is of step {manifest.saved.step}")
    for file in manifest.files:
        problem = misfit(path, file)
        if problem is not None:
            raise CheckpointError(problem)
    return manifest


def misfit(path: Path, file: File) -> str | None:
    """What is wrong with a file, as far as its size tells."""
    try:
        found = (path / file.name).lstat()
    except FileNotFoundError:
        return f"{file.name} is missing"
    except OSError as error:
        return f"{file.name} can't be read: {error.strerror}"
    if not stat.S_ISREG(found.st_mode):
        return f"{file.name} is no plain file"
    if found.st_size != file.size:
        how = "truncated" if found.st_size < file.size else "changed"
        return f"{file.name} was {how}: {found.st_size:,} bytes, {file.size:,} were written"
    return None


def damage(path: Path, file: File) -> str | None:
    """What is wrong with a file, all of which is read."""
    digest = sha256()
    try:
        with (path / file.name).open("rb", buffering=0) as opened:
            while part := opened.read(_AT_ONCE):
                digest.update(part)
    except OSError as error:
        return f"{file.name} can't be read: {shown(error.strerror)}"
    if digest.hexdigest() != file.sha256:
        return f"{file.name} was changed: its bytes aren't those that were written"
    return misfit(path, file)


def remove_beyond(folder: Path, keep: int) -> None:
    """Removes whole checkpoints but the newest `keep`, and what is older than those. Raises OSError."""
    whole = 0
    for path, _, manifest in list(candidates(folder)):
        if whole >= max(1, keep) and step_of(path) is not None:
            remove(path)
        whole += manifest is not None


def remove(path: Path) -> None:
    """Under another name first: half of one must not be taken for a checkpoint."""
    aside = path.with_name(path.name + REMOVED)
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
    shutil.rmtree(aside)
