"""A checksum of a tensor that may be taken of its parts, in any layout, and added up.

It is a sum, modulo 2^64, over words of 64 bits, each of several successive elements of a row (a run
along the last dimension): the sum of each row's words times a number that depends on the row's
place, and the sum of each column of words likewise. An altered element, or a part that lies
elsewhere, changes it; who sets out to deceive can keep it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_COLUMNS = np.uint64(0x9E3779B97F4A7C15)  # sets the numbers of columns apart from those of rows
_BLOCK_BYTES = 512 << 10  # stays in a core's cache between the two sums


def fingerprint(bits: NDArray[Any], offsets: Sequence[int], shape: Sequence[int]) -> int:
    """The share of a part in its tensor's checksum, which is the sum of all shares modulo 2^64.

    Args:
        bits: the part's elements as unsigned integers, whatever they mean; contiguous.
        offsets: of the part in the tensor, per dimension.
        shape: of the tensor.
    """
    if not bits.size:
        return 0
    if not shape:
        bits, offsets, shape = bits.reshape(1), (0,), (1,)
    rows = np.zeros((), dtype=np.uint64)
    for dim, extent in enumerate(bits.shape[:-1]):
        step = np.uint64(math.prod(shape[dim + 1 : -1]))
        places = (np.arange(extent, dtype=np.uint64) + np.uint64(offsets[dim])) * step
        rows = rows[..., None] + places
    by_row = _spread(rows.ravel())
    words = 8 // bits.itemsize
    width = -(-(offsets[-1] % words + bits.shape[-1]) // words)
    columns = np.zeros(width, dtype=np.uint64)
    total = 0
    flat = bits.reshape(-1, bits.shape[-1])
    run = max(1, _BLOCK_BYTES // (width * 8))
    for start in range(0, len(flat), run):
        block = _words(flat[start : start + run], offsets[-1])
        sums = block.sum(1, dtype=np.uint64)
        total += int((sums * by_row[start : start + run]).sum(dtype=np.uint64))
        columns += block.sum(0, dtype=np.uint64)
    places = np.arange(width, dtype=np.uint64) + np.uint64(offsets[-1] // words)
    total += int((columns * _spread(places ^ _COLUMNS)).sum(dtype=np.uint64))
    return total % (1 << 64)


def _words(rows: NDArray[Any], offset: int) -> NDArray[np.uint64]:
    """Rows, of which the first element has this place in its row, as words that all parts share."""
    words = 8 // rows.itemsize
    before, width = offset % words, rows.shape[1]
    if not before and not width % words:
        return rows.view(np.uint64)
    padded = np.zeros((len(rows), -(-(before + width) // words) * words), dtype=rows.dtype)
    padded[:, before : before + width] = rows
    return padded.view(np.uint64)


def _spread(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Numbers without visible pattern, one for each (the finalizer of SplitMix64)."""
    z = (numbers + np.uint64(1)) * np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(31)
    z *= np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(29)
    return z | np.uint64(1)
