"""How a document's end is written: the tokenizer's end token behind it; where it has none, a line feed
behind a document that ends without one.

A tokenizer.json doesn't say which of its tokens ends a document. The user may (--end-token); else the
tokenizer_config.json beside it does (Hugging Face's eos_token); else it is the one special token that has a
usual name.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from shardwise.core.errors import TextError
from shardwise.core.shown import shown
from shardwise.text import tokenizer as bpe

CONFIG = "tokenizer_config.json"
USUAL = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]")
_LARGEST_CONFIG = 1 << 26


@dataclass(frozen=True, slots=True)
class Ending:
    """What is known of a tokenizer's end token before it is read. asked: by the user; configured: by the
    file beside it."""

    asked: str | None
    configured: str | None

    @classmethod
    def of(cls, file: Path | None, asked: str | None) -> "Ending":
        """file: the tokenizer.json, or None where one is trained."""
        return cls(asked, _configured(file.parent / CONFIG) if file is not None else None)

    def id_in(self, tokenizer: Tokenizer) -> int | None:
        """The id of the token that ends a document; None where the tokenizer has none. Raises TextError
        for a token that was asked for and isn't there."""
        if self.asked is not None:
            found = tokenizer.token_to_id(self.asked)
            if found is None:
                raise TextError(
                    f"--end-token {shown(self.asked)!r}: the tokenizer has no such token. Name one of its "
                    "tokens, or leave it out."
                )
            return int(found)
        if self.configured is not None and (found := tokenizer.token_to_id(self.configured)) is not None:
            return int(found)
        added = tokenizer.get_added_tokens_decoder()
        special = {token.content: number for number, token in added.items() if token.special}
        usual = [special[name] for name in USUAL if name in special]
        return int(usual[0]) if len(usual) == 1 else None


def ended(documents: Iterable[str], end_id: int | None) -> Iterator[str]:
    """The documents as they are encoded."""
    for text in documents:
        yield text if end_id is not None or text.endswith("\n") else f"{text}\n"


def encode_documents(
    tokenizer: Tokenizer, documents: Iterable[str], end_id: int | None, *, vocab_size: int, name: str
) -> Iterator[NDArray[np.int32]]:
    """The ids of each document with its end, one after the other. Raises TextError for an id that
    vocab_size doesn't allow."""
    tail = np.array([] if end_id is None else [end_id], dtype=np.int32)
    for text in ended(documents, end_id):
        ids = np.concatenate([bpe.encode(tokenizer, text, vocab_size=vocab_size, name=name), tail])
        bpe.check_ids(ids, vocab_size, name)
        yield ids


def _configured(path: Path) -> str | None:
    """eos_token of a tokenizer_config.json, which may be a text or an object with its content."""
    try:
        if path.stat().st_size > _LARGEST_CONFIG:
            return None
        table = msgspec.json.decode(path.read_bytes(), type=dict[str, msgspec.Raw])
        token = msgspec.json.decode(table.get("eos_token", msgspec.Raw(b"null")))
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None
