"""Which rank the others wait for.

A thread of every rank looks twenty times a second whether training waits in a collective there. A
rank that hardly ever waits while the others do is the one that they wait for. What counts is what
the host does: on CUDA that finds a slow host or slow data, and a chip only where its host waits for
it between collectives; `megaswitch doctor` measures chips themselves.
"""

from __future__ import annotations

import statistics
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from megaswitch.parallel.mesh import Mesh
from megaswitch.parallel.places import waits_now

_PERIOD = 0.05  # seconds between two looks
_LEAST_LOOKS = 100  # of a rank before it is judged: five seconds


@dataclass(frozen=True)
class Straggler:
    """The busiest rank, if it is much busier than the others.

    Attributes:
        rank: which.
        busy: share of the time in which it does not wait for others.
        median: the same of the others.
    """

    rank: int
    busy: float
    median: float

    def __str__(self) -> str:
        return (
            f"rank {self.rank} is slow: it is busy for {self.busy:.0%} of the time, the others for "
            f"{self.median:.0%} (median) and wait for it"
        )


class WaitMeter:
    """Looks where the main thread is, while `counting`.

    Args:
        mesh: of the run; a process alone waits for nobody.
        factor: how many times as busy as the median of the others is much.
    """

    def __init__(self, mesh: Mesh, factor: float) -> None:
        self._mesh, self._factor = mesh, factor
        self._looks = self._waits = 0
        self._counts = torch.zeros(mesh.size, 2, dtype=torch.float64)
        self._counting, self._stopped = threading.Event(), threading.Event()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Look on inside, in a thread."""
        if self._mesh.size == 1:
            yield
            return
        thread = threading.Thread(target=self._run, name="waits", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stopped.set()
            thread.join()

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count what happens inside: a training step."""
        self._counting.set()
        try:
            yield
        finally:
            self._counting.clear()

    def summary(self) -> tuple[dict[str, float], Straggler | None]:
        """Metrics since the last call, and a straggler if there is one; ranks call it together."""
        if self._mesh.size == 1:
            return {}, None
        mine = torch.zeros(self._mesh.size, 2, dtype=torch.float64, device=self._mesh.device)
        looks, waits = self._looks, self._waits
        self._looks = self._waits = 0
        mine[self._mesh.rank] = torch.tensor([looks, waits], dtype=torch.float64)
        now = self._mesh.sum_all_(mine).cpu()
        self._counts += now
        looked, waited = now.sum(0).tolist()
        metrics = {"waiting_fraction": waited / max(looked, 1)}
        if self._counts[:, 0].min() < _LEAST_LOOKS:
            return metrics, None
        busy = (1 - self._counts[:, 1] / self._counts[:, 0]).tolist()
        self._counts.zero_()
        return metrics, judge(busy, self._factor)

    def _run(self) -> None:
        while not self._stopped.wait(_PERIOD):
            if self._counting.is_set():
                waits = waits_now(_not_training())
                self._looks += 1
                self._waits += waits


def _not_training() -> Iterator[int]:
    """Threads that write checkpoints and the like; autograd's are not of Python's making."""
    for thread in threading.enumerate():
        if thread is not threading.main_thread() and not thread.name.startswith("Dummy-"):
            yield thread.ident or 0


def judge(busy: list[float], factor: float) -> Straggler | None:
    """The busiest of several ranks, if its share is `factor` times the median of the others'."""
    rank = max(range(len(busy)), key=busy.__getitem__)
    median = statistics.median(busy[:rank] + busy[rank + 1 :])
    if busy[rank] <= factor * median:
        return None
    return Straggler(rank, busy[rank], median)
