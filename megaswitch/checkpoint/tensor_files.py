"""Tensors of a checkpoint: names and shapes from headers, values in parts.

The safetensors library checks every header before it is believed: its length, the types, and that
the tensors fill the file exactly. What torch adds, where each part of a tensor belongs, is checked
here.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import combinations, pairwise, starmap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaswitch.checkpoint.chunks import Chunk
from megaswitch.checkpoint.safetensors_file import DTYPES, ITEM_BYTES, SafetensorsFile
from megaswitch.log import UserError

if TYPE_CHECKING:
    from torch import Tensor

_PART_BYTES = 1 << 24  # read at a time


@dataclass(frozen=True)
class Part:
    """Where a piece of a tensor lies.

    Attributes:
        file: that holds it.
        offsets: of its first element in the tensor.
        shape: of the piece.
        at: first byte in the file of the array that it is, or that it is a part of.
        stored: shape of that array; None: the piece's own.
        inner: offsets of the piece in that array.
    """

    file: Path
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    at: int
    stored: tuple[int, ...] | None = None
    inner: tuple[int, ...] | None = None


@dataclass
class StoredTensor:
    """A tensor of a checkpoint, whatever the files it is spread over.

    Attributes:
        name: as stored.
        shape: of the whole tensor.
        dtype: in safetensors' words, such as "F32".
        parts: that make it up.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    parts: list[Part] = field(default_factory=list)

    @property
    def count(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """On disk."""
        return self.count * ITEM_BYTES[self.dtype]

    def read(self) -> Iterator[tuple[int, Tensor]]:
        """The values in pieces of bounded size.

        Returns:
            pairs of a position on axis 0 and a piece that begins there; a scalar has one.
        """
        for part in self.parts:
            with opened(part.file) as file:
                piece = file.get_slice(self.name)
                first = part.offsets[0] if part.offsets else 0
                for index in windows(part.shape, ITEM_BYTES[self.dtype], _PART_BYTES):
                    start = index[0].start if index else 0
                    yield first + start, piece[index] if index else file.get_tensor(self.name)


def windows(
    shape: Sequence[int], item_bytes: int, most: int = _PART_BYTES
) -> Iterator[tuple[slice, ...]]:
    """Slices over the leading axes that cover `shape`, in order, in windows of at most `most`."""
    if not shape:
        yield ()
        return
    row = math.prod(shape[1:]) * item_bytes
    if row <= most or len(shape) == 1:
        rows = max(1, most // max(row, 1))
        for start in range(0, shape[0], rows):
            yield (slice(start, min(start + rows, shape[0])),)
        return
    for index in range(shape[0]):
        for rest in windows(shape[1:], item_bytes, most):
            yield (slice(index, index + 1), *rest)


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file, its header checked; nothing else of it is read.

    Raises:
        UserError: it is not one, or is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise UserError(
            f"{path} is damaged or no safetensors file ({error}); use another checkpoint, or copy "
            "this one again"
        ) from error


def read_headers(files: Sequence[Path]) -> dict[str, StoredTensor]:
    """All tensors of the files by name.

    Raises:
        UserError: a file is damaged, or the parts do not make whole tensors.
    """
    tensors: dict[str, StoredTensor] = {}
    for path in files:
        with closing(SafetensorsFile(path)) as file:
            offsets = _offsets(path, file.metadata)
            for name, entry in file.entries.items():
                shape, dtype = entry.shape, entry.dtype
                at = file.first_byte(name)
                part = Part(path, offsets.get(name, (0,) * len(shape)), shape, at)
                tensor = tensors.setdefault(name, StoredTensor(name, shape, dtype))
                tensor.parts.append(part)
                if len(part.offsets) != len(shape) or len(shape) != len(tensor.shape):
                    raise _not_whole(name, path)
                ends = (at + extent for at, extent in zip(part.offsets, shape, strict=True))
                tensor.shape = tuple(map(max, tensor.shape, ends)) if shape else ()
                if dtype != tensor.dtype:
                    raise _not_whole(name, path)
    for tensor in tensors.values():
        held = sum(math.prod(part.shape) for part in tensor.parts)
        if held != tensor.count or not _apart([p for p in tensor.parts if math.prod(p.shape)]):
            raise _not_whole(tensor.name, tensor.parts[0].file.parent)
    return tensors


def _apart(parts: Sequence[Part], dim: int = 0) -> bool:
    """Whether no two parts, alike in the dimensions before `dim`, have an element in common."""
    if len(parts) < 2:
        return True
    if dim == len(parts[0].shape):
        return False
    # Layouts cut tensors along grids: parts that overlap here have the same extent here.
    alike: dict[tuple[int, int], list[Part]] = defaultdict(list)
    for part in parts:
        alike[part.offsets[dim], part.offsets[dim] + part.shape[dim]].append(part)
    extents = sorted(alike)
    if all(before[1] <= after[0] for before, after in pairwise(extents)):
        return all(_apart(group, dim + 1) for group in alike.values())
    return not any(starmap(_overlap, combinations(parts, 2)))


def _overlap(one: Part, other: Part) -> bool:
    return common(one.offsets, one.shape, other.offsets, other.shape) is not None


def _offsets(path: Path, metadata: dict[str, str] | None) -> dict[str, tuple[int, ...]]:
    """Where torch says that the file's parts of tensors begin."""
    try:
        content = json.loads((metadata or {}).get("DCP_SHARDING_INFO", "{}"))
        offsets = {name: tuple(entry["saved_offsets"]) for name, entry in content.items()}
        if any(type(at) is not int or at < 0 for part in offsets.values() for at in part):
            raise ValueError("an offset is no natural number")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path} does not say where its tensors belong ({error!r}); it is damaged: use another "
            "checkpoint"
        ) from error
    return offsets


