"""Memory on the CPU that holds what is being written while training goes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megaswitch.checkpoint.chunks import Chunk


@dataclass(frozen=True)
class Staged:
    """Chunks that hold still, complete once `wait` returns.

    Attributes:
        chunks: to be written.
        copied: happens when a GPU's copies have arrived.
    """

    chunks: list[Chunk]
    copied: torch.cuda.Event | None = None

    def wait(self) -> None:
        """Until the copies have arrived."""
        if self.copied:
            self.copied.synchronize()


class Staging:
    """Buffers for the chunks that a rank writes, allocated by the first save and used by all."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def copy(self, chunks: Sequence[Chunk]) -> Staged:
        """Copy `chunks`; they may change as soon as this returns.

        The copies from a GPU are only queued, in the current stream. What changes the tensors later
        in that stream waits for them there, and nothing waits here.
        """
        kept = {c.name: self._buffer(c) for c in chunks}
        self._buffers = kept
        for chunk in chunks:
            kept[chunk.name].copy_(chunk.tensor, non_blocking=True)
        on_gpu = any(c.tensor.is_cuda for c in chunks)
        copied = torch.cuda.current_stream().record_event() if on_gpu else None
        return Staged([replace(c, tensor=kept[c.name]) for c in chunks], copied)

    def _buffer(self, chunk: Chunk) -> Tensor:
        tensor, buffer = chunk.tensor, self._buffers.get(chunk.name)
        if buffer is not None and (buffer.shape, buffer.dtype) == (tensor.shape, tensor.dtype):
            return buffer
        # A GPU copies in the background only to page-locked memory.
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
