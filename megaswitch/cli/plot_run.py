"""Curves of a run as a picture. Needs matplotlib, the extra `plot`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megaswitch.log import UserError

_NAMED_LAYERS = 6


def plot_run(metrics: Sequence[dict[str, Any]], title: str, file: Path) -> None:
    """Draw losses, learning rate, load imbalance and dropped tokens over steps.

    Args:
        metrics: lines of `metrics.jsonl`.
        title: above the picture.
        file: to write.

    Raises:
        UserError: there is nothing to draw.
    """
    from matplotlib.figure import Figure

    if not any("loss" in m for m in metrics):
        raise UserError(
            f"{title} has logged no step yet, so there is nothing to plot; leave out --plot"
        )
    figure = Figure(figsize=(10, 7), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(2, 2, sharex=True)
    (losses, rate), (imbalance, dropped) = panels
    _draw(losses, metrics, "loss", label="training", color="0.65")
    _draw(losses, metrics, "valid/loss", label="validation", color="C0", marker="o")
    _draw(losses, metrics, "valid/content_loss", label="its text tokens", color="C1", marker="o")
    _draw(losses, metrics, "valid/content_unigram_entropy", label="their unigram entropy",
          color="C3", linestyle="--")  # fmt: skip
    _draw(rate, metrics, "learning_rate", color="C2")
    for panel, key in ((imbalance, "load_imbalance"), (dropped, "dropped_fraction")):
        layers = sorted({k for m in metrics for k in m if k.startswith(f"{key}/")})
        names = [layer.partition("/")[2] for layer in layers]
        if len(layers) > _NAMED_LAYERS:  # "_" keeps a name out of the legend
            names = ["each layer", *(f"_{name}" for name in names[1:])]
        for layer, name in zip(layers, names, strict=True):
            _draw(panel, metrics, layer, label=name, linewidth=0.8, alpha=0.7)
        _draw(panel, metrics, key, label="all layers", color="k")
        if not layers:
            panel.text(0.5, 0.5, "dense: no experts", ha="center", transform=panel.transAxes)
    titles = ("nats per token", "learning rate", "busiest expert ÷ even share", "dropped tokens")
    for panel, axis in zip(panels.flat, titles, strict=True):
        panel.set_ylabel(axis)
        panel.spines[["top", "right"]].set_visible(False)
        handles, labels = panel.get_legend_handles_labels()
        if labels:
            panel.legend(handles, labels, frameon=False, fontsize="small")
    for panel in panels[1]:
        panel.set_xlabel("step")
    figure.savefig(file, dpi=120)


def _draw(panel: Any, metrics: Sequence[dict[str, Any]], key: str, **style: Any) -> None:
    """One curve, without its values that are not finite; nothing if it has none."""
    points = [(m["step"], m[key]) for m in metrics if key in m and math.isfinite(m[key])]
    if points:
        panel.plot(*zip(*points, strict=True), **({"markersize": 3} | style))