def read_chunks(path: Path, stored: Mapping[str, StoredTensor], chunks: Sequence[Chunk]) -> None:
    """Fill `chunks` in place from whatever parts the checkpoint has.

    Args:
        path: of the checkpoint.
        stored: its tensors, from `read_headers`.
        chunks: what is wanted of them.

    Raises:
        UserError: it lacks one of them, or has it in another shape.
    """
    wanted: dict[Path, list[tuple[Part, Chunk]]] = defaultdict(list)
    for chunk in chunks:
        tensor = stored.get(chunk.name)
        if tensor is None or tensor.shape != chunk.shape:
            has = "is not there" if tensor is None else f"has shape {list(tensor.shape)}"
            raise UserError(
                f"checkpoint {path} is of another model: {chunk.name} must have shape "
                f"{list(chunk.shape)} and {has}; build the model from the checkpoint's config.toml"
            )
        if tensor.dtype not in DTYPES:
            raise UserError(
                f"checkpoint {path} has {chunk.name} as {tensor.dtype}, and its tensors are "
                f"one of {', '.join(DTYPES)}; it is damaged: use another one"
            )
        for part in tensor.parts:
            if common(part.offsets, part.shape, chunk.offsets, chunk.tensor.shape) is not None:
                wanted[part.file].append((part, chunk))
    for file, pairs in wanted.items():
        with opened(file) as content:
            for part, chunk in pairs:
                _copy_overlap(content, part, chunk)


def common(
    offsets: Sequence[int], sizes: Sequence[int], others: Sequence[int], extents: Sequence[int]
) -> list[tuple[int, int]] | None:
    """Start and end, per dimension of a tensor, of what two regions of it have in common.

    Args:
        offsets: of the one.
        sizes: of the one.
        others: offsets of the other.
        extents: sizes of the other.
    """
    overlap = [
        (max(here, there), min(here + have, there + want))
        for here, have, there, want in zip(offsets, sizes, others, extents, strict=True)
    ]
    return overlap if all(start < end for start, end in overlap) else None


def _copy_overlap(content: Any, part: Part, chunk: Chunk) -> None:
    """Copy what a file's part and `chunk` have in common."""
    overlap = common(part.offsets, part.shape, chunk.offsets, chunk.tensor.shape)
    assert overlap is not None
    if not chunk.shape:
        chunk.tensor.copy_(content.get_tensor(chunk.name))
        return
    source = tuple(slice(a - o, b - o) for (a, b), o in zip(overlap, part.offsets, strict=True))
    target = tuple(slice(a - o, b - o) for (a, b), o in zip(overlap, chunk.offsets, strict=True))
    chunk.tensor[target].copy_(content.get_slice(chunk.name)[source])


def _not_whole(name: str, where: Path) -> UserError:
    return UserError(
        f"the parts of tensor {name} in {where} do not make one whole tensor; the checkpoint is "
        "damaged or incomplete: use another one"
    )
