"""Curves of runs: their values by step, and when they reach a level."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Curve = Sequence[tuple[int, float]]  # (step, value), by step
_END = 0.1  # of a run's steps: what the end of a noisy curve is averaged over


def curve(metrics: Iterable[Mapping[str, Any]], key: str) -> Curve:
    """The finite values of one metric, where it was logged."""
    return [(m["step"], m[key]) for m in metrics if key in m and is_number(m[key])]


def is_number(value: Any) -> bool:
    """Whether it is one that can be drawn and averaged."""
    return type(value) in (int, float) and math.isfinite(value)


def end(points: Curve) -> float:
    """The last value; of a metric logged more often than validated, the mean of the last tenth."""
    last = points[-1][0]
    late = [value for step, value in points if step > last * (1 - _END)]
    return statistics.fmean(late)


def steps_to(points: Curve, level: float) -> float | None:
    """Where a falling curve first reaches `level`, on the straight line between two points.

    None: it does not. At or before its first point, that point's step.
    """
    if points and points[0][1] <= level:
        return float(points[0][0])
    for (step, value), (next_step, next_value) in itertools.pairwise(points):
        if next_value <= level:
            return step + (next_step - step) * (value - level) / (value - next_value)
    return None


@dataclass(frozen=True)
class Spread:
    """Several seeds' values of one thing.

    Attributes:
        mean: of them.
        deviation: the sample's standard deviation; None of a single one.
        count: how many.
    """

    mean: float
    deviation: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        deviation = statistics.stdev(values) if len(values) > 1 else None
        return cls(statistics.fmean(values), deviation, len(values))

    def text(self, digits: int) -> str:
        """Such as "3.803 ± 0.012"."""
        mean = f"{self.mean:,.{digits}f}"
        return mean if self.deviation is None else f"{mean} ± {self.deviation:,.{digits}f}"


def mean_curve(curves: Sequence[Curve]) -> list[tuple[int, Spread]]:
    """Mean and spread of curves at the steps that all of them have."""
    common = set.intersection(*({step for step, _ in points} for points in curves))
    tables = [dict(points) for points in curves]
    return [(step, Spread.of([table[step] for table in tables])) for step in sorted(common)]
