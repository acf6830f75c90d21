"""safetensors files read by ranges, wherever they lie; nothing in a header is believed unchecked.

The safetensors library maps local files. This reader serves conversions: it also reads from object
stores, and keeps no pages of a file that may be larger than memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaswitch.checkpoint.json_file import parse_json
from megaswitch.log import UserError
from megaswitch.storage import RangedFile

_MAX_HEADER = 64 << 20  # a file with every tensor of the largest Switch has 18 MiB
_MAX_DIMENSIONS = 8
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
ITEM_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"), 1),
}


@dataclass(frozen=True)
class Entry:
    """A tensor of a file: its type in safetensors' words, and where its bytes lie."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class SafetensorsFile:
    """A file whose header has been checked.

    Args:
        path: local, or of an object store.

    Attributes:
        entries: by name.
        metadata: texts that the writer put there.

    Raises:
        UserError: it is no safetensors file, or its header contradicts itself or the file's length.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = RangedFile(path)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
        try:
            if self._file.size < 8:
                raise self._damaged(f"{self._file.size} bytes")
            length = int.from_bytes(self._file.read(0, 8), "little")
            if not 2 <= length <= min(_MAX_HEADER, self._file.size - 8):
                raise self._damaged(f"a header of {length} bytes in {self._file.size}")
            self._data = 8 + length
            self.metadata, self.entries = self._parse(bytes(self._file.read(8, length)))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Give the file back."""
        self._file.close()

    def first_byte(self, name: str) -> int:
        """Where a tensor begins in the file."""
        return self._data + self.entries[name].start

    def read(self, name: str, index: Sequence[slice] = ()) -> Tensor:
        """Values of a tensor, or of the part of it that slices with step 1 cut out.

        Returns:
            [extent of each slice, …], of the stored type; dimensions without a slice are whole.
        """
        entry = self.entries[name]
        if entry.dtype not in DTYPES:
            raise self._damaged(f"{name} of type {entry.dtype}, which is no weight")
        ranges = [range(*s.indices(n)) for s, n in zip(index, entry.shape, strict=False)]
        ranges += [range(n) for n in entry.shape[len(ranges) :]]
        shape = [len(r) for r in ranges]
        dtype = DTYPES[entry.dtype]
        if 0 in shape:
            return torch.empty(shape, dtype=dtype)
        # Trailing dimensions that are whole, and one before them, lie in one piece.
        joined = len(shape)
        while joined and shape[joined - 1] == entry.shape[joined - 1]:
            joined -= 1
        lead = max(joined - 1, 0)
        run = math.prod(shape[lead:]) * dtype.itemsize
        data = bytearray()
        for start in _starts(entry.shape, ranges, lead):
            data += self._file.read(self.first_byte(name) + start * dtype.itemsize, run)
        return torch.frombuffer(data, dtype=dtype).view(shape)

    def _parse(self, header: bytes) -> tuple[dict[str, str], dict[str, Entry]]:
        try:
            content = parse_json(header, self.path)
        except UserError as error:
            raise self._damaged(f"a header that cannot be read; {error}") from error
        metadata = content.pop("__metadata__", {}) if isinstance(content, dict) else None
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise self._damaged("a header that is no table of tensors")
        entries = {name: self._entry(name, value) for name, value in content.items()}
        end = 0
        for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
            if entry.start != end:
                raise self._damaged(f"{name} at {entry.start}, where {end} is free")
            end = entry.end
        if self._data + end != self._file.size:
            raise self._damaged(f"{end} bytes of tensors in a file of {self._file.size} bytes")
        return metadata, entries

    def _entry(self, name: str, value: Any) -> Entry:
        try:
            dtype, shape = value["dtype"], tuple(value["shape"])
            start, end = value["data_offsets"]
            numbers = (*shape, start, end)
            if any(type(n) is not int or n < 0 for n in numbers) or len(shape) > _MAX_DIMENSIONS:
                raise ValueError(f"shape {list(shape)} at {start} to {end}")
            if dtype not in ITEM_BYTES:
                raise ValueError(f"type {dtype}")
        except (KeyError, TypeError, ValueError) as error:
            raise self._damaged(f"{name} with a wrong description ({error!r:.200})") from error
        if end - start != math.prod(shape) * ITEM_BYTES[dtype]:
            raise self._damaged(
                f"{name} of type {dtype} and shape {list(shape)} in {end - start} bytes"
            )
        return Entry(dtype, shape, start, end)

    def _damaged(self, what: str) -> UserError:
        return UserError(
            f"{self.path} is damaged or no safetensors file: it has {what}; copy it again from "
            "where it came"
        )


def _starts(shape: Sequence[int], ranges: Sequence[range], lead: int) -> Iterator[int]:
    """Elements before each run that is read: one run for every index of the first `lead`."""
    strides = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
    inner = sum(r.start * s for r, s in zip(ranges[lead:], strides[lead:], strict=True))
    indices = [0]
    for r, stride in zip(ranges[:lead], strides[:lead], strict=True):
        indices = [before + i * stride for before in indices for i in r]
    for outer in indices:
        yield outer + inner
