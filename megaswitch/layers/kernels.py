"""Whose kernels run: those of the device that a tensor lies on, or of one that is only rehearsed.

Code that chooses by device (a loop of GEMMs on a CPU, one grouped GEMM on a GPU) asks here, so that
a rehearsal without a GPU (`megaswitch.scale`) takes the way that a GPU would.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

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
