"""How many steps a sparse model saves a dense one, by language (paper §4.3, figure 8).

For each source a level of held-out loss is chosen, and the speed-up is the number of steps that the
dense model takes to reach it, over those of the sparse model. A curve reaches a level on the
straight line between the last validation above it and the first one at or below it; before the
first validation nothing is known, so a level that it meets counts as reached there.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megaswitch.log import UserError
from megaswitch.metrics_file import read_metrics
from megaswitch.scale.curves import Curve, curve, steps_to

LOSS = "valid/loss"
TOTAL = "all"
Level = Literal["common", "dense", "sparse"]


@dataclass(frozen=True)
class SpeedUp:
    """The steps of two models to one level of loss on one source.

    Attributes:
        source: its name; `TOTAL` for all text together.
        level: the loss, nats per target token.
        dense_steps: of the dense model; None: it does not get there.
        sparse_steps: of the sparse model; None: it does not get there.
        dense_run: steps of the dense model's last validation.
        sparse_run: of the sparse one's.
    """

    source: str
    level: float
    dense_steps: float | None
    sparse_steps: float | None
    dense_run: int
    sparse_run: int

    @property
    def ratio(self) -> float:
        """Dense steps ÷ sparse steps; where `bound` is not "=", as far as the runs tell."""
        return (self.dense_steps or self.dense_run) / (self.sparse_steps or self.sparse_run)

    @property
    def bound(self) -> Literal["=", "≥", "≤"]:
        """Whether the ratio is known, or one model would have to train on."""
        if self.dense_steps is None:
            return "≥"
        return "=" if self.sparse_steps is not None else "≤"


def speed_up(source: str, dense: Curve, sparse: Curve, level: Level = "common") -> SpeedUp:
    """Compare two falling curves of held-out loss, neither of them empty.

    Args:
        source: name of the text.
        dense: of the dense model.
        sparse: of the sparse one.
        level: "dense" or "sparse": the lowest loss of that model, which the other may not reach;
            "common": the higher of the two, which both reach.
    """
    lowest = {
        "dense": min(value for _, value in dense),
        "sparse": min(value for _, value in sparse),
    }
    goal = max(lowest.values()) if level == "common" else lowest[level]
    steps = steps_to(dense, goal), steps_to(sparse, goal)
    return SpeedUp(source, goal, *steps, dense[-1][0], sparse[-1][0])


def compare_runs(dense: Path, sparse: Path, level: Level = "common") -> list[SpeedUp]:
    """All sources that both runs were validated on, the total first, the rest by speed-up.

    Raises:
        UserError: a run has no validation, or they have no source in common.
    """
    curves = [read_curves(path) for path in (dense, sparse)]
    common = [name for name in curves[0] if name in curves[1]]
    found = [speed_up(name, curves[0][name], curves[1][name], level) for name in common]
    if not found:
        raise UserError(
            f"{dense} and {sparse} were validated on different sources "
            f"({', '.join(curves[0])}; {', '.join(curves[1])}); give both the same data.valid"
        )
    return sorted(found, key=lambda one: (one.source != TOTAL, -one.ratio))


def read_curves(run: Path) -> dict[str, Curve]:
    """A run's held-out loss by source.

    Raises:
        UserError: it has none.
    """
    metrics = read_metrics(run / "metrics.jsonl")
    keys = dict.fromkeys(k for m in metrics for k in m if k == LOSS or k.startswith(f"{LOSS}/"))
    found = {key.removeprefix(LOSS).removeprefix("/") or TOTAL: curve(metrics, key) for key in keys}
    found = {name: points for name, points in found.items() if points}
    if not found:
        raise UserError(
            f"{run} has no validation loss in metrics.jsonl; give a run folder that was trained "
            "with data.valid"
        )
    return found


@dataclass(frozen=True)
class Summary:
    """Over all sources but the total, or over that alone.

    Attributes:
        sources: how many.
        mean: of the ratios; bounds count as they are.
        median: likewise.
        bounds: how many are bounds.
        at_least_four: share with a ratio of 4 and more, the paper's threshold.
    """

    sources: int
    mean: float
    median: float
    bounds: int
    at_least_four: float

    @classmethod
    def of(cls, found: Sequence[SpeedUp]) -> Summary:
        """Of at least one."""
        parts = single(found)
        ratios = [one.ratio for one in parts]
        return cls(
            len(parts),
            statistics.fmean(ratios),
            statistics.median(ratios),
            sum(one.bound != "=" for one in parts),
            sum(ratio >= 4 for ratio in ratios) / len(ratios),
        )


def single(found: Sequence[SpeedUp]) -> list[SpeedUp]:
    """The sources by themselves, without the total where there are others."""
    return [one for one in found if one.source != TOTAL] or list(found)


def as_json(found: Iterable[SpeedUp], level: Level) -> dict[str, Any]:
    """Everything for other programs."""
    rows = list(found)
    fields = ("source", "level", "dense_steps", "sparse_steps", "dense_run", "sparse_run")
    entries: list[Mapping[str, Any]] = [
        {k: getattr(one, k) for k in (*fields, "bound", "ratio")} for one in rows
    ]
    return {"level": level, "sources": entries, "summary": vars(Summary.of(rows))}


def draw(found: Sequence[SpeedUp], path: Path, title: str) -> None:
    """The histogram of speed-ups; bounds are drawn paler, at their bound."""
    from matplotlib.figure import Figure

    parts = single(found)
    known = [one.ratio for one in parts if one.bound == "="]
    bounds = [one.ratio for one in parts if one.bound != "="]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    bins = min(20, max(5, len(parts) // 4))
    colours = ["tab:blue", "0.75"]
    axis.hist([known, bounds], bins=bins, stacked=True, color=colours,
              label=["reached", "bound"], edgecolor="white")  # fmt: skip
    axis.axvline(Summary.of(found).mean, ls="--", color="tab:red", label="mean")
    axis.set(xlabel="steps of the dense model ÷ steps of the sparse one", ylabel="sources",
             title=title)  # fmt: skip
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=120)
