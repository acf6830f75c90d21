"""Tensors that are read while they are written, so that memory does not grow with the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaswitch.checkpoint.chunks import Chunk, as_bytes, write_streamed
from megaswitch.checkpoint.safetensors_file import DTYPES, SafetensorsFile
from megaswitch.checkpoint.tensor_files import StoredTensor, windows
from megaswitch.log import UserError

# Told after each piece how many bytes were written.
Advance = Callable[[int], None]
# Given how many there will be.
Progress = Callable[[int], AbstractContextManager[Advance]]


@dataclass(frozen=True)
class Source:
    """A tensor somewhere.

    Attributes:
        name: for messages.
        shape: of it.
        dtype: as stored.
        read: its values in order, in pieces; those of a piece are contiguous in it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Iterator[Tensor]]

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> Source:
        """A tensor in memory, or mapped into it."""
        shape = tuple(tensor.shape)

        def read() -> Iterator[Tensor]:
            for index in windows(shape, tensor.element_size()):
                yield tensor[index]

        return cls(name, shape, tensor.dtype, read)


@dataclass(frozen=True)
class Target:
    """A tensor to be written: one source, or a stack of several along a new first dimension."""

    name: str
    sources: Sequence[Source]
    stacked: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole."""
        inner = self.sources[0].shape
        return (len(self.sources), *inner) if self.stacked else inner

    @property
    def dtype(self) -> torch.dtype:
        """The narrowest that holds what all sources hold."""
        return reduce(torch.promote_types, (s.dtype for s in self.sources))


class Files:
    """safetensors files that stay open while tensors are read from them, in any order."""

    def __init__(self) -> None:
        self._open: dict[Path, SafetensorsFile] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Files:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def get(self, path: Path) -> SafetensorsFile:
        """The file, its header checked."""
        if path not in self._open:
            self._open[path] = file = SafetensorsFile(path)
            self._stack.callback(file.close)
        return self._open[path]

    def source(self, path: Path, name: str) -> Source:
        """A whole tensor of a file."""
        file = self.get(path)
        entry = file.entries[name]
        dtype = _float(name, entry.dtype, path)

        def read() -> Iterator[Tensor]:
            for index in windows(entry.shape, dtype.itemsize):
                yield file.read(name, index)

        return Source(name, entry.shape, dtype, read)

    def stored(self, tensor: StoredTensor, expert: int | None = None) -> Source:
        """A tensor of our checkpoint, whatever parts it lies in, or one of a stack of them."""
        lead = () if expert is None else (slice(expert, expert + 1),)
        shape = tensor.shape[len(lead) :]
        dtype = _float(tensor.name, tensor.dtype, tensor.parts[0].file)

        def read() -> Iterator[Tensor]:
            for index in windows(shape, dtype.itemsize):
                piece = self._assemble(tensor, (*lead, *index), dtype)
                yield piece[0] if lead else piece

        return Source(tensor.name, shape, dtype, read)

    def _assemble(
        self, tensor: StoredTensor, index: tuple[slice, ...], dtype: torch.dtype
    ) -> Tensor:
        """A window of a tensor, put together from the parts that it touches."""
        index += tuple(slice(0, n) for n in tensor.shape[len(index) :])
        result = torch.empty([s.stop - s.start for s in index], dtype=dtype)
        filled = 0
        for part in tensor.parts:
            pairs = list(zip(part.offsets, part.shape, index, strict=True))
            low = [max(at, s.start) for at, _, s in pairs]
            high = [min(at + n, s.stop) for at, n, s in pairs]
            if all(a < b for a, b in zip(low, high, strict=True)):
                box = list(zip(low, high, strict=True))
                there = [
                    slice(a - at, b - at) for (a, b), at in zip(box, part.offsets, strict=True)
                ]
                here = [
                    slice(a - s.start, b - s.start) for (a, b), s in zip(box, index, strict=True)
                ]
                value = self.get(part.file).read(tensor.name, there)
                result[tuple(here)] = value
                filled += value.numel()
        if filled != result.numel():
            raise UserError(
                f"the parts of tensor {tensor.name} overlap or leave holes; the checkpoint is "
                "damaged: use another one"
            )
        return result


def _float(name: str, dtype: str, path: Path) -> torch.dtype:
    if dtype not in DTYPES:
        raise UserError(
            f"{path} has {name} as {dtype}, and only {', '.join(DTYPES)} can be converted; save "
            "the model in one of these"
        )
    return DTYPES[dtype]


def total_bytes(targets: Sequence[Target], dtype: torch.dtype | None) -> int:
    """What `write_targets` writes, but for headers."""
    return sum(math.prod(t.shape) * (dtype or t.dtype).itemsize for t in targets)


def write_targets(
    folder: Path,
    targets: Sequence[Target],
    *,
    names: Callable[[int, int], str],
    shard_bytes: int,
    dtype: torch.dtype | None,
    placed: bool,
    advance: Advance,
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Write all tensors to safetensors files of about equal size.

    Args:
        folder: where.
        targets: what.
        names: a file's name by its number, from 1, and how many there are.
        shard_bytes: size that a file has at most, unless one source alone is larger.
        dtype: what to write; None: what is stored.
        placed: whether stacks may be cut, and files say where their parts belong.
        advance: told of progress.

    Returns:
        length and SHA-256 by file; the file of each tensor (of its last part, where it was cut).

    Raises:
        UserError: a source is damaged, or holds what is no finite number or does not fit `dtype`.
    """
    shards = _shards(targets, shard_bytes, dtype, placed)
    sums: dict[str, dict[str, Any]] = {}
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = names(number, len(shards))
        # Wide types first, so that every tensor is aligned to its type.
        shard.sort(key=lambda pair: -pair[0].tensor.element_size())
        values = (v for chunk, sources in shard for v in _values(chunk, sources, advance))
        sums[name] = write_streamed(
            folder / name, [chunk for chunk, _ in shard], values, placed=placed
        )
        places |= {chunk.name: name for chunk, _ in shard}
    return sums, places


