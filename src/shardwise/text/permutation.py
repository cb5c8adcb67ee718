"""A seeded permutation of 0 to n-1 that nobody holds: each place is worked out by itself, so 10^10 of
them need no memory.

A Feistel network permutes the numbers of 2h bits, whatever its round function F is: a round takes the
halves (L, R) to (R, L xor F(R)). h is the least that has 4^h >= n; a result of n or more is put through
again until one is below n (cycle walking), at most 4 times in the mean, for 4^h < 4n. Sources: Luby &
Rackoff 1988; Black & Rogaway 2002, "Ciphers with arbitrary finite domains"; ten rounds as NIST SP
800-38G's FF1 has. F is the finalizer of splitmix64 (Steele, Lea & Flood 2014) of the half and the round's
key. It spreads well and is no secret."""

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

ROUNDS = 10
LARGEST = 1 << 62


@dataclass(frozen=True, slots=True)
class Permutation:
    """Of 0 to n-1, by a seed and a number (an epoch's): another one for each."""

    n: int
    seed: int
    number: int

    def __post_init__(self) -> None:
        assert 1 <= self.n <= LARGEST, self.n

    def at(self, places_N: NDArray[np.int64]) -> NDArray[np.int64]:
        """What stands at each of these places, from 0 on."""
        keys = self._keys()
        half_bits = np.uint64(max(1, ((self.n - 1).bit_length() + 1) // 2))
        found_N = places_N.astype(np.uint64)
        outside_M = np.arange(found_N.size)
        while outside_M.size:
            found_N[outside_M] = _feistel(found_N[outside_M], keys, half_bits)
            outside_M = outside_M[found_N[outside_M] >= self.n]
        return found_N.astype(np.int64)

    def _keys(self) -> NDArray[np.uint64]:
        """One of 64 bits for each round."""
        said = f"shardwise permutation {self.n} {self.seed} {self.number}".encode()
        return np.frombuffer(hashlib.shake_256(said).digest(8 * ROUNDS), dtype="<u8").astype(np.uint64)


def _feistel(
    values_N: NDArray[np.uint64], keys: NDArray[np.uint64], half_bits: np.uint64
) -> NDArray[np.uint64]:
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    left_N, right_N = values_N >> half_bits, values_N & mask
    for key in keys:
        left_N, right_N = right_N, left_N ^ (_mixed(right_N, key) & mask)
    return (left_N << half_bits) | right_N


def _mixed(values_N: NDArray[np.uint64], key: np.uint64) -> NDArray[np.uint64]:
    """64 bits of each value and the key; products are modulo 2^64."""
    z_N = values_N * np.uint64(0x9E3779B97F4A7C15) + key
    z_N = (z_N ^ (z_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z_N = (z_N ^ (z_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z_N ^ (z_N >> np.uint64(31))
