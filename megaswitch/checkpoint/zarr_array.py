"""Arrays in zarr's version 2 format, one folder each, as T5X writes them through TensorStore.

Chunks are unpacked into no more than their stated size, one by one, so that neither a lying header
nor a bomb costs memory. Source: the zarr specification, version 2.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import zstandard
from torch import Tensor

from megaswitch.checkpoint.json_file import read_table
from megaswitch.log import UserError
from megaswitch.storage import member, read_small

_MAX_HEADER = 1 << 20
_MAX_CHUNK = 1 << 30  # T5X aims at 64 MiB
_KEPT_BYTES = 256 << 20  # of unpacked chunks
_MAX_DIMENSIONS = 8
# T5X before its version 3 wrote bfloat16 under the name of the integers of that size.
_DTYPES = {
    "<f8": torch.float64,
    "<f4": torch.float32,
    "<f2": torch.float16,
    "bfloat16": torch.bfloat16,
    "<u2": torch.bfloat16,
}


class ZarrArray:
    """An array whose header has been checked against the files beside it.

    Args:
        folder: local, or of an object store.

    Attributes:
        shape: of the array.
        dtype: of its values.

    Raises:
        UserError: it is no such array, or not all of it is there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        header = read_table(member(folder, ".zarray"), _MAX_HEADER)
        self.shape = self._sizes(header, "shape", 0)
        self._chunk = self._sizes(header, "chunks", 1)
        dtype = header.get("dtype")
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            raise self._refused(f"values of type {dtype!r}; known are {', '.join(_DTYPES)}")
        self.dtype = _DTYPES[dtype]
        self._bytes = math.prod(self._chunk) * self.dtype.itemsize
        self._unpack = self._codec(header.get("compressor"))
        plain = {"zarr_format": 2, "filters": None, "order": "C", "dimension_separator": "."}
        for key, value in plain.items():
            if header.get(key, value) != value:
                raise self._refused(f"{key} {header[key]!r}, and only {value!r} is read")
        if len(self.shape) != len(self._chunk) or self._bytes > _MAX_CHUNK:
            raise self._refused(f"chunks {list(self._chunk)} of an array {list(self.shape)}")
        grid = math.prod(-(-n // c) for n, c in zip(self.shape, self._chunk, strict=True))
        files = sum(not path.name.startswith(".") for path in folder.iterdir())
        if files != grid:
            raise self._refused(f"{files} chunks where its shape {list(self.shape)} makes {grid}")
        self._kept: OrderedDict[tuple[int, ...], Tensor] = OrderedDict()

    def read(self, index: Sequence[slice]) -> Tensor:
        """The part that slices with step 1, one for each dimension, cut out."""
        ranges = [range(*s.indices(n)) for s, n in zip(index, self.shape, strict=True)]
        result = torch.empty([len(r) for r in ranges], dtype=self.dtype)
        touched = (
            range(r.start // c, -(-r.stop // c)) for r, c in zip(ranges, self._chunk, strict=True)
        )
        for place in itertools.product(*touched):
            here, there = [], []
            for p, c, r in zip(place, self._chunk, ranges, strict=True):
                low, high = max(p * c, r.start), min((p + 1) * c, r.stop)
                here.append(slice(low - r.start, high - r.start))
                there.append(slice(low - p * c, high - p * c))
            result[tuple(here)] = self._load(place)[tuple(there)]
        return result

    def _load(self, place: tuple[int, ...]) -> Tensor:
        if place in self._kept:
            self._kept.move_to_end(place)
            return self._kept[place]
        path = member(self.folder, ".".join(map(str, place)) or "0")
        packed = read_small(path, self._bytes + self._bytes // 100 + 4096)
        try:
            data = self._unpack(packed, self._bytes)
        except (zlib.error, zstandard.ZstdError) as error:
            raise UserError(f"{path} is damaged ({error}); copy it again") from error
        if len(data) != self._bytes:
            raise UserError(
                f"{path} unpacks to {'more' if len(data) > self._bytes else 'less'} than the "
                f"{self._bytes} bytes of a chunk; it is damaged: copy it again"
            )
        while self._kept and (len(self._kept) + 1) * self._bytes > _KEPT_BYTES:
            self._kept.popitem(last=False)
        chunk = torch.frombuffer(bytearray(data), dtype=self.dtype).view(self._chunk)
        self._kept[place] = chunk
        return chunk

    def _codec(self, compressor: object) -> Callable[[bytes, int], bytes]:
        name = compressor.get("id") if isinstance(compressor, dict) else compressor
        if name is None:
            return lambda packed, _: packed
        if name in ("gzip", "zlib"):
            # 32: either of the two headers. One byte more tells a chunk that is too long.
            return lambda packed, size: zlib.decompressobj(32 + 15).decompress(packed, size + 1)
        if name == "zstd":
            return _unpack_zstd
        raise self._refused(f"chunks packed by {name!r}, and only gzip, zlib and zstd are read")

    def _sizes(self, header: dict[str, object], key: str, least: int) -> tuple[int, ...]:
        sizes = header.get(key)
        if not isinstance(sizes, list) or len(sizes) > _MAX_DIMENSIONS:
            raise self._refused(f"{key} {str(sizes)[:80]}")
        if any(type(n) is not int or not least <= n < 1 << 48 for n in sizes):
            raise self._refused(f"{key} {str(sizes)[:80]}")
        return tuple(sizes)

    def _refused(self, what: str) -> UserError:
        return UserError(
            f"{self.folder} is no whole array in zarr's format 2 as T5X writes it: it has {what}; "
            "copy it again from where it came"
        )


def _unpack_zstd(packed: bytes, size: int) -> bytes:
    with zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(packed) as reader:
        return reader.read(size + 1)
