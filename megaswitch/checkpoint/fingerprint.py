"""A checksum of a tensor that may be taken of its parts, in any layout, and added up.

It is a sum, modulo 2^64, over the bit patterns of the elements: the sum of each row along the last
dimension times a number that depends on the row's place, and the sum of each column likewise. An
altered element, or a part that lies elsewhere, changes it; who sets out to deceive can keep it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_COLUMNS = np.uint64(0x9E3779B97F4A7C15)  # sets the numbers of columns apart from those of rows


def fingerprint(bits: NDArray[np.unsignedinteger], offsets: Sequence[int], shape: Sequence[int]) -> int:
    """The share of a part in its tensor's checksum, which is the sum of all shares modulo 2^64.

    Args:
        bits: the part's elements as unsigned integers, whatever they mean.
        offsets: of the part in the tensor, per dimension.
        shape: of the tensor.
    """
    if not bits.size:
        return 0
    if not shape:
        bits, offsets, shape = bits.reshape(1), (0,), (1,)
    *leading, width = bits.shape
    rows = np.zeros((), dtype=np.uint64)
    for dim, extent in enumerate(leading):
        step = np.uint64(math.prod(shape[dim + 1 : -1]) % (1 << 64))
        places = (np.arange(extent, dtype=np.uint64) + np.uint64(offsets[dim])) * step
        rows = rows[..., None] + places
    columns = np.arange(width, dtype=np.uint64) + np.uint64(offsets[-1])
    flat = bits.reshape(-1, width)
    by_row, by_column = flat.sum(1, dtype=np.uint64), flat.sum(0, dtype=np.uint64)
    total = int((by_row * _spread(rows.ravel())).sum(dtype=np.uint64))
    total += int((by_column * _spread(columns ^ _COLUMNS)).sum(dtype=np.uint64))
    return total % (1 << 64)


def _spread(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Numbers without visible pattern, one for each (the finalizer of SplitMix64)."""
    z = (numbers + np.uint64(1)) * np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(31)
    z *= np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(29)
    return z | np.uint64(1)
