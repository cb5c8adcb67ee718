"""The text room's fourth stage: a stream of token ids with its summary, cached between runs.

A stream's bytes are one line of JSON (core's TextSummary, and a digest of where documents end), then
where documents end as little-endian int64, then the ids as little-endian int32. That is the cache's file
format and what rank 0 sends to the other ranks; it holds no pickle, and reading it checks everything that
the summary claims. The cache only saves time: a file that is damaged is made anew, a directory that can't
be written is done without."""

import hashlib
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from shardwise.core.errors import OptionError, TextError
from shardwise.core.measurement import TextSummary
from shardwise.text import corpus
from shardwise.text import tokenizer as bpe
from shardwise.text.documents import TEXT_KEY, shown
from shardwise.text.ends import Ending, encode_documents
from shardwise.text.tokens import digest_of_ends

RANDOM_TOKENS = 1 << 20
LARGEST_VOCAB = 2**31 - 1
# counts changes to the built-in text and to how text is cut into pieces: they change the ids, and old cache
# files must not be found
_RECIPE = 2


def _none() -> NDArray[np.int64]:
    """No ends."""
    return np.zeros(0, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class TokenStream:
    """Token ids in order, 1-D int32 and read-only, with a summary that is known to be true of them. Equal
    by summary: it has the digest. ends: where documents end, the place after each one's last token; none
    given: all is one document."""

    ids: NDArray[np.int32] = field(compare=False, repr=False)
    summary: TextSummary
    ends: NDArray[np.int64] = field(default_factory=_none, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.ids.dtype != np.int32 or self.ids.ndim != 1:
            raise TextError(f"token ids are {self.ids.ndim}-D {self.ids.dtype}. Give a 1-D int32 array.")
        if not self.ids.size:
            raise TextError(
                f"{self.summary.source} gives no tokens with tokenizer {self.summary.tokenizer}. "
                "Give more text."
            )
        vocab_size = self.summary.vocab_size
        smallest, largest = int(self.ids.min()), int(self.ids.max())
        if smallest < 0 or largest >= vocab_size:
            raise TextError(
                f"token ids run from {smallest} to {largest}. "
                f"vocab_size={vocab_size} allows 0 to {vocab_size - 1}."
            )
        facts = (self.ids.size, _distinct(self.ids), _digest(self.ids))
        if facts != (self.summary.tokens, self.summary.distinct_ids, self.summary.digest):
            raise TextError(
                "token ids don't match their summary: another count or digest. Make the stream anew."
            )
        ends = self.ends if self.ends.size else np.array([self.ids.size], dtype=np.int64)
        is_whole = ends[-1] == self.ids.size and ends[0] > 0 and bool((np.diff(ends) > 0).all())
        if not is_whole or ends.size != self.summary.documents:
            raise TextError("the documents' ends don't match the token ids. Make the stream anew.")
        for name, values in (("ids", self.ids), ("ends", ends)):
            frozen = values.view()
            frozen.flags.writeable = False
            object.__setattr__(self, name, frozen)

    @classmethod
    def of(
        cls,
        ids: NDArray[np.int32],
        *,
        vocab_size: int,
        source: str,
        tokenizer: str,
        ends: NDArray[np.int64] | None = None,
    ) -> "TokenStream":
        """The stream of these ids, summed up here."""
        ends = _none() if ends is None else ends
        counts = ids.size, _distinct(ids), vocab_size, _digest(ids), max(1, ends.size)
        return cls(ids, TextSummary(source, tokenizer, *counts), ends)

    @property
    def documents_digest(self) -> str:
        """See Tokens."""
        return digest_of_ends(self.ends)

    def read(self, starts_N: NDArray[np.int64], length: int) -> NDArray[np.int64]:
        """See Tokens."""
        places_NL = starts_N[:, None] + np.arange(length)
        ids_NL: NDArray[np.int64] = self.ids[places_NL].astype(np.int64)
        return ids_NL

    def ends_between(self, first: int, last: int) -> NDArray[np.int64]:
        """See Tokens."""
        low, high = np.searchsorted(self.ends, (first, last))
        return self.ends[low:high]

    def is_of(self, source: str, tokenizer: str, vocab_size: int) -> bool:
        summary = self.summary
        return (summary.source, summary.tokenizer, summary.vocab_size) == (source, tokenizer, vocab_size)

    def to_bytes(self) -> bytes:
        head = msgspec.json.encode(_Head(self.summary, self.documents_digest))
        ends, ids = self.ends.astype("<i8", copy=False), self.ids.astype("<i4", copy=False)
        return b"".join([head, b"\n", ends.tobytes(), ids.tobytes()])

    @classmethod
    def from_bytes(cls, content: bytes) -> "TokenStream":
        """The stream that `to_bytes` wrote; TextError for anything else."""
        # JSON escapes newlines, so the first one ends the head
        line, _, body = content.partition(b"\n")
        try:
            head = msgspec.json.decode(line, type=_Head)
            at = 8 * head.summary.documents
            ends = np.frombuffer(body[:at], dtype="<i8").astype(np.int64, copy=False)
            if digest_of_ends(ends) != head.documents_digest:
                raise TextError("the documents' ends don't match their digest. Make the stream anew.")
            ids = np.frombuffer(body[at:], dtype="<i4").astype(np.int32, copy=False)
            return cls(ids, head.summary, ends)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise TextError(f"bytes are no token stream: {error}. Make the stream anew.") from None


@dataclass(frozen=True, slots=True)
class _Head:
    """The first line of a stream's bytes."""

    summary: TextSummary
    documents_digest: str


def load_tokens(
    *,
    vocab_size: int,
    files: Sequence[Path] = (),
    tokenizer: Path | None = None,
    text_key: str = TEXT_KEY,
    end_token: str | None = None,
    random_ids: bool = False,
    seed: int = 0,
    cache: Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> TokenStream:
    """Ids below vocab_size of the text in files, or of the built-in corpus; or uniform random ids (only
    they use the seed).

    tokenizer: a tokenizer.json; without one, byte-level BPE is trained on the text. text_key: of records,
    what holds their text. end_token: which of the tokenizer's tokens ends a document (see ends.py).
    cache: the directory of the cache, or None for the user's own. progress is called with a line for each
    stage that takes time. TextError or OptionError for what can't be used."""
    if not 1 <= vocab_size <= LARGEST_VOCAB:
        raise OptionError(f"vocab_size is {vocab_size}. Use 1 to {LARGEST_VOCAB}.")
    if random_ids:
        if files or tokenizer is not None:
            raise OptionError(
                "random ids come without text. Leave out the text files and the tokenizer, or the random ids."
            )
        return _random_stream(vocab_size, seed)
    say = progress or _silent
    given = corpus.load_text(files, text_key) if files else None
    source = given.source if given else corpus.STDLIB_SOURCE
    definition = None if tokenizer is None else bpe.read_file(tokenizer)
    ending = Ending.of(tokenizer, end_token)
    name = f"byte-level BPE trained on this text (tokenizers {bpe.TOKENIZERS_VERSION})"
    if tokenizer is not None:
        name = shown(tokenizer)
    # sys.version stands for the built-in text, so that a cached run reads no source
    documents = given.documents if given else (sys.version,)
    parts = source, str(vocab_size), name, bpe.TOKENIZERS_VERSION, definition or b""
    key = _key(*parts, str(ending), *documents)
    directory = cache or _user_cache()
    entry = None if directory is None else directory / f"{key}.tokens"
    cached = None if entry is None else _cached(entry)
    if cached is not None and cached.is_of(source, name, vocab_size):
        return cached
    if given is None:
        say(f"reading the {source}")
        given = corpus.load_text()
    stream = _made(given, definition, ending, name, vocab_size, say)
    if entry is not None:
        try:
            _store(entry, stream.to_bytes())
        except OSError as error:
            say(f"the tokens can't be cached ({error.strerror}), so the next run makes them again")
    return stream


def _made(
    given: corpus.Corpus,
    definition: bytes | None,
    ending: Ending,
    name: str,
    vocab_size: int,
    say: Callable[[str], None],
) -> TokenStream:
    """definition: of a tokenizer; without one, it is trained on the text."""
    size = f"{sum(map(len, given.documents)) / 1e6:.1f} million characters"
    if definition is None:
        say(f"training a tokenizer of {vocab_size} ids on {size}")
        tokenizer = bpe.train(given.documents, vocab_size)
    else:
        tokenizer = bpe.parse(definition, name)
    say(f"encoding {size}")
    end_id = ending.id_in(tokenizer)
    parts = list(encode_documents(tokenizer, given.documents, end_id, vocab_size=vocab_size, name=name))
    ends = np.cumsum([part.size for part in parts], dtype=np.int64)
    # a document that gives no tokens is none
    ends = np.unique(ends[ends > 0])
    ids = np.concatenate(parts)
    return TokenStream.of(ids, vocab_size=vocab_size, source=given.source, tokenizer=name, ends=ends)


def _random_stream(vocab_size: int, seed: int) -> TokenStream:
    if seed < 0:
        raise OptionError(f"the seed of random ids is {seed}. Use 0 or more.")
    ids = np.random.default_rng(seed).integers(0, vocab_size, RANDOM_TOKENS, dtype=np.int32)
    return TokenStream.of(
        ids, vocab_size=vocab_size, source=f"uniform random ids, seed {seed}", tokenizer="none"
    )


def _silent(line: str) -> None:
    """Says nothing."""


def _distinct(ids: NDArray[np.int32]) -> int:
    return int(np.unique(ids).size)


def _digest(ids: NDArray[np.int32]) -> str:
    """blake2b, 16 bytes in hex, of the ids as little-endian int32."""
    return hashlib.blake2b(ids.astype("<i4", copy=False).tobytes(), digest_size=16).hexdigest()


def _key(*parts: str | bytes) -> str:
    """One digest of all parts; each is hashed by itself first, so that no two lists of parts run
    together."""
    whole = hashlib.blake2b(str(_RECIPE).encode(), digest_size=16)
    for part in parts:
        whole.update(hashlib.blake2b(part.encode("utf-8") if isinstance(part, str) else part).digest())
    return whole.hexdigest()


def _user_cache() -> Path | None:
    """$XDG_CACHE_HOME/shardwise or ~/.cache/shardwise; None for a user without a home."""
    configured = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if configured.is_absolute():
        return configured / "shardwise"
    try:
        return Path.home() / ".cache" / "shardwise"
    except RuntimeError:
        return None


def _cached(entry: Path) -> TokenStream | None:
    try:
        return TokenStream.from_bytes(entry.read_bytes())
    except (OSError, TextError):
        return None


def _store(entry: Path, content: bytes) -> None:
    """Writes the whole file or none: beside its place first, then moved there."""
    entry.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=entry.parent, ignore_cleanup_errors=True) as folder:
        unfinished = Path(folder, entry.name)
        unfinished.write_bytes(content)
        os.replace(unfinished, entry)
