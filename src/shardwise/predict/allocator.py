"""PyTorch's caching allocator for CUDA, step by step: what it takes from the device for storages that come
and go. No tensors, no device: addresses are numbers.

    rounding   to 512 bytes; with roundup_divisions above that to one of so many sizes between powers of two
    pools      a small one (at most 1 MiB) and a large one for each stream; blocks are reused on theirs only
    segments   2 MiB for the small pool; 20 MiB for less than 10 MiB, else the size rounded up to 2 MiB
    choice     the smallest free block that is large enough, of those the one at the lowest address
    splitting  where at least 512 bytes are left over in the small pool, more than 1 MiB in the large one
    merging    a block that is freed joins free neighbours of its segment
    expandable one segment a pool, which grows by pages of 2 MiB (small) and 20 MiB (large); what is left over
               is always split off; a block that can grow is chosen last
    full       segments (expandable: pages) that are free as a whole go back to the device, and it tries again

Source: PyTorch's c10/cuda/CUDACachingAllocator.cpp, 2.5 to 2.13 (round_size, get_allocation_size,
get_free_block, should_split, try_merge_blocks, try_allocate_expandable_block, release_cached_blocks); the
sizes stand in c10/core/AllocatorConfig.h since 2.9.

What it doesn't know: blocks that another stream still reads (record_stream), which come back when the device
is done, and so later than here; private pools of CUDA graphs.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass, field

from shardwise.core.allocator import MIB, PYTORCHS, AllocatorSettings

SMALLEST = 512
SMALL = MIB  # the largest request of the small pool
SMALL_SEGMENT = 2 * MIB
LARGE_SEGMENT = 20 * MIB
OWN_SEGMENT = 10 * MIB  # from here on a request gets a segment of its own size
SEGMENT_STEP = 2 * MIB
ENDLESS = 5 * 2**58  # of addresses that an expandable segment may still grow by; whole pages of 20 MiB
LARGEST_SPLIT = 2**62


@dataclass(slots=True, eq=False)
class Piece:
    """Of a segment, between its neighbours. is_mapped: whether there is memory behind its addresses."""

    pool: "_Pool"
    address: int
    n_bytes: int
    before: "Piece | None" = None
    after: "Piece | None" = None
    is_free: bool = False
    is_mapped: bool = True


_Sized = tuple[int, int, Piece]  # (bytes, address, piece): addresses are unique, pieces never compared


@dataclass(slots=True, eq=False)
class _Pool:
    """Of one stream. free: by size and address; unmapped: by address."""

    is_small: bool
    free: list[_Sized] = field(default_factory=list)
    unmapped: list[tuple[int, Piece]] = field(default_factory=list)

    @property
    def page(self) -> int:
        return SMALL_SEGMENT if self.is_small else LARGE_SEGMENT

    def add(self, piece: Piece) -> None:
        if piece.is_mapped:
            insort(self.free, (piece.n_bytes, piece.address, piece))
        else:
            insort(self.unmapped, (piece.address, piece))

    def remove(self, piece: Piece) -> None:
        if piece.is_mapped:
            del self.free[bisect_left(self.free, (piece.n_bytes, piece.address))]
        else:
            del self.unmapped[bisect_left(self.unmapped, (piece.address,))]


class _FullError(Exception):
    """The device has no room for another page."""


class CachingAllocator:
    """Bytes: active_bytes is in use, rounded; reserved_bytes is taken from the device; peak_reserved_bytes
    the most of it. retries: how often the device was full, and what was free went back to it. overdrawn: how
    often even then it had no room, and more than capacity_bytes was taken all the same."""

    def __init__(self, settings: AllocatorSettings = PYTORCHS, capacity_bytes: float | None = None) -> None:
        self.active_bytes = self.reserved_bytes = 0
        self.peak_active_bytes = self.peak_reserved_bytes = 0
        self.retries = self.overdrawn = 0
        self._settings = settings
        self._capacity = float("inf") if capacity_bytes is None else capacity_bytes
        self._pools: dict[tuple[int, bool], _Pool] = {}
        self._sizes: dict[int, int] = {}  # rounded
        self._next_address = 0
        self._expandable = settings.expandable_segments
        self._largest_split = settings.max_split_bytes or LARGEST_SPLIT

    def allocate(self, n_bytes: int, stream: int = 0) -> Piece:
        """A piece for so many bytes, more than none."""
        size = self._sizes.get(n_bytes) or self._rounded(n_bytes)
        is_small = size <= SMALL
        pool = self._pools.get((stream, is_small))
        if pool is None:
            pool = self._pools[stream, is_small] = _Pool(is_small)
        piece = self._found(pool, size)
        if piece is None:
            grow = self._grown if self._expandable else self._new_segment
            piece = grow(pool, size)
        left = piece.n_bytes - size
        if left and self._is_split(pool, size, left):
            rest = Piece(pool, piece.address + size, left, piece, piece.after, is_free=True)
            if piece.after is not None:
                piece.after.before = rest
            piece.after, piece.n_bytes = rest, size
            pool.add(rest)
        piece.is_free = False
        self.active_bytes += piece.n_bytes
        if self.active_bytes > self.peak_active_bytes:  # max() takes twice as long
            self.peak_active_bytes = self.active_bytes
        return piece

    def free(self, piece: Piece) -> None:
        """Once for each piece that allocate() gave."""
        assert not piece.is_free
        self.active_bytes -= piece.n_bytes
        piece.is_free = True
        self._give_back(piece)

    def _rounded(self, n_bytes: int) -> int:
        divisions = self._settings.roundup_divisions
        if divisions > 1 and n_bytes > SMALLEST * divisions:
            step = (1 << (n_bytes.bit_length() - 1)) // divisions
            size = -(-n_bytes // step) * step
        else:
            size = max(SMALLEST, -(-n_bytes // SMALLEST) * SMALLEST)
        self._sizes[n_bytes] = size
        return size

    def _is_split(self, pool: _Pool, size: int, left: int) -> bool:
        if pool.is_small or self._expandable:
            return left >= SMALLEST
        return size < self._largest_split and left > SMALL

    def _found(self, pool: _Pool, size: int) -> Piece | None:
        """The free piece that a request gets, taken out of the pool."""
        free = pool.free
        at = bisect_left(free, (size,))
        if at == len(free):
            return None
        piece = free[at][2]
        if self._expandable:
            while at + 1 < len(free) and _room(free[at + 1][2]) < _room(free[at][2]):
                at += 1  # one that could grow counts as being as large as it could become
            piece = free[at][2]
        elif self._is_oversized(piece, size):
            return None
        del free[at]
        return piece

    def _is_oversized(self, piece: Piece, size: int) -> bool:
        """Whether it is kept for larger requests, where the largest blocks are never split."""
        largest = self._largest_split
        if size < largest:
            return piece.n_bytes >= largest
        return piece.n_bytes >= size + LARGE_SEGMENT

    def _new_segment(self, pool: _Pool, size: int) -> Piece:
        if pool.is_small:
            n_bytes = SMALL_SEGMENT
        elif size < OWN_SEGMENT:
            n_bytes = LARGE_SEGMENT
        else:
            n_bytes = -(-size // SEGMENT_STEP) * SEGMENT_STEP
        if self._is_full(n_bytes):
            self._give_all_back()
        self._take(n_bytes)
        piece = Piece(pool, self._next_address, n_bytes, is_free=True)
        self._next_address += n_bytes
        return piece

    def _is_full(self, n_bytes: int) -> bool:
        return self.reserved_bytes + n_bytes > self._capacity

    def _take(self, n_bytes: int) -> None:
        """From the device, which may lack room for it."""
        self.overdrawn += self._is_full(n_bytes)
        self.reserved_bytes += n_bytes
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)

    def _give_all_back(self) -> None:
        """What is free, to the device."""
        self.retries += 1
        for pool in self._pools.values():
            for _, _, piece in tuple(pool.free):
                if self._expandable:
                    self._unmap(piece)
                elif piece.before is None and piece.after is None:
                    pool.remove(piece)
                    self.reserved_bytes -= piece.n_bytes

    def _give_back(self, piece: Piece) -> None:
        """Joins it with free neighbours, and adds it to the pool."""
        pool = piece.pool
        other = piece.before
        if other is not None and other.is_free and other.is_mapped is piece.is_mapped:
            pool.remove(other)
            piece.address, piece.before = other.address, other.before
            piece.n_bytes += other.n_bytes
            if other.before is not None:
                other.before.after = piece
        other = piece.after
        if other is not None and other.is_free and other.is_mapped is piece.is_mapped:
            pool.remove(other)
            piece.after = other.after
            piece.n_bytes += other.n_bytes
            if other.after is not None:
                other.after.before = piece
        pool.add(piece)

    def _grown(self, pool: _Pool, size: int) -> Piece:
        """An expandable segment's piece of at least this size, by mapping pages at the lowest place. Where
        the device is full, all free pages go back, and it looks again."""
        try:
            return self._mapped(pool, size)
        except _FullError:
            self._give_all_back()
            return self._mapped(pool, size, anyhow=True)

    def _mapped(self, pool: _Pool, size: int, *, anyhow: bool = False) -> Piece:
        piece = self._growing(pool, size)
        if not piece.is_mapped:
            piece = self._map(piece, min(piece.n_bytes, size), anyhow)
        while piece.n_bytes < size:
            assert piece.after is not None
            piece = self._map(piece.after, min(piece.after.n_bytes, size - piece.n_bytes), anyhow)
        pool.remove(piece)
        return piece

    def _growing(self, pool: _Pool, size: int) -> Piece:
        """Where so much room begins, of which some is unmapped."""
        for _, unmapped in pool.unmapped:
            piece = unmapped
            if piece.before is not None and piece.before.is_free:
                piece = piece.before
            room, last = 0, piece
            while last.is_free and room < size:
                room += last.n_bytes
                if last.after is None:
                    break
                last = last.after
            if room >= size:
                return piece
        piece = Piece(pool, self._next_address, ENDLESS, is_free=True, is_mapped=False)
        self._next_address += ENDLESS
        pool.add(piece)
        return piece

    def _map(self, unmapped: Piece, n_bytes: int, anyhow: bool) -> Piece:
        """Pages behind the first bytes of it: a free piece, joined with its neighbours."""
        pool = unmapped.pool
        n_bytes = min(-(-n_bytes // pool.page) * pool.page, unmapped.n_bytes)
        if self._is_full(n_bytes) and not anyhow:
            raise _FullError
        self._take(n_bytes)
        pool.remove(unmapped)
        rest = unmapped.n_bytes - n_bytes
        if rest:
            later = Piece(pool, unmapped.address + n_bytes, rest, unmapped, unmapped.after, True, False)
            if unmapped.after is not None:
                unmapped.after.before = later
            unmapped.after, unmapped.n_bytes = later, n_bytes
            pool.add(later)
        unmapped.is_mapped = True
        self._give_back(unmapped)
        return unmapped

    def _unmap(self, piece: Piece) -> None:
        """The whole pages of a free piece go back to the device."""
        pool, page = piece.pool, piece.pool.page
        start = -(-piece.address // page) * page
        stop = (piece.address + piece.n_bytes) // page * page
        if stop <= start:
            return
        pool.remove(piece)
        head, tail = start - piece.address, piece.address + piece.n_bytes - stop
        if head:
            before = Piece(pool, piece.address, head, piece.before, piece, is_free=True)
            if piece.before is not None:
                piece.before.after = before
            piece.before = before
            pool.add(before)
        if tail:
            after = Piece(pool, stop, tail, piece, piece.after, is_free=True)
            if piece.after is not None:
                piece.after.before = after
            piece.after = after
            pool.add(after)
        piece.address, piece.n_bytes, piece.is_mapped = start, stop - start, False
        self.reserved_bytes -= stop - start
        self._give_back(piece)


def _room(piece: Piece) -> int:
    """What it could become, where what follows it isn't mapped."""
    after = piece.after
    return piece.n_bytes + (after.n_bytes if after is not None and not after.is_mapped else 0)
