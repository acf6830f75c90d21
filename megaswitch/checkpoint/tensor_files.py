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
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaswitch.checkpoint.chunks import Chunk
from megaswitch.checkpoint.safetensors_file import ITEM_BYTES, SafetensorsFile
from megaswitch.log import UserError

if TYPE_CHECKING:
    from torch import Tensor

_PART_BYTES = 1 << 24  # read at a time


@dataclass(frozen=True)
class Part:
    """Where a piece of a tensor lies: its file, and the offset of its first element."""

    file: Path
    offsets: tuple[int, ...]
    shape: tuple[int, ...]


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
                for index in windows(part.shape, ITEM_BYTES[self.dtype]):
                    start = index[0].start if index else 0
                    yield first + start, piece[index] if index else file.get_tensor(self.name)


def windows(shape: Sequence[int], item_bytes: int) -> Iterator[tuple[slice, ...]]:
    """Slices over the leading axes that cover `shape` in windows of at most `_PART_BYTES`."""
    if not shape:
        yield ()
        return
    row = math.prod(shape[1:]) * item_bytes
    if row <= _PART_BYTES or len(shape) == 1:
        rows = max(1, _PART_BYTES // max(row, 1))
        for start in range(0, shape[0], rows):
            yield (slice(start, min(start + rows, shape[0])),)
        return
    for index in range(shape[0]):
        for rest in windows(shape[1:], item_bytes):
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
                part = Part(path, offsets.get(name, (0,) * len(shape)), shape)
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
        if held != tensor.count or len({part.offsets for part in tensor.parts}) < len(tensor.parts):
            raise _not_whole(tensor.name, tensor.parts[0].file.parent)
    return tensors


def _offsets(path: Path, metadata: dict[str, str] | None) -> dict[str, tuple[int, ...]]:
    """Where torch says that the file's parts of tensors begin."""
    try:
        content = json.loads((metadata or {}).get("DCP_SHARDING_INFO", "{}"))
        offsets = {name: tuple(entry["saved_offsets"]) for name, entry in content.items()}
        if any(type(at) is not int or at < 0 for part in offsets.values() for at in part):
            raise ValueError("an offset is no natural number")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
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
        for part in tensor.parts:
            wanted[part.file].append((part, chunk))
    for file, pairs in wanted.items():
        with opened(file) as content:
            for part, chunk in pairs:
                _copy_overlap(content, part, chunk)


def _copy_overlap(content: Any, part: Part, chunk: Chunk) -> None:
    """Copy what a file's part and `chunk` have in common."""
    if not chunk.shape:
        chunk.tensor.copy_(content.get_tensor(chunk.name))
        return
    source, target = [], []
    for here, have, there, want in zip(
        part.offsets, part.shape, chunk.offsets, chunk.tensor.shape, strict=True
    ):
        start, end = max(here, there), min(here + have, there + want)
        if start >= end:
            return
        source.append(slice(start - here, end - here))
        target.append(slice(start - there, end - there))
    chunk.tensor[tuple(target)].copy_(content.get_slice(chunk.name)[tuple(source)])


def _not_whole(name: str, where: Path) -> UserError:
    return UserError(
        f"the parts of tensor {name} in {where} do not make one whole tensor; the checkpoint is "
        "damaged or incomplete: use another one"
    )
