"""Written tokens, read where they lie: a folder of shards as Tokens, of which nothing is held in memory.

Pieces are read by their place (pread), not through a mapping: a file that is cut off while training reads
it, or a disk that fails, is then an error in one line, where a mapping would take the process down
(SIGBUS). The page cache holds what is read often, once for all ranks of a host, either way."""

import os
from bisect import bisect_left
from collections import OrderedDict
from itertools import accumulate
from pathlib import Path
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from shardwise.core.errors import TextError
from shardwise.core.measurement import TextSummary
from shardwise.text.documents import shown
from shardwise.text.manifest import AGAIN, END_BYTES, ENDS, open_file, read_manifest, unreadable
from shardwise.text.stream import TokenStream

MOST_IN_MEMORY = 1 << 24
_MOST_OPEN = 64


class Shards:
    """A folder's tokens, for a model of vocab_size. Raises TextError where the folder isn't whole by its
    sizes, and where an id occurs that the model hasn't."""

    def __init__(self, folder: Path, vocab_size: int) -> None:
        self.folder = folder
        self.manifest = read_manifest(folder)
        if self.manifest.largest_id >= vocab_size:
            raise TextError(
                f"{shown(folder)} has token ids up to {self.manifest.largest_id}, and the model has "
                f"vocab_size={vocab_size} (ids 0 to {vocab_size - 1}). Use the model whose tokenizer wrote "
                "it, or write the folder anew with the model's own."
            )
        manifest = self.manifest
        self.summary = TextSummary(
            shown(folder),
            manifest.tokenizer,
            manifest.tokens,
            manifest.distinct_ids,
            vocab_size,
            manifest.digest,
            manifest.documents,
        )
        self._starts = (0, *accumulate(shard.tokens for shard in manifest.shards))
        self._open: OrderedDict[str, int] = OrderedDict()
        # a thread may read ahead while another one validates: none closes a file that the other reads
        self._lock = Lock()

    @property
    def documents_digest(self) -> str:
        """See Tokens."""
        return self.manifest.documents_digest

    def read(self, starts_N: NDArray[np.int64], length: int) -> NDArray[np.int64]:
        """See Tokens. Raises TextError for a shard that ends too early, or has an id beyond what its
        manifest says."""
        ids_NL = np.empty((starts_N.size, length), dtype=np.int64)
        for row, start in enumerate(starts_N.tolist()):
            self._read_into(ids_NL[row], start)
        return ids_NL

    def ends_between(self, first: int, last: int) -> NDArray[np.int64]:
        """See Tokens."""
        low = bisect_left(_Ends(self), first)
        high = bisect_left(_Ends(self), last, low)
        content = self.pread(ENDS, low * END_BYTES, (high - low) * END_BYTES)
        ends = np.frombuffer(content, dtype="<i8").astype(np.int64)
        if ends.size and not (first <= ends.min() and ends.max() < last and (np.diff(ends) > 0).all()):
            raise TextError(
                f'"{shown(self.folder / ENDS)}" is damaged: documents {low} to {high} don\'t end one after '
                f"the other. {AGAIN}"
            )
        return ends

    def first(self, most: int = MOST_IN_MEMORY) -> TokenStream:
        """The first tokens in memory, at most so many: for what reads a few batches."""
        tokens = min(most, self.summary.tokens)
        ids = self.read(np.zeros(1, dtype=np.int64), tokens)[0].astype(np.int32)
        ends = self.ends_between(1, tokens)
        source = self.summary.source
        if tokens < self.summary.tokens:
            source = f"the first {tokens} tokens of {source}"
        return TokenStream.of(
            ids,
            vocab_size=self.summary.vocab_size,
            source=source,
            tokenizer=self.summary.tokenizer,
            ends=np.append(ends, tokens),
        )

    def pread(self, name: str, offset: int, size: int) -> bytes:
        """Bytes of one of the folder's files, all that were asked for."""
        path = self.folder / name
        content = b""
        try:
            with self._lock:
                while len(content) < size and (
                    more := os.pread(self._file(name), size - len(content), offset + len(content))
                ):
                    content += more
        except OSError as error:
            raise unreadable(path, error) from None
        if len(content) < size:
            raise TextError(
                f'"{shown(path)}" ends at byte {offset + len(content)}, and {offset + size} were there when '
                "it was opened. Copy the file again whole."
            )
        return content

    def _read_into(self, ids_L: NDArray[np.int64], start: int) -> None:
        """Ids from a place on, over as many shards as they lie in."""
        shard = bisect_left(self._starts, start + 1) - 1
        done, id_bytes = 0, self.manifest.id_bytes
        while done < ids_L.size:
            place = start + done - self._starts[shard]
            count = min(ids_L.size - done, self.manifest.shards[shard].tokens - place)
            name = self.manifest.shards[shard].name
            content = self.pread(name, place * id_bytes, count * id_bytes)
            ids = np.frombuffer(content, dtype=f"<u{id_bytes}")
            self._check(ids, name, place)
            ids_L[done : done + count] = ids
            done, shard = done + count, shard + 1

    def _check(self, ids: NDArray[np.unsignedinteger], name: str, place: int) -> None:
        most = self.manifest.largest_id
        if ids.max() <= most:
            return
        first = int(np.argmax(ids > most))
        raise TextError(
            f'"{shown(self.folder / name)}" is damaged: id {ids[first]} at byte '
            f"{(place + first) * self.manifest.id_bytes}, and the manifest allows 0 to {most}. Copy the file "
            "again, or write the folder anew."
        )

    def _file(self, name: str) -> int:
        """Its descriptor; the one that was used least lately is closed where there are many."""
        if name not in self._open:
            if len(self._open) >= _MOST_OPEN:
                os.close(self._open.popitem(last=False)[1])
            self._open[name] = open_file(self.folder / name)
        self._open.move_to_end(name)
        return self._open[name]

    def __del__(self) -> None:
        for descriptor in getattr(self, "_open", {}).values():
            os.close(descriptor)


class _Ends:
    """documents.bin as a sequence, for bisection."""

    def __init__(self, shards: Shards) -> None:
        self.shards = shards

    def __len__(self) -> int:
        return self.shards.manifest.documents

    def __getitem__(self, index: int) -> int:
        return int.from_bytes(self.shards.pread(ENDS, index * END_BYTES, END_BYTES), "little", signed=True)
