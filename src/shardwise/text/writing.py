"""Documents' ids -> a folder of shards, whole or not at all.

The folder is made beside its place, as FOLDER.partial, each file of it flushed to the disk; its manifest
comes last, and then it is renamed. What interrupts that leaves no FOLDER, and a FOLDER.partial that
nothing reads: the next run removes it and begins anew. A lock keeps two runs from writing into one."""

import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import msgspec
import numpy as np
from numpy.typing import NDArray

from shardwise.core.errors import OptionError, RunError, TextError
from shardwise.text.documents import shown
from shardwise.text.manifest import ENDS, FORMAT, MANIFEST, TOKENIZER, Manifest, Shard, shard_name
from shardwise.text.stream import LARGEST_VOCAB

SHARD_TOKENS = 1 << 27
_LOCK = "lock"
_OURS = re.compile(rf"shard-\d+\.bin|{re.escape(ENDS)}|{re.escape(TOKENIZER)}|{re.escape(MANIFEST)}|{_LOCK}")


@dataclass(frozen=True, slots=True)
class Written:
    """What the writer can't tell from ids. tokenizer: in words; definition: its tokenizer.json."""

    source: str
    tokenizer: str
    definition: bytes
    vocab_size: int
    end_id: int | None

    @property
    def dtype(self) -> str:
        return "uint16" if self.vocab_size <= 1 << 16 else "uint32"


def digest_of(content: bytes) -> str:
    return _hash(content).hexdigest()


def check_new(folder: Path) -> None:
    """Raises OptionError where something is there already, or can't be made: before time is spent."""
    try:
        is_there = os.path.lexists(folder) and not (folder.is_dir() and not any(folder.iterdir()))
    except OSError as error:
        raise OptionError(f"--out {shown(folder)}: {error.strerror}. Name another folder.") from None
    if is_there:
        raise OptionError(
            f"--out {shown(folder)}: is there already, and nothing is written over. Name another folder, or "
            "remove it."
        )
    if not os.access(folder.parent, os.W_OK | os.X_OK):
        what = "can't be written" if folder.parent.is_dir() else "is no folder"
        raise OptionError(f"--out {shown(folder)}: {shown(folder.parent)} {what}. Name another folder.")


def write_folder(
    folder: Path, documents: Iterable[NDArray[np.int32]], what: Written, shard_tokens: int = SHARD_TOKENS
) -> Manifest:
    """Writes each document's ids as it comes. Raises OptionError where the folder is there, TextError where
    there are no tokens, RunError where the disk is full or fails."""
    assert 1 <= what.vocab_size <= LARGEST_VOCAB, what.vocab_size
    check_new(folder)
    partial = folder.with_name(f"{folder.name}.partial")
    try:
        with _locked(partial):
            _write_file(partial / TOKENIZER, what.definition)
            writing = _Writing(partial, what, shard_tokens)
            try:
                for ids in documents:
                    writing.add(ids)
                manifest = writing.manifest()
            finally:
                writing.close()
            _write_file(
                partial / MANIFEST, msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n"
            )
            (partial / _LOCK).unlink()
            _sync(partial)
            partial.rename(folder)
            _sync(folder.parent)
            return manifest
    except OSError as error:
        raise RunError(
            f"--out {shown(folder)}: can't be written: {error.strerror or error}; nothing of it was left. "
            "Free space there, or name another folder."
        ) from None


class _Writing:
    """Files under way: a shard, and the documents' ends."""

    def __init__(self, folder: Path, what: Written, shard_tokens: int) -> None:
        self.folder, self.what, self.shard_tokens = folder, what, shard_tokens
        self.shards: list[Shard] = []
        self.tokens = self.documents = self.in_shard = 0
        self.seen = np.zeros(what.vocab_size, dtype=np.bool_)
        self.digest, self.shard_digest, self.ends_digest = _hash(), _hash(), _hash()
        self.ends = (folder / ENDS).open("wb")
        self.shard: IO[bytes] | None = None

    def add(self, ids: NDArray[np.int32]) -> None:
        """A document; one without ids is none."""
        if not ids.size:
            return
        self.seen[ids] = True
        self.digest.update(ids.astype("<i4", copy=False).tobytes())
        self.tokens += ids.size
        self.documents += 1
        end = self.tokens.to_bytes(8, "little", signed=True)
        self.ends.write(end)
        self.ends_digest.update(end)
        while ids.size:
            part, ids = np.split(ids, [self.shard_tokens - self.in_shard])
            self._append(part)

    def manifest(self) -> Manifest:
        """Of all that was added, once it is on the disk."""
        if not self.tokens:
            raise TextError(
                f"{self.what.source} gives no tokens with tokenizer {self.what.tokenizer}. Give more text."
            )
        self._finish_shard()
        _flush(self.ends)
        what = self.what
        return Manifest(
            format=FORMAT,
            source=what.source,
            tokenizer=what.tokenizer,
            tokenizer_digest=digest_of(what.definition),
            vocab_size=what.vocab_size,
            end_id=what.end_id,
            dtype=what.dtype,
            tokens=self.tokens,
            distinct_ids=int(self.seen.sum()),
            largest_id=int(np.flatnonzero(self.seen)[-1]),
            digest=self.digest.hexdigest(),
            documents=self.documents,
            documents_digest=self.ends_digest.hexdigest(),
            shards=tuple(self.shards),
        )

    def close(self) -> None:
        for file in (self.ends, self.shard):
            if file is not None:
                with suppress(OSError):
                    file.close()

    def _append(self, ids: NDArray[np.int32]) -> None:
        if self.shard is None:
            self.shard, self.shard_digest = (self.folder / shard_name(len(self.shards))).open("wb"), _hash()
        content = ids.astype(np.dtype(self.what.dtype).newbyteorder("<")).tobytes()
        self.shard.write(content)
        self.shard_digest.update(content)
        self.in_shard += ids.size
        if self.in_shard == self.shard_tokens:
            self._finish_shard()

    def _finish_shard(self) -> None:
        if self.shard is None:
            return
        _flush(self.shard)
        self.shard.close()
        self.shards.append(Shard(shard_name(len(self.shards)), self.in_shard, self.shard_digest.hexdigest()))
        self.shard, self.in_shard = None, 0


@contextmanager
def _locked(partial: Path) -> Iterator[None]:
    """An empty FOLDER.partial of this run's alone; it is removed where the run fails."""
    partial.mkdir(exist_ok=True)
    strangers = [entry.name for entry in partial.iterdir() if not _OURS.fullmatch(entry.name)]
    if strangers:
        raise OptionError(
            f"--out: {shown(partial)} holds {shown(Path(sorted(strangers)[0]))}, which shardwise tokens "
            "hasn't written. Move the folder away, or name another --out."
        )
    with (partial / _LOCK).open("wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OptionError(
                f"--out: another run writes {shown(partial)}. Wait for it, or name another --out."
            ) from None
        try:
            for entry in partial.iterdir():
                if entry.name != _LOCK:
                    entry.unlink()
            yield
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def _write_file(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        _flush(file)


def _flush(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """A folder's entries to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _hash(content: bytes = b"") -> "hashlib.blake2b":
    return hashlib.blake2b(content, digest_size=16)
