"""Memory for big gradients that is used again, step after step.

An allocator gives blocks of this size back to the kernel when they are freed, and each page of a
fresh one costs a fault when it is first written: on a CPU, the gradient of a stack of experts takes
longer to fault in than to compute.
"""

from __future__ import annotations

import threading
import weakref

import torch
from torch import Tensor


class _Block:
    """Memory on the CPU, lent to one tensor (and its views) at a time."""

    def __init__(self, size: int) -> None:
        self.array = torch.empty(size, dtype=torch.uint8).numpy()
        self.user: weakref.ref[object] | None = None

    @property
    def idle(self) -> bool:
        """True once no storage lies on the memory, whoever may have kept a reference to one."""
        return self.user is None or self.user() is None

    def lend(self, dtype: torch.dtype, shape: torch.Size) -> Tensor:
        # A tensor made from a numpy array keeps that very array alive as long as its storage, so a
        # view of ours, handed out once, tells by its death that nothing uses the memory any more.
        view = self.array.view()
        self.user = weakref.ref(view)
        return torch.from_numpy(view).view(dtype).view(shape)


class GradientMemory:
    """Blocks for gradients; a gradient that is still referred to anywhere keeps its block.

    Which block a tensor gets is invisible but for the time it takes: all are uninitialised.
    """

    def __init__(self) -> None:
        self._blocks: list[_Block] = []
        self._lock = threading.Lock()

    def empty_like(self, tensor: Tensor) -> Tensor:
        """An uninitialised contiguous tensor of `tensor`'s shape and dtype, on the CPU."""
        with self._lock:
            idle = [block for block in self._blocks if block.idle]
            block = next((b for b in idle if b.array.nbytes == tensor.nbytes), None)
            if block is None:
                # Blocks that lie idle now are of sizes gone by, or too few were ever needed.
                self._blocks = [b for b in self._blocks if b not in idle]
                block = _Block(tensor.nbytes)
                self._blocks.append(block)
            return block.lend(tensor.dtype, tensor.shape)

    def forget(self) -> None:
        """Keep no block: the lent ones are freed with their gradients."""
        with self._lock:
            self._blocks = []
