"""From the metrics of runs to the study's numbers, table and picture."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

WINDOW = 200  # steps: what the end of a noisy curve is averaged over
Metrics = Sequence[Mapping[str, Any]]  # the lines of a run's metrics.jsonl
Curve = Sequence[tuple[int, float]]  # (step, value), by step


def curve(metrics: Metrics, key: str) -> Curve:
    """The values of one metric, where it was logged."""
    return [(m["step"], m[key]) for m in metrics if key in m]


def end(points: Curve) -> float:
    """Mean of a curve over its last `WINDOW` steps."""
    return statistics.fmean(value for step, value in points if step > points[-1][0] - WINDOW)


def smooth(points: Curve) -> Curve:
    """Each value replaced by the mean over the `WINDOW` steps up to it."""
    return [(step, end(points[: i + 1])) for i, (step, _) in enumerate(points)]


def steps_to(points: Curve, level: float) -> float | None:
    """Where a falling curve first reaches `level`, on the straight line between two points."""
    if points[0][1] <= level:
        return float(points[0][0])
    for (step, value), (next_step, next_value) in itertools.pairwise(points):
        if next_value <= level:
            return step + (next_step - step) * (value - level) / (value - next_value)
    return None


def minus(points: Curve, base: Curve) -> Curve:
    """The difference of two curves with the same steps."""
    return [(step, value - other[1]) for (step, value), other in zip(points, base, strict=True)]


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """The mean of curves with the same steps."""
    return [
        (points[0][0], round(statistics.fmean(value for _, value in points), 4))
        for points in zip(*curves, strict=True)
    ]


def summarize(runs: Sequence[Metrics], dense: Sequence[Metrics]) -> dict[str, Any]:
    """A model's results: a value for each seed, and curves averaged over the seeds.

    Args:
        runs: its metrics, a run for each seed.
        dense: those of the dense model with the same seeds, hence the same data.
    """
    held_out = [curve(metrics, "valid/loss") for metrics in runs]
    training = [smooth(curve(metrics, "loss")) for metrics in runs]
    bases = [smooth(curve(metrics, "loss")) for metrics in dense]
    goals = [curve(metrics, "valid/loss")[-1][1] for metrics in dense]
    results: dict[str, Any] = {
        "held_out_loss": [points[-1][1] for points in held_out],
        "held_out_minus_dense": [
            points[-1][1] - goal for points, goal in zip(held_out, goals, strict=True)
        ],
        "held_out_text_loss": [curve(m, "valid/content_loss")[-1][1] for m in runs],
        "training_loss": [points[-1][1] for points in training],
        "training_minus_dense": [
            points[-1][1] - base[-1][1] for points, base in zip(training, bases, strict=True)
        ],
        "steps_to_dense": [
            steps_to(points, goal) for points, goal in zip(held_out, goals, strict=True)
        ],
    }
    for key in ("load_imbalance", "dropped_fraction"):
        if curve(runs[0], key):
            results[key] = [end(curve(m, key)) for m in runs]
    results["curves"] = {
        "held_out_loss": mean_curve(held_out),
        "training_loss": mean_curve(training),
        "training_minus_dense": mean_curve(
            [minus(points, base) for points, base in zip(training, bases, strict=True)]
        ),
    }
    return results


def spread(values: Sequence[float | None], digits: int) -> str:
    """Mean ± standard deviation, or how many there are if some are missing."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return f"reached by {len(known)} of {len(values)}"
    deviation = f" ± {statistics.stdev(known):.{digits}f}" if len(known) > 1 else ""
    return f"{statistics.fmean(known):.{digits}f}{deviation}"


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The results of all models as a Markdown table, over their seeds."""
    rows = [
        ("held-out loss", "held_out_loss", 3),
        ("· minus the dense model's", "held_out_minus_dense", 3),
        ("held-out loss, text tokens only", "held_out_text_loss", 3),
        (f"training loss, last {WINDOW} steps", "training_loss", 3),
        ("· minus the dense model's", "training_minus_dense", 3),
        ("steps to the dense model's final held-out loss", "steps_to_dense", 0),
        ("busiest expert ÷ even share", "load_imbalance", 2),
        ("share of tokens dropped", "dropped_fraction", 4),
    ]
    lines = [f"| | {' | '.join(results)} |", "|---" * (len(results) + 1) + "|"]
    for title, key, digits in rows:
        cells = [spread(r[key], digits) if key in r else "–" for r in results.values()]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(results: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """The mean curves of all models, from where the first steep fall is over."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    titles = {
        "held_out_loss": "held-out loss",
        "training_minus_dense": f"training loss minus dense, mean of {WINDOW} steps",
    }
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        for name, result in results.items():
            points = result["curves"][key]
            late = [(step, value) for step, value in points if step >= points[-1][0] / 5]
            seeds = len(result["seeds"])
            style = "-" if seeds > 1 else ":"
            axis.plot(*zip(*late, strict=True), style, label=f"{name} ({seeds})")
        axis.set(xlabel="step", title=title)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("nats per target token")
    axes[0].legend(frameon=False, title="model (seeds)")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
