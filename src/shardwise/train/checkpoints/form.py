"""What a checkpoint's folder holds, as nouns and as JSON; read strictly, for a folder may come from anywhere.

    step-120/
      manifest.json            what it says of itself; name, size and SHA-256 of every other file
      index.json               every tensor: dtype, shape, and which part of it lies in which file
      rank-0.safetensors ...   the parts that a rank wrote

manifest.json is {"sha256": ..., "content": {...}}: the digest is of the content's bytes as they stand there.
"""

import math
import re
from collections.abc import Sequence
from hashlib import sha256
from typing import Any

import msgspec
import torch

from shardwise.core.errors import CheckpointError, InputError
from shardwise.core.shown import shown
from shardwise.core.training import Saved
from shardwise.train.checkpoints.places import Place, fits, sizes_of

FORMAT, VERSION = "shardwise checkpoint", 1
MANIFEST, INDEX = "manifest.json", "index.json"
_PLAIN_NAME = re.compile(r"[a-z0-9-]{1,64}\.(json|safetensors)")
_LARGEST = 2**62
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""As safetensors files call them."""
_BY_NAME = {name: dtype for dtype, name in DTYPES.items()}


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """file: the number of the rank that wrote it."""

    file: int
    place: Place


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One tensor of the state."""

    dtype: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]

    @property
    def torch_dtype(self) -> torch.dtype:
        return _BY_NAME[self.dtype]


class File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    size: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """mesh: of the ranks that wrote it, such as fsdp=2,tp=2; empty for one process."""

    format: str
    version: int
    saved: Saved
    mesh: str
    ranks: int
    files: tuple[File, ...]


class _Envelope(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    sha256: str
    content: msgspec.Raw


class _Version(msgspec.Struct, frozen=True):
    format: str
    version: int


def file_of(rank: int) -> str:
    return f"rank-{rank}.safetensors"


def dtype_name(name: str, dtype: torch.dtype) -> str:
    """Raises CheckpointError for one that safetensors files have no name for."""
    if dtype not in DTYPES:
        raise CheckpointError(
            f"checkpoint: {name} is of {dtype}, which can't be saved. Use a dtype of fewer parts."
        )
    return DTYPES[dtype]


def write_manifest(manifest: Manifest) -> bytes:
    content = msgspec.json.encode(manifest)
    return msgspec.json.encode(_Envelope(sha256(content).hexdigest(), msgspec.Raw(content)))


def read_manifest(document: bytes) -> Manifest:
    """Raises CheckpointError, whose text is what is wrong, as "another format"."""
    envelope = _decoded(document, _Envelope, MANIFEST)
    content = bytes(envelope.content)
    if sha256(content).hexdigest() != envelope.sha256:
        raise CheckpointError(f"{MANIFEST} isn't what was written: its digest is another one")
    found = _decoded(content, _Version, MANIFEST)
    if (found.format, found.version) != (FORMAT, VERSION):
        raise CheckpointError(
            f'is of format "{shown(found.format)}" version {found.version}; this Shardwise reads "{FORMAT}" '
            f"version {VERSION}"
        )
    manifest: Manifest = _decoded(content, Manifest, MANIFEST)
    names = [file.name for file in manifest.files]
    wanted = {INDEX, *map(file_of, range(min(manifest.ranks, len(names))))}
    if manifest.ranks != len(names) - 1 or set(names) != wanted:
        strange = [name for name in names if not _PLAIN_NAME.fullmatch(name)]
        what = f'the name "{shown(strange[0])}"' if strange else "other files than a checkpoint has"
        raise CheckpointError(f"{MANIFEST} lists {what}")
    return manifest


def write_index(entries: dict[str, Entry]) -> bytes:
    return msgspec.json.encode(entries)


def read_index(document: bytes, ranks: int) -> dict[str, Entry]:
    """Raises CheckpointError for what isn't JSON of that form, and for parts that don't make up a tensor."""
    entries: dict[str, Entry] = _decoded(document, dict[str, Entry], INDEX)
    for name, entry in entries.items():
        if entry.dtype not in _BY_NAME:
            raise CheckpointError(
                f'{INDEX}: {shown(name)} has the dtype "{shown(entry.dtype)}", which is none'
            )
        if not is_covered(entry.shape, [part.place for part in entry.parts]) or any(
            not 0 <= part.file < ranks for part in entry.parts
        ):
            raise CheckpointError(
                f"{INDEX}: the parts of {shown(name)} don't make up a tensor {shown(list(entry.shape))}"
            )
    return entries


def is_covered(shape: Sequence[int], places: Sequence[Place]) -> bool:
    """Whether these parts lie in a tensor of this shape and have as many elements."""
    whole = math.prod(shape)
    in_range = all(size >= 0 for size in shape) and whole <= _LARGEST
    return (
        in_range
        and all(fits(place, shape) for place in places)
        and sum(math.prod(sizes_of(place)) for place in places) == whole
    )


def _decoded(document: bytes, kind: Any, name: str) -> Any:
    try:
        return msgspec.json.decode(document, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, InputError) as error:
        raise CheckpointError(f"{name} can't be read: {shown(error, 120).rstrip('.')}") from None
