"""A folder of written tokens, read whole and held against its manifest."""

import hashlib
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from shardwise.core.errors import TextError
from shardwise.core.shown import shown
from shardwise.text.manifest import END_BYTES, ENDS, TOKENIZER, Manifest, size_of
from shardwise.text.shards import Shards

_PIECE_BYTES = 1 << 24
_LARGEST_TOKENIZER = 1 << 30


def problems_of(shards: Shards, progress: Callable[[str, int, int], None]) -> Iterator[str]:
    """What isn't as the manifest says, a sentence for each file; none where all is."""
    manifest = shards.manifest
    done, total = 0, sum(manifest.sizes().values())
    whole = hashlib.blake2b(digest_size=16)
    seen = np.zeros(manifest.vocab_size, dtype=np.bool_)
    is_sound = True
    for shard in manifest.shards:
        own = hashlib.blake2b(digest_size=16)
        size = shard.tokens * manifest.id_bytes
        for offset, content in _pieces(shards, shard.name, size):
            own.update(content)
            ids = np.frombuffer(content, dtype=f"<u{manifest.id_bytes}")
            whole.update(ids.astype("<i4").tobytes())
            beyond = ids > manifest.largest_id
            if beyond.any():
                place = offset + int(np.argmax(beyond)) * manifest.id_bytes
                most = manifest.largest_id
                yield f"{shard.name}: id {ids[beyond][0]} at byte {place}, and 0 to {most} is allowed."
                is_sound = False
            seen[ids[~beyond]] = True
            progress(f"reading {shard.name}", done + offset + len(content), total)
        done += size
        if own.hexdigest() != shard.digest:
            yield f"{shard.name}: its digest is {own.hexdigest()}, and the manifest says {shard.digest}."
            is_sound = False
    if is_sound:
        yield from _differences(manifest, whole.hexdigest(), seen)
    yield from _of_ends(shards)
    yield from _of_tokenizer(shards)


def _differences(manifest: Manifest, digest: str, seen: NDArray[np.bool_]) -> Iterator[str]:
    """Of a manifest whose shards are as it says, each by itself."""
    occur = np.flatnonzero(seen)
    for name, found, said in (
        ("digest", digest, manifest.digest),
        ("distinct_ids", occur.size, manifest.distinct_ids),
        ("largest_id", int(occur[-1]), manifest.largest_id),
    ):
        if found != said:
            yield f"the manifest: {name} of the shards is {found}, and it says {said}."


def _of_ends(shards: Shards) -> Iterator[str]:
    manifest = shards.manifest
    own, before = hashlib.blake2b(digest_size=16), 0
    is_ascending = True
    for _, content in _pieces(shards, ENDS, manifest.documents * END_BYTES):
        own.update(content)
        ends = np.frombuffer(content, dtype="<i8")
        is_ascending = is_ascending and bool((np.diff(ends, prepend=before) > 0).all())
        before = int(ends[-1])
    if not is_ascending or before != manifest.tokens:
        yield f"{ENDS}: documents don't end one after the other, the last one at {manifest.tokens}."
    if own.hexdigest() != manifest.documents_digest:
        yield f"{ENDS}: its digest is {own.hexdigest()}, and the manifest says {manifest.documents_digest}."


def _of_tokenizer(shards: Shards) -> Iterator[str]:
    said = shards.manifest.tokenizer_digest
    try:
        size = size_of(shards.folder / TOKENIZER)
        if size > _LARGEST_TOKENIZER:
            yield f"{TOKENIZER}: {size} bytes, and at most {_LARGEST_TOKENIZER} are read."
            return
        found = hashlib.blake2b(shards.pread(TOKENIZER, 0, size), digest_size=16).hexdigest()
    except TextError as error:
        yield shown(error, 300)
        return
    if found != said:
        yield f"{TOKENIZER}: its digest is {found}, and the manifest says {said}."


def _pieces(shards: Shards, name: str, size: int) -> Iterator[tuple[int, bytes]]:
    for offset in range(0, size, _PIECE_BYTES):
        yield offset, shards.pread(name, offset, min(_PIECE_BYTES, size - offset))