def _shards(
    targets: Sequence[Target], limit: int, dtype: torch.dtype | None, cut: bool
) -> list[list[tuple[Chunk, Sequence[Source]]]]:
    """Chunks without values, and where these come from, file by file."""
    shards: list[list[tuple[Chunk, Sequence[Source]]]] = [[]]
    room = limit
    for target in targets:
        kind = dtype or target.dtype
        each = math.prod(target.sources[0].shape) * kind.itemsize
        first = 0
        while first < len(target.sources):
            left = len(target.sources) - first
            count = min(left, max(room // max(each, 1), 0)) if cut else left
            if count * each > room or not count:
                if shards[-1]:
                    shards.append([])
                    room = limit
                    continue
                count = 1 if cut else left  # larger than any file may be: it gets its own
            taken = target.sources[first : first + count]
            sizes = (count, *taken[0].shape) if target.stacked else taken[0].shape
            offsets = (first, *(0 for _ in taken[0].shape)) if target.stacked else (0,) * len(sizes)
            empty = torch.empty(sizes, dtype=kind, device="meta")
            shards[-1].append((Chunk(target.name, target.shape, offsets, empty), taken))
            room -= count * each
            first += count
    return shards


def _values(chunk: Chunk, sources: Sequence[Source], advance: Advance) -> Iterator[memoryview]:
    """The bytes of a chunk, checked."""
    for source in sources:
        count = 0
        for piece in source.read():
            data = as_bytes(_checked(source.name, piece, chunk.tensor.dtype))
            count += piece.numel()
            yield data
            advance(len(data))
        assert count == math.prod(source.shape), source.name


def _checked(name: str, piece: Tensor, dtype: torch.dtype) -> Tensor:
    low, high = piece.aminmax()  # one pass, no mask; both are NaN if any value is
    if not (low.isfinite() and high.isfinite()):
        raise UserError(
            f"{name} holds NaN or infinity, so no model can compute with it; use a checkpoint from "
            "before they arose"
        )
    largest = max(-low.item(), high.item())
    if largest > torch.finfo(dtype).max:
        raise UserError(
            f"{name} holds values up to {largest:.3g}, and {dtype} ends at "
            f"{torch.finfo(dtype).max:.4g}; use --dtype bf16, or fp32"
        )
    return piece.to(dtype)


def check_equal(first: Source, second: Source, difference: UserError) -> None:
    """Raise `difference` unless both sources have the same values."""
    same = first.shape == second.shape and first.dtype == second.dtype
    if not same or any(
        not torch.equal(a, b) for a, b in zip(first.read(), second.read(), strict=True)
    ):
        raise difference
