"""What a folder of written tokens says of itself: its manifest, valid from birth, and what it may name.

A folder holds `shardwise-tokens.json` (the manifest), `shard-00000.bin` and so on (token ids,
little-endian uint16 or uint32), `documents.bin` (where documents end, little-endian int64: the place
after each one's last token) and `tokenizer.json`. Nothing in it is code or a pickle, and whatever it says
is checked: a manifest may come from anywhere."""

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

import msgspec

from shardwise.core.errors import TextError
from shardwise.core.shown import shown
from shardwise.text.documents import shown as shown_path
from shardwise.text.stream import LARGEST_VOCAB

FORMAT = 1
MANIFEST, ENDS, TOKENIZER = "shardwise-tokens.json", "documents.bin", "tokenizer.json"
ID_BYTES = {"uint16": 2, "uint32": 4}
END_BYTES = 8
_LARGEST_MANIFEST = 1 << 26
_MOST_TOKENS = 1 << 60
_DIGEST = re.compile("[0-9a-f]{32}")
AGAIN = "Write the folder anew with shardwise tokens."


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.bin"


@dataclass(frozen=True, slots=True)
class Shard:
    """A file of ids, with the digest of its bytes."""

    name: str
    tokens: int
    digest: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """digest: of all ids in their order as little-endian int32, as a TokenStream has it;
    documents_digest: of documents.bin; all digests are blake2b, 16 bytes in hex. vocab_size: of the
    tokenizer; largest_id: of those that occur; end_id: what stands behind each document, None where
    nothing does."""

    format: int
    source: str
    tokenizer: str
    tokenizer_digest: str
    vocab_size: int
    end_id: int | None
    dtype: str
    tokens: int
    distinct_ids: int
    largest_id: int
    digest: str
    documents: int
    documents_digest: str
    shards: tuple[Shard, ...]

    def __post_init__(self) -> None:
        """Raises ValueError, which says what is wrong and what is allowed."""
        if self.format != FORMAT:
            raise ValueError(f"format is {self.format}, and this Shardwise reads {FORMAT}")
        if self.dtype not in ID_BYTES:
            raise ValueError(f"dtype is {shown(self.dtype)!r}, and ids are {' or '.join(ID_BYTES)}")
        most_ids = min(LARGEST_VOCAB, 1 << 8 * ID_BYTES[self.dtype])
        for name, value, least, most in (
            ("vocab_size", self.vocab_size, 1, most_ids),
            ("largest_id", self.largest_id, 0, self.vocab_size - 1),
            ("end_id", 0 if self.end_id is None else self.end_id, 0, self.vocab_size - 1),
            ("tokens", self.tokens, 1, _MOST_TOKENS),
            ("distinct_ids", self.distinct_ids, 1, self.largest_id + 1),
            ("documents", self.documents, 1, self.tokens),
        ):
            if not least <= value <= most:
                raise ValueError(f"{name} is {value}, and {least} to {most} is allowed")
        for number, shard in enumerate(self.shards):
            if shard.name != shard_name(number):
                raise ValueError(
                    f"shard {number} is named {shown(shard.name)!r}, and files lie in the folder itself: "
                    f"it must be {shard_name(number)}"
                )
            if not 1 <= shard.tokens <= self.tokens:
                raise ValueError(f"{shard.name} has {shard.tokens} tokens of {self.tokens}")
        if (of_shards := sum(shard.tokens for shard in self.shards)) != self.tokens:
            raise ValueError(f"tokens is {self.tokens}, and the shards have {of_shards}")
        digests = self.digest, self.documents_digest, self.tokenizer_digest
        for digest in (*digests, *(shard.digest for shard in self.shards)):
            if not _DIGEST.fullmatch(digest):
                raise ValueError(f"{shown(digest, 40)!r} is no digest: 32 digits of hex")

    @property
    def id_bytes(self) -> int:
        """Of one id."""
        return ID_BYTES[self.dtype]

    def sizes(self) -> dict[str, int]:
        """The bytes that each file of ids and of documents' ends must have, by its name."""
        sizes = {shard.name: shard.tokens * self.id_bytes for shard in self.shards}
        return sizes | {ENDS: self.documents * END_BYTES}


def is_token_folder(path: Path) -> bool:
    """Whether `shardwise tokens` wrote it, by its manifest."""
    return os.path.lexists(path / MANIFEST)


def read_manifest(folder: Path) -> Manifest:
    """The folder's, with every file that it names there, itself and no link, and of the size that it says.
    Raises TextError, which names the file, what it is, what is allowed and what to do."""
    path = folder / MANIFEST
    size = size_of(path)
    if size > _LARGEST_MANIFEST:
        raise TextError(
            f'"{shown_path(path)}" has {size} bytes, and a manifest has at most {_LARGEST_MANIFEST}. {AGAIN}'
        )
    with os.fdopen(open_file(path), "rb") as file:
        content = file.read(size)
    try:
        manifest = msgspec.json.decode(content, type=Manifest)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise TextError(
            f'"{shown_path(path)}" is no manifest of tokens: {shown(error, 240)}. {AGAIN}'
        ) from None
    for name, wanted in manifest.sizes().items():
        has = size_of(folder / name)
        if has != wanted:
            raise TextError(
                f'"{shown_path(folder / name)}" has {has} bytes, and the manifest says {wanted}. Copy the '
                "file again whole, or write the folder anew with shardwise tokens."
            )
    return manifest


def size_of(path: Path) -> int:
    """Of a file that is one itself. Raises TextError for a link, and for what can't be read."""
    try:
        found = path.lstat()
    except OSError as error:
        raise unreadable(path, error) from None
    if stat.S_ISREG(found.st_mode):
        return found.st_size
    what = "a link" if stat.S_ISLNK(found.st_mode) else "no file"
    raise TextError(
        f'"{shown_path(path)}" is {what}, and a folder of tokens holds files alone, so that nothing else is '
        "read. Put the file itself there."
    )


def open_file(path: Path) -> int:
    """Its file descriptor, for reading. Raises TextError for a link, and for what can't be read."""
    try:
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise unreadable(path, error) from None


def unreadable(path: Path, error: OSError) -> TextError:
    reason = "doesn't exist" if isinstance(error, FileNotFoundError) else f"can't be read: {error.strerror}"
    return TextError(f'"{shown_path(path)}" {reason}. Copy the folder again whole, or write it anew.')
