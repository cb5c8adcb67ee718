"""The text room's third stage: a byte-level BPE tokenizer, trained on the text itself or read from a
tokenizer.json.

Training is deterministic: the `tokenizers` library breaks ties between equally frequent pairs by their ids,
and processes with different hash seeds and thread counts gave the same tokenizer, byte for byte (tokenizers
0.23.3; the unit tests repeat it). Both stages feed the text in the same pieces, cut at line ends, so that
memory stays small. Special tokens are never added, padding and truncation are off.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from shardwise.core.errors import TextError
from shardwise.text.documents import shown

BYTE_ALPHABET = 256
TOKENIZERS_VERSION: str = tokenizers.__version__
_PIECE_CHARACTERS = 1 << 16


def train(text: str | Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer of one text or of documents, with at most vocab_size ids, fewer where they
    have no more pairs to merge. Nothing is unknown to it."""
    if vocab_size < BYTE_ALPHABET:
        raise TextError(
            f"a byte-level tokenizer needs at least {BYTE_ALPHABET} ids, and the model has "
            f"vocab_size={vocab_size}. "
            f"Use a model with vocab_size >= {BYTE_ALPHABET}, a tokenizer.json of your own, or random ids."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    with _single_threaded():
        documents = (text,) if isinstance(text, str) else text
        tokenizer.train_from_iterator((piece for each in documents for piece in _pieces(each)), trainer)
    return tokenizer


def read_file(path: Path) -> bytes:
    """The bytes of a tokenizer.json, for `parse` and for a digest of exactly what is parsed."""
    try:
        return path.read_bytes()
    except OSError as error:
        problem = f"can't be read: {error.strerror}"
        if isinstance(error, FileNotFoundError):
            problem = "doesn't exist"
        raise TextError(
            f'tokenizer file "{shown(path)}" {problem}. Give a tokenizer.json of the `tokenizers` library.'
        ) from None


def parse(content: bytes, name: str) -> Tokenizer:
    """The tokenizer that a tokenizer.json describes. It is data: no code of the file's author runs."""
    try:
        tokenizer: Tokenizer = Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises ValueError or a bare Exception
        reason = " ".join(str(error).removeprefix("Cannot instantiate Tokenizer from buffer: ").split())
        raise TextError(
            f'tokenizer file "{name}" is not a tokenizer.json: {reason}. '
            "Give one of the `tokenizers` library."
        ) from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def encode(tokenizer: Tokenizer, text: str, *, vocab_size: int, name: str) -> NDArray[np.int32]:
    """The ids of the whole text, 1-D, all below vocab_size."""
    parts: list[NDArray[np.uint32]] = []
    with _single_threaded():
        for piece in _pieces(text):
            try:
                # encode_batch_fast leaves out the offsets
                encoded = tokenizer.encode_batch_fast([piece], add_special_tokens=False)
            except Exception as error:  # the library raises a bare Exception
                reason = " ".join(str(error).split())
                raise TextError(
                    f'tokenizer "{name}" can\'t encode the text: {reason}. '
                    "Use one that covers all characters."
                ) from None
            parts.append(np.array(encoded[0].ids, dtype=np.uint32))
    ids = np.concatenate(parts) if parts else np.zeros(0, dtype=np.uint32)
    check_ids(ids, vocab_size, name)
    return ids.astype(np.int32)


def check_ids(ids: NDArray[np.uint32] | NDArray[np.int32], vocab_size: int, name: str) -> None:
    """Raises TextError where an id is beyond the model's vocabulary."""
    largest = int(ids.max(initial=0))
    if largest >= vocab_size:
        raise TextError(
            f'tokenizer "{name}" yields id {largest}, and the model has vocab_size={vocab_size} (ids 0 to '
            f"{vocab_size - 1}). "
            f"Use the model's own tokenizer, or a model with vocab_size >= {largest + 1}."
        )


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        end = start + _PIECE_CHARACTERS
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        yield text[start:end]
        start = end


@contextmanager
def _single_threaded() -> Iterator[None]:
    """Keeps the library's thread pool unstarted: Python or the library may warn of it at a later fork, and
    one thread is as fast here."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before
