"""A trace file as a stream of text in pieces, whatever it is packed in; what isn't a Chrome trace is named
and refused.

Nothing here holds more than a piece. A damaged or cut gzip file gives what can be unpacked, and says so.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from isal import isal_zlib

from shardwise.core.errors import TraceError

PIECE_BYTES = 2 << 20
# A trace of a hundred million events has 25 GB. What unpacks to more is taken for a bomb.
MOST_BYTES = 64 << 30

_GZIP_MEMBER = 31
_DAMAGED = cast(type[Exception], isal_zlib.error)
_GIVE_CHROME = "Give the Chrome JSON that torch.profiler's export_chrome_trace writes"
_REFUSED = (
    (b"\x28\xb5\x2f\xfd", "a zstd file", "Unpack it with `zstd -d`"),
    (b"PK\x03\x04", "a zip file", "Unpack it"),
    (b"\xfd7zXZ", "an xz file", "Unpack it with `xz -d`"),
    (b"BZh", "a bzip2 file", "Unpack it with `bzip2 -d`"),
    (
        b"SQLite format 3",
        "an SQLite file (Nsight Systems or rocpd)",
        "Record with torch.profiler and export_chrome_trace",
    ),
    (b"\x0a", "a Perfetto protobuf trace (.pftrace)", _GIVE_CHROME),
    (b"\x80\x04", "a Python pickle, which can run code", _GIVE_CHROME),
    (b"\x89HDF", "an HDF5 file", _GIVE_CHROME),
)


@dataclass(slots=True)
class Damage:
    """Filled while the pieces are read: why the stream ended too early ("" where it didn't)."""

    reason: str = ""


def text_pieces(path: Path, damage: Damage) -> Iterator[bytes]:
    """The file's text, unpacked, in pieces of about PIECE_BYTES.

    Raises TraceError where it can't be opened, is of another kind, or unpacks to more than MOST_BYTES.
    """
    try:
        with path.open("rb") as file:
            start = file.read(512)
            file.seek(0)
            pieces = (
                _unpacked(file, damage)
                if start.startswith(b"\x1f\x8b")
                else iter(lambda: file.read(PIECE_BYTES), b"")
            )
            seen, is_first = 0, True
            for piece in pieces:
                if is_first:
                    _refuse_others(path, piece[:512])
                    piece = piece.removeprefix(b"\xef\xbb\xbf")
                is_first = False
                seen += len(piece)
                if seen > MOST_BYTES:
                    most = f"{MOST_BYTES >> 30} GiB"
                    raise TraceError(
                        f"{path}: unpacks to more than {most}. Is it a trace? Record fewer steps."
                    )
                yield piece
            if is_first:
                why = f"nothing can be unpacked: {damage.reason}" if damage.reason else "the file is empty"
                raise TraceError(f"{path}: {why}.")
    except OSError as error:
        raise TraceError(f"{path}: can't be read: {error.strerror or error}.") from None


def _refuse_others(path: Path, start: bytes) -> None:
    if start.lstrip()[:1] in (b"{", b"["):
        return
    for magic, what, remedy in _REFUSED:
        if start.startswith(magic):
            raise TraceError(f"{path}: is {what}, which isn't read. {remedy}.")
    if start[257:262] == b"ustar":
        raise TraceError(f"{path}: is a tar archive. Unpack it, and give the folder.")
    shown = start.lstrip()[:12].decode("ascii", "replace")
    raise TraceError(
        f"{path}: is no Chrome trace: it begins with {shown!r}, not with {{ or [. "
        "Give torch.profiler's JSON, plain or gzip."
    )


def _unpacked(file: BinaryIO, damage: Damage) -> Iterator[bytes]:
    read = file.read
    unpacker = isal_zlib.decompressobj(wbits=_GZIP_MEMBER)
    packed, held, held_bytes = read(1 << 18), [], 0
    while packed:
        try:
            piece = unpacker.decompress(packed, PIECE_BYTES)
        except _DAMAGED as error:
            damage.reason = f"the gzip data is damaged ({error})"
            break
        held.append(piece)
        held_bytes += len(piece)
        if held_bytes >= PIECE_BYTES:
            yield b"".join(held)
            held, held_bytes = [], 0
        if unpacker.eof:  # another member may follow
            packed = unpacker.unused_data or read(1 << 18)
            if packed and not packed.startswith(b"\x1f\x8b"):
                break  # padding after the last member
            unpacker = isal_zlib.decompressobj(wbits=_GZIP_MEMBER)
        else:
            packed = unpacker.unconsumed_tail or read(1 << 18)
            if not packed:
                damage.reason = "the gzip data ends too early"
    if held_bytes:
        yield b"".join(held)
