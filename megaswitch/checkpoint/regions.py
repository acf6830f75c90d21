"""In which windows the tensors of several files are best read, when these are written in step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from megaswitch.checkpoint.placement import Piece
from megaswitch.checkpoint.safetensors_file import ITEM_BYTES
from megaswitch.checkpoint.tensor_files import StoredTensor, windows
from megaswitch.checkpoint.windows import window_region

# A piece, and the rank in whose file it lies.
Placed = tuple[int, Piece]


@dataclass(frozen=True)
class Region:
    """A window of a tensor.

    Attributes:
        name: of the tensor.
        offsets: of the window, per dimension.
        sizes: of the window, per dimension.
        pieces: that have a part in it, if any do.
    """

    name: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    pieces: Sequence[Placed]


def regions(
    files: Mapping[int, Sequence[Piece]], stored: Mapping[str, StoredTensor], most: int
) -> Iterator[Region]:
    """Windows of at most `most` bytes, in an order in which each file is written start to end.

    Rows of a tensor that are divided among the files are read once. (Row after row of the whole
    tensor is also row after row of each piece.)

    Args:
        files: pieces by rank, in the order of their files.
        stored: where they come from; types may differ.
        most: bytes.
    """
    placed: dict[tuple[int, str], list[Placed]] = defaultdict(list)
    for rank, pieces in files.items():
        for piece in pieces:
            placed[piece.order].append((rank, piece))
    for (_, name), group in sorted(placed.items()):
        item = max(ITEM_BYTES[stored[name].dtype], ITEM_BYTES[group[0][1].dtype])
        for cluster in _clusters(group):
            low, sizes = _box([piece for _, piece in cluster])
            for index in windows(sizes, item, most):
                start, extents = window_region(index, sizes)
                offsets = tuple(a + b for a, b in zip(low, start, strict=True))
                yield Region(name, offsets, extents, cluster)


def _clusters(pieces: Sequence[Placed]) -> Iterator[list[Placed]]:
    """Pieces of a tensor that share rows of the first dimension."""
    cluster: list[Placed] = []
    end = 0
    for rank, piece in sorted(pieces, key=lambda entry: entry[1].offsets):
        first, extent = (piece.offsets[0], piece.sizes[0]) if piece.shape else (0, 1)
        if cluster and first >= end:
            yield cluster
            cluster = []
        cluster.append((rank, piece))
        end = max(end, first + extent)
    if cluster:
        yield cluster


def _box(pieces: Sequence[Piece]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Offsets and sizes of the least region that has all pieces in it."""
    dims = range(len(pieces[0].shape))
    low = [min(p.offsets[d] for p in pieces) for d in dims]
    high = [max(p.offsets[d] + p.sizes[d] for p in pieces) for d in dims]
    return tuple(low), tuple(b - a for a, b in zip(low, high, strict=True))
