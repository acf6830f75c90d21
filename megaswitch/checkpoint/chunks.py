"""Parts of global tensors: which rank writes which, and the safetensors files they lie in.

A file says where its parts belong in the way of `torch.distributed.checkpoint`, so that torch's
`HuggingFaceStorageReader` reads our folders, and we read those that its writer made. We do not
write through it: it copies all tensors twice to serialise them and keeps the interpreter's lock
meanwhile, which stalls the training that a background save must not touch.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaswitch.checkpoint.integrity import SUM, new_digest
from megaswitch.checkpoint.safetensors_file import DTYPES
from megaswitch.storage import writing

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_PIECE_BYTES = 16 << 20  # summed and written at a time

# Name, shape and offsets of a chunk, its sizes and its bytes: what other ranks need to know.
Place = tuple[str, tuple[int, ...], tuple[int, ...], tuple[int, ...], int]


@dataclass(frozen=True)
class Chunk:
    """A part of a global tensor that lies on this rank.

    Attributes:
        name: of the global tensor.
        shape: of the global tensor.
        offsets: of the part in it, per dimension.
        tensor: the part.
    """

    name: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    tensor: Tensor

    @classmethod
    def whole(cls, name: str, tensor: Tensor) -> Chunk:
        """A tensor that is not divided."""
        return cls(name, tuple(tensor.shape), (0,) * tensor.ndim, tensor)

    @property
    def place(self) -> Place:
        """Everything but the values."""
        sizes = tuple(self.tensor.shape)
        return self.name, self.shape, self.offsets, sizes, self.tensor.nbytes


def shares(held: Sequence[Sequence[Place]]) -> list[set[str]]:
    """Share out the writing, so that each part is written once and ranks write about as much.

    Args:
        held: the parts that each rank holds, at most one of each tensor.

    Returns:
        for each rank, the names of the parts that it writes.
    """
    holders: dict[Place, list[int]] = defaultdict(list)
    for rank, places in enumerate(held):
        for place in places:
            if math.prod(place[3]):
                holders[place].append(rank)
    writes = share_out(holders, len(held))
    return [{place[0] for place in mine} for mine in writes]


def share_out(holders: Mapping[Place, Sequence[int]], ranks: int) -> list[list[Place]]:
    """Give each part, none of them empty, to one of the ranks that hold it, evenly by bytes."""
    _check_cover(holders)
    load = [0] * ranks
    writes: list[list[Place]] = [[] for _ in range(ranks)]
    for place in sorted(holders, key=lambda place: (-place[4], place)):
        rank = min(holders[place], key=lambda rank: load[rank])
        load[rank] += place[4]
        writes[rank].append(place)
    return writes


def shard_name(rank: int, ranks: int) -> str:
    """The file of a rank."""
    return f"shard-{rank + 1:05d}-of-{ranks:05d}.safetensors"


def _check_cover(places: Iterable[Place]) -> None:
    """The parts must make whole tensors; anything else is our own mistake."""
    filled: dict[tuple[str, tuple[int, ...]], int] = defaultdict(int)
    for name, shape, _, sizes, _ in places:
        filled[name, shape] += math.prod(sizes)
    names = Counter(name for name, _ in filled)
    wrong = [
        f"{name} {list(shape)}"
        for (name, shape), count in filled.items()
        if count != math.prod(shape) or names[name] > 1
    ]
    assert not wrong, f"the ranks' parts do not make whole tensors: {'; '.join(wrong[:5])}"


def write_chunks(path: Path, chunks: Sequence[Chunk]) -> dict[str, Any]:
    """Write a safetensors file; it is on disk when this returns.

    Beside the tensors it needs memory for a piece of them, or for one tensor of another device.

    Args:
        path: of the file.
        chunks: at most one of each tensor.

    Returns:
        the file's length in bytes and its checksum.
    """
    # Wide types first, so that every tensor is aligned to its type.
    chunks = sorted(chunks, key=lambda c: (-c.tensor.element_size(), c.name))
    return write_streamed(path, chunks, (as_bytes(chunk.tensor) for chunk in chunks))


def write_streamed(
    path: Path, chunks: Sequence[Chunk], values: Iterable[memoryview], *, placed: bool = True
) -> dict[str, Any]:
    """Write a safetensors file whose values come as they are written.

    Args:
        path: of the file, which may lie in an object store.
        chunks: at most one of each tensor, in order; their tensors may be on the meta device.
        values: all bytes of the chunks in order, in pieces of any length.
        placed: whether the file says where chunks belong, as our checkpoints do.

    Returns:
        the file's length in bytes and its checksum.
    """
    digest, length = new_digest(), 0
    with writing(path) as file:
        start = memoryview(file_head(chunks, placed=placed))
        for data in chain([start], values):
            for at in range(0, len(data), _PIECE_BYTES):
                piece = data[at : at + _PIECE_BYTES]
                # Both let other threads run meanwhile.
                digest.update(piece)
                file.write(piece)
            length += len(data)
    return {"bytes": length, SUM: digest.hexdigest()}


def file_head(chunks: Sequence[Chunk], *, placed: bool = True) -> bytes:
    """What a safetensors file of the chunks, in this order, begins with; their values follow.

    It is JSON, padded to a multiple of 8 bytes, after its length.
    """
    metadata = {"format": "pt"}
    if placed:
        places = {chunk.name: {"saved_offsets": chunk.offsets} for chunk in chunks}
        metadata |= {"DCP_SHARDING_INFO": json.dumps(places), "DCP_VERSION": "1.0"}
    head: dict[str, Any] = {"__metadata__": metadata}
    start = 0
    for chunk in chunks:
        end = start + chunk.tensor.nbytes
        head[chunk.name] = {
            "dtype": _NAMES[chunk.tensor.dtype],
            "shape": list(chunk.tensor.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def as_bytes(tensor: Tensor) -> memoryview:
    """The values as bytes; shares the memory of a contiguous tensor on the CPU."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
