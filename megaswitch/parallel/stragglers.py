"""Ranks that are slower than the others, and in what.

All ranks of a layout wait for the slowest one many times in every step, so that no rank's step
takes longer than another's, and only work done alone tells who is late. Now and then, therefore,
every rank does the same small piece of it: products, as layers do, and calls of the host, which
feeds the device. The third thing that holds ranks up, waiting for data, is measured as it happens.
"""

from __future__ import annotations

import socket
import statistics
import time
from dataclasses import dataclass

import torch

from megaswitch.parallel.mesh import Mesh

_PRODUCTS = {"cpu": (256, torch.float32), "cuda": (2048, torch.bfloat16)}  # size of a product
_REPEATS = 10  # of it; some ten milliseconds on a CPU, one on a GPU
_CALLS = 4000  # of a tiny operation on the host
_MUCH_WAITING = 0.1  # of the time; less is no harm, however much less others wait
_KINDS = (
    "needs {ratio:.1f} times as long as the others for the same products",
    "needs {ratio:.1f} times as long as the others for the same calls on its host",
    "waits for data {mine:.0%} of the time, the others {median:.0%}",
)


@dataclass(frozen=True)
class Straggler:
    """A slow rank.

    Attributes:
        rank: which.
        host: where it runs.
        why: what it is slow in, in words.
    """

    rank: int
    host: str
    why: str

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} is slow: it {self.why}"


class Stragglers:
    """Looks for slow ranks; all ranks build it and call it together.

    Args:
        mesh: the ranks; a process alone is never slow.
        factor: how many times as slow as the median of the others is slow.
    """

    def __init__(self, mesh: Mesh, factor: float) -> None:
        self.mesh, self.factor = mesh, factor
        self._suspects: set[tuple[int, int]] = set()  # kind and rank, of the last look
        self._since = time.perf_counter()

    def look(self, data_seconds: float) -> list[Straggler]:
        """Those that were slow in the same way in this look and in the one before it.

        Args:
            data_seconds: that this rank has waited for data since the last look.
        """
        if self.mesh.size == 1:
            return []
        now = time.perf_counter()
        waiting = data_seconds / (now - self._since)
        self._since = now
        mine = torch.zeros(self.mesh.size, len(_KINDS), dtype=torch.float64)
        mine[self.mesh.rank] = torch.tensor(
            [products(self.mesh.device), calls(), waiting], dtype=torch.float64
        )
        by_kind = self.mesh.sum_all_(mine.to(self.mesh.device)).T.tolist()
        found = {
            (kind, rank): words
            for kind, values in enumerate(by_kind)
            for rank, words in slow_ones(kind, values, self.factor).items()
        }
        confirmed = sorted(self._suspects & found.keys())
        self._suspects = set(found)
        if not confirmed:
            return []
        hosts = self.mesh.gather(socket.gethostname())
        return [Straggler(rank, hosts[rank], found[kind, rank]) for kind, rank in confirmed]


def slow_ones(kind: int, values: list[float], factor: float) -> dict[int, str]:
    """Which of several ranks are slow, and in which words; `values` are seconds, or shares."""
    found = {}
    for rank, mine in enumerate(values):
        median = statistics.median(values[:rank] + values[rank + 1 :])
        least = _MUCH_WAITING if kind == len(_KINDS) - 1 else 0.0
        if mine > max(factor * median, least):
            ratio = mine / median if median else float("inf")
            found[rank] = _KINDS[kind].format(ratio=ratio, mine=mine, median=median)
    return found


def products(device: torch.device) -> float:
    """Seconds that a few products take on this rank's device alone."""
    size, dtype = _PRODUCTS[device.type]
    left = torch.ones(size, size, dtype=dtype, device=device)
    _wait_for(device)
    began = time.perf_counter()
    for _ in range(_REPEATS):
        left @ left
    _wait_for(device)
    return time.perf_counter() - began


def calls() -> float:
    """Seconds that some thousand calls take on this rank's host."""
    number = torch.zeros(())
    began = time.perf_counter()
    for _ in range(_CALLS):
        number.add_(1)
    return time.perf_counter() - began


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
