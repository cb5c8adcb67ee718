"""Bytes onto a disk: written, hashed as they go, and there before anyone counts on them.

A safetensors file is 8 bytes with the length of its header, the header (JSON: of each tensor dtype, shape and
where its bytes are), and the bytes, without gaps (github.com/safetensors/safetensors, "Format"). It is
written here so that its digest is made as its bytes go by; the library reads it.
"""

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from shardwise.train.checkpoints.form import DTYPES, File

_AT_ONCE = 16 << 20
_HEADER_STEP = 8


def write_file(folder: Path, name: str, pieces: Iterable[bytes | memoryview]) -> File:
    """A new file of these bytes, on the disk when this returns. Raises OSError."""
    digest, size = sha256(), 0
    with (folder / name).open("xb", buffering=0) as file:
        for piece in pieces:
            view = memoryview(piece)
            for start in range(0, len(view), _AT_ONCE):
                part = view[start : start + _AT_ONCE]
                digest.update(part)
                _write_all(file.fileno(), part)
                size += len(part)
        os.fsync(file.fileno())
    return File(name, size, digest.hexdigest())


def _write_all(descriptor: int, part: memoryview) -> None:
    while part:
        part = part[os.write(descriptor, part) :]


def fsync_folder(folder: Path) -> None:
    """What was made, renamed or removed in it stays so after a power cut. Some file systems have no such
    thing for folders."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class Buffer:
    """Host memory for the tensors of one file, laid out as in the file: reused from save to save, pinned
    where tensors come from a GPU."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)
        self._header = b""

    def take(self, tensors: dict[str, Tensor]) -> None:
        """Copies the tensors; they may change once this returns."""
        entries: dict[str, object] = {}
        places, start = [], 0
        # the largest elements first, so that each begins at a multiple of its size
        for name, tensor in sorted(tensors.items(), key=lambda each: -each[1].element_size()):
            stop = start + tensor.numel() * tensor.element_size()
            entries[name] = {
                "dtype": DTYPES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [start, stop],
            }
            places.append((tensor, start, stop))
            start = stop
        self._header = header(entries)
        on_gpu = any(tensor.is_cuda for tensor in tensors.values())
        if self._bytes.numel() != start or (on_gpu and not self._bytes.is_pinned()):
            self._bytes = torch.empty(start, dtype=torch.uint8, pin_memory=on_gpu)
        for tensor, first, stop in places:
            if stop > first:
                self._bytes[first:stop].view(tensor.dtype).view(tensor.shape).copy_(
                    tensor, non_blocking=on_gpu
                )
        if on_gpu:
            torch.cuda.current_stream().synchronize()

    @property
    def pieces(self) -> tuple[bytes | memoryview, ...]:
        """The file's bytes."""
        return self._header, self._bytes.numpy().data

    @property
    def size(self) -> int:
        return len(self._header) + self._bytes.numel()


def header(entries: dict[str, object]) -> bytes:
    """How a file begins."""
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _HEADER_STEP)
    return len(text).to_bytes(8, "little") + text
