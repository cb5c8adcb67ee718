"""The text that a case names -> tokens, in memory or written; and how they go to other ranks.

What is in memory is sent whole; of written tokens only where they lie and what they must be: each rank
reads them itself."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from shardwise.core.case import TextSource
from shardwise.core.errors import OptionError, TextError
from shardwise.text import tokenizer as bpe
from shardwise.text.documents import shown
from shardwise.text.manifest import is_token_folder
from shardwise.text.shards import Shards
from shardwise.text.stream import TokenStream, load_tokens
from shardwise.text.tokens import Tokens
from shardwise.text.writing import digest_of

_WRITTEN = b"written "


def why_no_text(text: TextSource, vocab_size: int) -> str | None:
    """Why ids are random though nobody asked for that; None where they aren't. For text files that the user
    names there is no way out: load_tokens() says what it needs."""
    if text.random_ids or text.files or text.tokenizer is not None or vocab_size >= bpe.BYTE_ALPHABET:
        return None
    has = f"and the model has {vocab_size}"
    return f"Token ids are random: a tokenizer of bytes needs {bpe.BYTE_ALPHABET} ids, {has}."


def tokens_of(
    text: TextSource, vocab_size: int, seed: int, progress: Callable[[str], None]
) -> TokenStream | Shards:
    """The text as ids below vocab_size; random ones where why_no_text() has a reason. Raises TextError and
    OptionError."""
    if any(is_token_folder(Path(name)) for name in text.files):
        return _written(text, vocab_size)
    if (why := why_no_text(text, vocab_size)) is not None:
        progress(why)
        text = TextSource(random_ids=True)
    return load_tokens(
        vocab_size=vocab_size,
        files=[Path(name) for name in text.files],
        tokenizer=None if text.tokenizer is None else Path(text.tokenizer),
        text_key=text.text_key,
        end_token=text.end_token,
        random_ids=text.random_ids,
        seed=seed,
        progress=progress,
    )


def to_bytes(tokens: TokenStream | Shards) -> bytes:
    """For `from_bytes` on another rank."""
    if isinstance(tokens, TokenStream):
        return tokens.to_bytes()
    manifest = tokens.manifest
    folder = os.fsencode(tokens.folder.absolute())
    there = _There(folder, tokens.summary.vocab_size, manifest.digest, manifest.documents_digest)
    return _WRITTEN + msgspec.json.encode(there)


def from_bytes(content: bytes) -> Tokens:
    """What `to_bytes` was of. Raises TextError where this rank finds other tokens in the folder, or
    none."""
    if not content.startswith(_WRITTEN):
        return TokenStream.from_bytes(content)
    try:
        there = msgspec.json.decode(content.removeprefix(_WRITTEN), type=_There)
    except msgspec.MsgspecError as error:
        raise TextError(f"bytes are no tokens: {error}.") from None
    shards = Shards(Path(os.fsdecode(there.folder)), there.vocab_size)
    has = shards.manifest
    if (has.digest, has.documents_digest) != (there.digest, there.documents_digest):
        raise TextError(
            f"{shown(shards.folder)} holds other tokens on this host than on the first one's. Copy the "
            "folder to all hosts, or name one that they share."
        )
    return shards


@dataclass(frozen=True, slots=True)
class _There:
    """Where tokens are written, and what they must be."""

    folder: bytes
    vocab_size: int
    digest: str
    documents_digest: str


def _written(text: TextSource, vocab_size: int) -> Shards:
    folder = Path(text.files[0])
    if len(text.files) > 1:
        raise OptionError(
            f"--text {shown(folder)} and more: a folder that shardwise tokens wrote is read alone. Write one "
            "folder of all the files."
        )
    if text.end_token is not None:
        raise OptionError(
            f"--end-token: {shown(folder)} is written already, with the end token that it has. Leave it out."
        )
    shards = Shards(folder, vocab_size)
    if text.tokenizer is not None:
        given = Path(text.tokenizer)
        if digest_of(bpe.read_file(given)) != shards.manifest.tokenizer_digest:
            raise OptionError(
                f"--tokenizer {shown(given)}: {shown(folder)} was written with another one, which it holds. "
                "Leave it out."
            )
    return shards
