"""Folders of tokens for tests, and the same tokens in memory."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from shardwise.core.errors import TextError
from shardwise.text.manifest import MANIFEST
from shardwise.text.shards import Shards
from shardwise.text.stream import TokenStream
from shardwise.text.writing import Written, write_folder

DOCUMENTS = [[5, 1, 2], [7], [3, 3, 3, 3, 9], [0, 299]]


def written(vocab_size: int = 300) -> Written:
    return Written("a test", "words", b"{}", vocab_size, end_id=None)


def arrays(documents: Sequence[Sequence[int]]) -> Iterator[NDArray[np.int32]]:
    for ids in documents:
        yield np.array(ids, dtype=np.int32)


def write(folder: Path, documents: Sequence[Sequence[int]] = DOCUMENTS, shard_tokens: int = 4) -> Path:
    write_folder(folder, arrays(documents), written(), shard_tokens)
    return folder


def whole(documents: Sequence[Sequence[int]], vocab_size: int = 300) -> TokenStream:
    """The same tokens in memory."""
    ids = [np.array(each, dtype=np.int32) for each in documents if each]
    ends = np.cumsum([each.size for each in ids], dtype=np.int64)
    return TokenStream.of(
        np.concatenate(ids), vocab_size=vocab_size, source="a test", tokenizer="words", ends=ends
    )


def change(folder: Path, **fields: Any) -> None:
    table = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(table | fields))


def shard_table(folder: Path, number: int, **fields: Any) -> list[dict[str, Any]]:
    shards: list[dict[str, Any]] = json.loads((folder / MANIFEST).read_text())["shards"]
    shards[number] |= fields
    return shards


def refused(folder: Path, vocab_size: int = 300) -> str:
    """What opening it is told."""
    with pytest.raises(TextError) as caught:
        Shards(folder, vocab_size)
    message = str(caught.value)
    assert "\n" not in message
    return message.replace(str(folder), "FOLDER")
