"""Whose kernels run: those of the device that a tensor lies on, or of one that is only rehearsed.

Code that chooses by device (a loop of GEMMs on a CPU, one grouped GEMM on a GPU) asks here, so that
a rehearsal without a GPU (`megaswitch.scale`) takes the way that a GPU would. A backend
(`backend.py`) may give a linear map a `Kernel` of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

_REHEARSED: ContextVar[str | None] = ContextVar("rehearsed device type", default=None)


def kernels_of(x: Tensor) -> str:
    """The type of the device whose kernels work on x: "cpu", "cuda", …"""
    return _REHEARSED.get() or x.device.type


@contextmanager
def rehearse(kind: str) -> Iterator[None]:
    """Inside, choose as for a device of this type."""
    token = _REHEARSED.set(kind)
    try:
        yield
    finally:
        _REHEARSED.reset(token)


@dataclass(frozen=True)
class Rows:
    """Rows sorted by expert.

    Attributes:
        ends: [n] int32, where those of each of n experts end; rows behind the last are nothing.
        first: number of the first of these experts among the rank's.
    """

    ends: Tensor
    first: int

    def expert(self, number: int) -> Tensor:
        """[number] int64: which of the n experts each row is of; n behind the last."""
        places = torch.arange(number, device=self.ends.device, dtype=self.ends.dtype)
        return torch.searchsorted(self.ends, places, right=True)


# Of x [..., in] and a weight [..., out, in]: [..., out].
Product = Callable[[Tensor, Tensor], Tensor]


class Kernel(Protocol):
    """A linear map's own way to multiply."""

    def __call__(
        self, x: Tensor, weight: Tensor, product: Product, rows: Rows | None = None
    ) -> Tensor:
        """Multiply.

        Args:
            x: [..., in]; [N, in] if the map is a stack of experts.
            weight: [out, in] of this rank; or [n, out, in], of experts.
            product: what would be done without this kernel, which may make use of it.
            rows: which expert works on which rows, of experts.
        """
        ...


class LinearMap(Protocol):
    """A module that multiplies."""

    weight: nn.Parameter
    kernel: Kernel | None


def as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the type in which autocast, if it is on, would multiply them."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(t.to(dtype) for t in tensors)
