"""Extent and spread of a checkpoint's tensors, read once and a piece at a time."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megaswitch.checkpoint.tensor_files import StoredTensor


@dataclass
class Stats:
    """Sums over values. NaN and infinities are counted and otherwise left out.

    Attributes:
        finite: how many values are.
        nan: how many are NaN.
        inf: how many are infinite.
        low: least.
        high: greatest.
        total: sum.
        squares: sum of squares.
    """

    finite: int = 0
    nan: int = 0
    inf: int = 0
    low: float = math.inf
    high: float = -math.inf
    total: float = 0.0
    squares: float = 0.0

    def add(self, values: Tensor) -> None:
        """Count a tensor."""
        values = values.double().flatten()
        nan = int(values.isnan().sum())
        kept = values[values.isfinite()]
        self.nan += nan
        self.inf += values.numel() - kept.numel() - nan
        if kept.numel():
            low, high = kept.aminmax()
            part = Stats(
                kept.numel(), 0, 0, low.item(), high.item(), kept.sum().item(),
                kept.square().sum().item(),
            )  # fmt: skip
            self.merge(part)

    def merge(self, other: Stats) -> None:
        """Count what `other` has counted."""
        self.finite += other.finite
        self.nan += other.nan
        self.inf += other.inf
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        self.total += other.total
        self.squares += other.squares

    @property
    def mean(self) -> float:
        """Of the finite values; NaN without any."""
        return self.total / self.finite if self.finite else math.nan

    @property
    def rms(self) -> float:
        """Root mean square of the finite values; NaN without any."""
        return math.sqrt(self.squares / self.finite) if self.finite else math.nan

    def report(self) -> dict[str, float | int]:
        """For `--json`."""
        numbers = {"min": self.low, "max": self.high, "mean": self.mean, "rms": self.rms}
        return numbers | {"nan": self.nan, "inf": self.inf}


def tensor_stats(tensor: StoredTensor, *, by_expert: bool) -> list[Stats]:
    """Of the whole tensor, or of each expert of a stack [E, …]."""
    stats = [Stats() for _ in range(tensor.shape[0] if by_expert else 1)]
    for first, piece in tensor.read():
        if by_expert:
            for expert, values in enumerate(piece, first):
                stats[expert].add(values)
        else:
            stats[0].add(piece)
    return stats


def merged(parts: list[Stats]) -> Stats:
    """One for all."""
    whole = Stats()
    for part in parts:
        whole.merge(part)
    return whole


def spread(name: str, what: str, values: list[float]) -> dict[str, Any]:
    """How far the experts of a layer are apart, and which stand out.

    An expert stands out if its value is more than 4 times another than the median: an expert that
    no token reaches keeps its initial weights, and its gradients' mean square stays near 0.

    Args:
        name: of the parameter.
        what: the values are.
        values: one for each expert.
    """
    median = statistics.median(v if math.isfinite(v) else math.inf for v in values)
    apart = [
        expert
        for expert, v in enumerate(values)
        if not math.isfinite(v) or v * 4 < median or v > 4 * median
    ]
    finite = [v for v in values if math.isfinite(v)]
    return {
        "parameter": name,
        "what": what,
        "min": min(finite, default=math.nan),
        "median": median,
        "max": max(finite, default=math.nan),
        "stand_out": apart,
        "values": values,
    }
