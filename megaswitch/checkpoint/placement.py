"""Which rank of a layout holds which part of which tensor, and the files that follow from it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from megaswitch.checkpoint.chunks import Chunk, Place, file_head, share_out
from megaswitch.checkpoint.contents import MODEL, STATE, state_dims
from megaswitch.checkpoint.safetensors_file import DTYPES, ITEM_BYTES

# Offsets and sizes of a part of a global tensor.
Region = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class Held:
    """A parameter as a layout divides it.

    Attributes:
        shape: of the global tensor.
        parts: the ranks that hold each part.
    """

    shape: tuple[int, ...]
    parts: Mapping[Region, list[int]]


@dataclass(frozen=True)
class Piece:
    """A part of a global tensor as it lies in a file.

    Attributes:
        name: of the global tensor.
        shape: of the global tensor.
        offsets: of the part in it, per dimension.
        sizes: of the part, per dimension.
        dtype: in safetensors' words, such as "F32".
    """

    name: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    dtype: str

    @property
    def count(self) -> int:
        """Elements."""
        return math.prod(self.sizes)

    @property
    def bytes(self) -> int:
        """On disk."""
        return self.count * ITEM_BYTES[self.dtype]

    @property
    def order(self) -> tuple[int, str]:
        """Its place in its file: wide types first, so that each tensor is aligned to its type."""
        return -ITEM_BYTES[self.dtype], self.name


def tensor_names(held: Mapping[str, Held], keys: Mapping[str, list[str]]) -> Iterator[str]:
    """The tensors of a checkpoint: parameters, and their optimizer states `keys`."""
    for name in held:
        yield f"{MODEL}{name}"
        yield from (f"{STATE}{name}.{key}" for key in keys.get(name, ()))


def place_pieces(
    held: Mapping[str, Held], keys: Mapping[str, list[str]], dtypes: Mapping[str, str], ranks: int
) -> list[list[Piece]]:
    """What the file of each rank holds: parts that the rank itself reads, and no others.

    What several ranks read lies once, in the file of one of them; so files are about as large.

    Args:
        held: of each parameter.
        keys: of the optimizer states of each parameter; empty for none.
        dtypes: of every tensor of the checkpoint.
        ranks: of the layout.
    """
    holders: dict[Place, list[int]] = defaultdict(list)
    for name, parameter in held.items():
        parts = {region: r for region, r in parameter.parts.items() if math.prod(region[1])}
        for (offsets, sizes), members in parts.items():
            stored = f"{MODEL}{name}"
            size = math.prod(sizes) * ITEM_BYTES[dtypes[stored]]
            holders[stored, parameter.shape, offsets, sizes, size] = members
        for key in keys.get(name, ()):
            stored = f"{STATE}{name}.{key}"
            shape = state_dims(key, parameter.shape)
            for (offsets, sizes), members in parts.items():
                offsets, sizes = state_dims(key, offsets), state_dims(key, sizes)
                size = math.prod(sizes) * ITEM_BYTES[dtypes[stored]]
                holders[stored, shape, offsets, sizes, size] += members
    files = []
    for places in share_out(holders, ranks):
        pieces = (Piece(*place[:4], dtypes[place[0]]) for place in places)
        files.append(sorted(pieces, key=lambda piece: piece.order))
    return files


def head_of(pieces: Sequence[Piece]) -> bytes:
    """What the file of these pieces begins with; their values follow in this order."""
    chunks = []
    for piece in pieces:
        shape_only = torch.empty(piece.sizes, dtype=DTYPES[piece.dtype], device="meta")
        chunks.append(Chunk(piece.name, piece.shape, piece.offsets, shape_only))
    return file_head(chunks)
