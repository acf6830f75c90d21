"""Tensors read and written in windows, so that memory does not depend on their size.

Files are read with positions and written from start to end; nothing is mapped, since pages of a
mapping count as memory of the process.
"""

from __future__ import annotations

import math
import os
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megaswitch.checkpoint.fingerprint import fingerprint
from megaswitch.checkpoint.integrity import SUM, new_digest
from megaswitch.checkpoint.safetensors_file import ITEM_BYTES
from megaswitch.checkpoint.tensor_files import Part, StoredTensor, common, windows
from megaswitch.log import UserError

Bits = NDArray[Any]

_OPEN = 64  # files that a reader keeps open
_RUN_BYTES = 64 << 10  # shorter runs of bytes are read along with what lies between them
_FLUSH_BYTES = 16 << 20  # written between two requests that the disk take it


class Buffer:
    """Memory that is used again and again; the system gives it page by page, at first use."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._bytes = np.empty(size, dtype=np.uint8)

    def array(self, shape: Sequence[int], item_bytes: int) -> Bits:
        """An array of unsigned integers at the beginning of the buffer."""
        size = math.prod(shape) * item_bytes
        assert size <= self.size, f"{size} bytes do not fit a buffer of {self.size}"
        return self._bytes[:size].view(f"u{item_bytes}").reshape(tuple(shape))


class Reader:
    """Reads windows of stored tensors. Not for several threads at once.

    Args:
        scratch_bytes: that it may use beside what it fills.
    """

    def __init__(self, scratch_bytes: int) -> None:
        self._scratch = Buffer(scratch_bytes)
        self._open: OrderedDict[Path, int] = OrderedDict()

    def close(self) -> None:
        """Close all files."""
        while self._open:
            os.close(self._open.popitem()[1])

    def fill(self, out: Bits, tensor: StoredTensor, offsets: Sequence[int]) -> None:
        """Fill `out` with the region of `tensor` that begins at `offsets`, from all its parts."""
        filled = 0
        for part in tensor.parts:
            overlap = common(part.offsets, part.shape, offsets, out.shape)
            if overlap is None:
                continue
            index = tuple(slice(a - o, b - o) for (a, b), o in zip(overlap, offsets, strict=True))
            inner = part.inner or (0,) * out.ndim
            start = [a - o + i for (a, _), o, i in zip(overlap, part.offsets, inner, strict=True)]
            target = out[index] if index else out
            self._block(part.file, part.at, part.stored or part.shape, start, target)
            filled += target.size
        assert filled == out.size, f"{tensor.name}: {filled} of {out.size} elements were found"

    def _block(
        self, path: Path, at: int, shape: Sequence[int], start: Sequence[int], out: Bits
    ) -> None:
        """Fill `out` with the elements from `start` on of an array of `shape` at byte `at`."""
        item, sizes = out.itemsize, out.shape
        depth = len(sizes)  # dimensions from here on are wanted whole
        while depth and sizes[depth - 1] == shape[depth - 1]:
            depth -= 1
        run = max(depth - 1, 0)
        if run and math.prod(sizes[run:]) * item < _RUN_BYTES:
            run -= 1
        strides = [math.prod(shape[dim + 1 :]) * item for dim in range(len(shape))]
        for index in np.ndindex(*sizes[:run]):
            first = at + sum((s + i) * n for s, i, n in zip(start, index, strides, strict=False))
            self._rows(
                path, first, strides[run:], shape[run:], start[run:], out[index] if index else out
            )

    def _rows(
        self,
        path: Path,
        at: int,
        strides: Sequence[int],
        shape: Sequence[int],
        start: Sequence[int],
        out: Bits,
    ) -> None:
        """As `_block`, for one run of rows with all that lies between what is wanted of them."""
        whole = tuple(shape[1:]) == out.shape[1:]
        if not out.ndim or (whole and out.flags.c_contiguous):
            self.read(path, at + (start[0] * strides[0] if out.ndim else 0), out)
            return
        rows = self._scratch.size // strides[0]
        if not rows:
            for row in range(len(out)):
                self._block(
                    path, at + (start[0] + row) * strides[0], shape[1:], start[1:], out[row]
                )
            return
        index = tuple(slice(s, s + n) for s, n in zip(start[1:], out.shape[1:], strict=True))
        for row in range(0, len(out), rows):
            count = min(rows, len(out) - row)
            scratch = self._scratch.array((count, *shape[1:]), out.itemsize)
            self.read(path, at + (start[0] + row) * strides[0], scratch)
            out[row : row + count] = scratch[(slice(None), *index)]

    def read(self, path: Path, at: int, out: Bits) -> None:
        """Fill a contiguous array with the bytes of a file from `at` on.

        Raises:
            UserError: the file ends before.
        """
        view = out.reshape(-1).view(np.uint8).data
        done = 0
        while done < len(view):
            got = os.preadv(self._descriptor(path), [view[done:]], at + done)
            if not got:
                raise UserError(
                    f"{path} ended while it was read; another program changes it, or the disk is "
                    "failing: stop that, or use another checkpoint"
                )
            done += got

    def _descriptor(self, path: Path) -> int:
        if path in self._open:
            self._open.move_to_end(path)
        else:
            if len(self._open) == _OPEN:
                os.close(self._open.popitem(last=False)[1])
            self._open[path] = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        return self._open[path]


def read_sums(
    path: Path,
    parts: Iterable[tuple[Part, StoredTensor]],
    reader: Reader,
    buffer: Buffer,
    name: str = SUM,
) -> tuple[str, dict[str, int]]:
    """Read a tensor file from start to end.

    Args:
        path: of the file.
        parts: that it holds, with their tensors.
        reader: to read with.
        buffer: for what is being read.
        name: of the checksum.

    Returns:
        its checksum, and the share of its parts in each tensor's `fingerprint`.
    """
    digest = new_digest(name)
    parts = sorted(parts, key=lambda entry: (entry[0].at, math.prod(entry[0].shape)))
    sums: dict[str, int] = defaultdict(int)
    end = parts[0][0].at if parts else path.stat().st_size
    for at in range(0, end, buffer.size):
        head = buffer.array((min(buffer.size, end - at),), 1)
        reader.read(path, at, head)
        digest.update(head.data)
    for part, tensor in parts:
        item = ITEM_BYTES[tensor.dtype]
        at = part.at
        for index in windows(part.shape, item, buffer.size):
            start, sizes = window_region(index, part.shape)
            values = buffer.array(sizes, item)
            reader.read(path, at, values)
            at += values.nbytes
            digest.update(values.reshape(-1).view(np.uint8).data)
            offsets = [o + s for o, s in zip(part.offsets, start, strict=True)]
            sums[tensor.name] += fingerprint(values, offsets, tensor.shape)
    return digest.hexdigest(), dict(sums)


def window_region(
    index: Sequence[slice], shape: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Offsets and sizes of one of the `windows` of `shape`."""
    rest = len(shape) - len(index)
    offsets = tuple(s.start for s in index) + (0,) * rest
    sizes = tuple(s.stop - s.start for s in index) + tuple(shape[len(index) :])
    return offsets, sizes


class Writer:
    """Writes a file from start to end and sums it.

    Args:
        path: of the file; what was there is lost.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.bytes = path, 0
        self.sums: dict[str, int] = defaultdict(int)
        self._digest = new_digest()
        self._begun = 0  # bytes that the disk was asked to take
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
        self._file = os.open(path, flags, 0o666)

    def write(self, data: bytes | memoryview) -> None:
        """Append."""
        view = memoryview(data)
        self._digest.update(view)
        while view:
            done = os.write(self._file, view)
            view = view[done:]
            self.bytes += done
        if self.bytes - self._begun >= _FLUSH_BYTES:
            # Linux starts to write such pages to disk, without waiting, so that the end need not.
            os.posix_fadvise(self._file, self._begun, 0, os.POSIX_FADV_DONTNEED)
            self._begun = self.bytes

    def finish(self) -> dict[str, Any]:
        """Wait until the file is on disk; its size, its checksum and its fingerprints."""
        os.fsync(self._file)
        sums = {name: value % (1 << 64) for name, value in self.sums.items()}
        return {"bytes": self.bytes, SUM: self._digest.hexdigest(), "tensors": sums}

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._file)
