"""A 64-bit digest of a tensor's bits, taken where the tensor lies and without waiting for the device.

The bits are read as words w of 4 bytes (fewer where the tensor doesn't divide), in rows of COLUMNS:

    digest = sum over rows r, columns c of  w_rc x m_c x n_r   mod 2^64

with m and n odd. One flipped bit always changes it: an odd number times 2^k is nothing mod 2^64 for no k
below 64. Two words of a row that change places always do, too: the lower halves of all m are different, so
with words of 4 bytes what they add can't vanish. m and n differ, and their upper halves depend on the place
in no simple way (multipliers in arithmetic progression would give values at places 0 and 5 the digest of the
same values at places 2 and 3). It is exact on every device, and no secret: it finds ranks that drifted apart,
not forgeries.
"""

from functools import cache

import torch
from torch import Tensor

COLUMNS = 1 << 16
ROWS_AT_ONCE = 64
"""On a GPU: each takes half a MiB of memory meanwhile. A CPU takes one, which stays in its cache: six times
as fast."""
_GOLDEN = -7046029254386353131  # 2^64 / golden ratio, as a signed number (Knuth, TAOCP 3, 6.4)
_MIX = (
    (30, -4658895280553007687),
    (27, -7723592293110705685),
)  # shift, factor: splitmix64's finaliser (Steele, Lea, Flood 2014)
_LOWER = (1 << 32) - 1
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
_N_ROWS = 1 << 16


@torch.no_grad()
def digest(tensor: Tensor) -> Tensor:
    """Of a plain tensor's values in their order, whatever its shape: an int64 scalar on its device."""
    words = _words(tensor.detach())
    columns, rows = _tables(words.device)
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    if words.numel() <= COLUMNS:
        return total + (words * columns[: words.numel()]).sum()
    whole, at_once = words.numel() // COLUMNS, 1 if words.device.type == "cpu" else ROWS_AT_ONCE
    for first in range(0, whole, at_once):
        last = min(whole, first + at_once)
        block = words[first * COLUMNS : last * COLUMNS].view(last - first, COLUMNS)
        total += ((block * columns).sum(1) * _of_rows(rows, first, last)).sum()
    left = words[whole * COLUMNS :]
    if left.numel():
        total += (left * columns[: left.numel()]).sum() * _of_rows(rows, whole, whole + 1)[0]
    return total


def _words(tensor: Tensor) -> Tensor:
    """Its bits as integers of at most 4 bytes, in a row."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    flat = tensor.contiguous().view(-1)
    if not flat.numel():
        return flat.to(torch.int32)
    start, n_bytes = flat.storage_offset() * flat.element_size(), flat.numel() * flat.element_size()
    size = next(size for size in (4, 2, 1) if n_bytes % size == 0)
    return (flat.clone() if start % size else flat).view(_WORDS[size])


def _of_rows(rows: Tensor, first: int, last: int) -> Tensor:
    return rows[first:last] if last <= len(rows) else mixed(first, last, rows.device) | 1


@cache
def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """(m, n)"""
    places = torch.arange(COLUMNS, device=device)
    lower = ((2 * places + 1) * _GOLDEN) & _LOWER  # odd, and each once: an odd factor takes none twice
    return (mixed(0, COLUMNS, device) & ~_LOWER) | lower, mixed(COLUMNS, COLUMNS + _N_ROWS, device) | 1


def mixed(first: int, last: int, device: torch.device | None = None) -> Tensor:
    """64-bit numbers for places first to last - 1 that look random: splitmix64 without its last shift."""
    numbers = (torch.arange(first, last, device=device) + 1) * _GOLDEN
    for shift, factor in _MIX:
        unsigned = (numbers >> shift) & ((1 << (64 - shift)) - 1)  # torch's shift keeps the sign
        numbers = (numbers ^ unsigned) * factor
    return numbers
