"""The random numbers of the data order, in plain Python: the oracle of `csrc/philox.h`.

Nothing here runs in training. The C++ core must return exactly these numbers, and the tests hold
it to that.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

_WORD = 0xFFFFFFFF
_DOUBLE_WORD = 0xFFFFFFFFFFFFFFFF


class Stream(IntEnum):
    """What the numbers are for; the values are part of the data order and never change."""

    SPANS = 0
    EPOCH_OFFSET = 1
    PERMUTATION = 2
    MIXTURE = 3
    SOURCE = 4


def philox4x32(
    counter: tuple[int, int, int, int], key: tuple[int, int]
) -> tuple[int, int, int, int]:
    """One block of Philox4x32-10.

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.

    Args:
        counter: four 32-bit words.
        key: two 32-bit words.

    Returns:
        four uniform 32-bit words.
    """
    for _ in range(10):
        product0 = 0xD2511F53 * counter[0]
        product1 = 0xCD9E8D57 * counter[2]
        counter = (
            product1 >> 32 ^ counter[1] ^ key[0],
            product1 & _WORD,
            product0 >> 32 ^ counter[3] ^ key[1],
            product0 & _WORD,
        )
        key = (key[0] + 0x9E3779B9 & _WORD, key[1] + 0xBB67AE85 & _WORD)
    return counter


class Random:
    """The numbers belonging to one (seed, index, stream), in order.

    Args:
        seed: 64 bits, the key.
        index: 64 bits: a global sample index, or an epoch.
        stream: what the numbers are for.
    """

    def __init__(self, seed: int, index: int, stream: Stream) -> None:
        self._key = (seed & _WORD, seed >> 32)
        self._index = (index & _WORD, index >> 32)
        self._stream = stream
        self._blocks = 0
        self._unused: list[int] = []

    def next(self) -> int:
        """The next 32-bit word."""
        if not self._unused:
            block = philox4x32((*self._index, int(self._stream), self._blocks), self._key)
            self._unused = list(reversed(block))
            self._blocks += 1
        return self._unused.pop()

    def next64(self) -> int:
        """The next 64-bit word, low half first."""
        low = self.next()
        return low | self.next() << 32

    def below(self, bound: int) -> int:
        """Uniform in [0, bound), 1 <= bound < 2^32, without bias (Lemire 2019)."""
        product = self.next() * bound
        rest = (1 << 32) % bound
        while product & _WORD < rest:
            product = self.next() * bound
        return product >> 32


class KeyedPermutation:
    """A random order of [0, size), one per (seed, epoch): the oracle of `csrc/permutation.h`.

    From 2^16 elements on it needs no table: an eight-round Feistel network on a grid of rows and
    columns a little larger than `size`, walked until it lands inside. Below, where such a network
    is visibly not uniform, it is a Fisher-Yates shuffle.

    Args:
        size: 1 to 2^62.
        seed: 64 bits.
        epoch: 64 bits.
        stream: whose order it is.
    """

    FEISTEL_FROM = 1 << 16
    ROUNDS = 8

    def __init__(
        self, size: int, *, seed: int, epoch: int, stream: Stream = Stream.PERMUTATION
    ) -> None:
        assert 1 <= size <= 1 << 62
        self._size = size
        self._table: NDArray[np.int64] | None = None
        random = Random(seed, epoch, stream)
        if size < self.FEISTEL_FROM:
            self._table = np.arange(size)
            for last in range(size - 1, 0, -1):
                other = random.below(last + 1)
                self._table[[last, other]] = self._table[[other, last]]
            return
        self._column_bits = (size - 1).bit_length() // 2
        self._rows = ((size - 1) >> self._column_bits) + 1
        self._keys = [random.next64() for _ in range(self.ROUNDS)]

    def __getitem__(self, position: int) -> int:
        assert 0 <= position < self._size
        if self._table is not None:
            return int(self._table[position])
        position = self._encrypt(position)
        while position >= self._size:
            position = self._encrypt(position)
        return position

    def _encrypt(self, position: int) -> int:
        columns_mask = (1 << self._column_bits) - 1
        row, column = position >> self._column_bits, position & columns_mask
        for round_index in range(0, self.ROUNDS, 2):
            step = self._mix(column, self._keys[round_index]) * self._rows >> 32
            row = (row + step) % self._rows
            column ^= self._mix(row, self._keys[round_index + 1]) & columns_mask
        return row << self._column_bits | column

    @staticmethod
    def _mix(value: int, key: int) -> int:
        value = (value ^ key) * 0xBF58476D1CE4E5B9 & _DOUBLE_WORD
        value ^= value >> 32
        return (value * 0x94D049BB133111EB & _DOUBLE_WORD) >> 32
