"""Pictures of what was measured. matplotlib is the extra `plot`, imported where it is used."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from megaswitch.log import UserError
from megaswitch.train.metrics import LayerLoad
from megaswitch.train.validation import Figures

_NAME_LENGTH = 28
_LABELLED_EXPERTS = 32


def check_plot(path: Path) -> None:
    """Refuse, before any work, a picture that could not be drawn or written.

    Raises:
        UserError: matplotlib is missing, or `path` is of no format it knows or cannot be written.
    """
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as error:
        raise UserError(
            f"--plot {path} needs matplotlib, which cannot be imported ({error}); install it with "
            "pip install 'megaswitch[plot]', or leave --plot out."
        ) from error
    formats = FigureCanvasBase.get_supported_filetypes()
    if path.suffix.removeprefix(".") not in formats:
        raise UserError(
            f"--plot {path} has the suffix {path.suffix!r}; it must be a format of matplotlib: "
            f"{', '.join(sorted(formats))}. Use .png."
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") if path.exists() else TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(
            f"--plot {path} cannot be written: {error.strerror}: '{error.filename}'; choose a file "
            "in a folder that you may write to."
        ) from error


def plot_evaluation(
    path: Path, sources: Mapping[str, Figures], router: Mapping[str, LayerLoad], title: str
) -> None:
    """Draw the loss of each source as bars, and tokens per expert and Switch layer as a heat map.

    Args:
        path: the picture; its suffix chooses the format.
        sources: figures by name; drawn from the top in this order.
        router: of all samples; empty for a dense model.
        title: of the whole.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    bars, loads = 1.6 + 0.3 * max(len(sources), 4), 1.6 + 0.4 * len(router)
    height = max(bars, loads if router else 0.0)
    figure = plt.figure(figsize=(14 if router else 7, height), layout="constrained")
    columns = figure.add_gridspec(1, 2 if router else 1)
    _draw_losses(figure.add_subplot(columns[0]), sources, rows=(height - 1.6) / 0.6)
    if router:  # no taller than it needs to be, beside however many sources
        rows = columns[1].subgridspec(2, 1, height_ratios=(loads, max(height - loads, 1e-3)))
        _draw_loads(figure.add_subplot(rows[0] if height > 2 * loads else columns[1]), router)
    figure.suptitle(title)
    figure.legend(frameon=False, ncols=3, loc="outside lower left")
    with warnings.catch_warnings():  # names in scripts that its font lacks
        warnings.filterwarnings("ignore", "Glyph .* missing")
        figure.savefig(path, dpi=150)
    plt.close(figure)


def _draw_losses(axes: Any, sources: Mapping[str, Figures], rows: float) -> None:
    """Bars, with room for `rows` at least, so that a few are not huge."""
    places = range(len(sources))
    metrics = [figures.metrics for figures in sources.values()]
    text = [m["content_loss"] for m in metrics]
    everything = [m["loss"] for m in metrics]
    entropies = [m["content_unigram_entropy"] for m in metrics]
    axes.barh(places, text, height=0.7, color="tab:blue", alpha=0.8, label="text tokens")
    axes.plot(everything, places, "o", color="black", ms=4, label="all targets")
    axes.plot(
        entropies, places, "|", color="tab:red", ms=12, mew=2, label="unigram entropy of the text"
    )
    for place, values in enumerate(zip(text, everything, entropies, strict=True)):
        axes.annotate(
            f"{values[0]:.2f}", (max(values), place), xytext=(6, 0), textcoords="offset points",
            va="center", fontsize=8, color="tab:blue",
        )  # fmt: skip
    axes.margins(x=0.1)
    axes.set_yticks(places, [_short(name) for name in sources])
    axes.set_ylim(max(len(sources), rows) - 0.4, -0.6)
    axes.set(xlabel="nats per token", title="Loss per source")
    axes.spines[["top", "right"]].set_visible(False)


def _draw_loads(axes: Any, router: Mapping[str, LayerLoad]) -> None:
    from matplotlib.colors import TwoSlopeNorm

    shares = [
        [
            tokens * len(load.tokens_per_expert) / max(load.tokens, 1)
            for tokens in load.tokens_per_expert
        ]
        for load in router.values()
    ]
    highest = max(2.0, max(map(max, shares)))
    norm = TwoSlopeNorm(1.0, 0.0, highest)
    image = axes.imshow(shares, aspect="auto", cmap="RdBu_r", norm=norm, interpolation="nearest")
    axes.set_yticks(range(len(router)), list(router))
    axes.set(
        xlabel="expert (×: got nothing)", title="Tokens per expert, as a multiple of an even share"
    )
    experts = len(shares[0])
    if experts <= _LABELLED_EXPERTS:
        axes.set_xticks(range(experts))
    unused = [(e, row) for row, load in enumerate(router.values()) for e in load.unused_experts]
    axes.plot([e for e, _ in unused], [row for _, row in unused], "x", color="white", ms=4)
    if experts <= _LABELLED_EXPERTS // 2:
        for row, values in enumerate(shares):
            for expert, value in enumerate(values):
                pale = 0.2 < norm(value) < 0.8
                if value:
                    axes.text(expert, row, f"{value:.2f}", ha="center", va="center", fontsize=8,
                              color="black" if pale else "white")  # fmt: skip
    ticks = [0.0, 0.5, 1.0, (1 + highest) / 2, highest]
    bar = axes.figure.colorbar(image, ax=axes, ticks=ticks, format="%.2g", pad=0.02)
    bar.outline.set_visible(False)


def _short(name: str) -> str:
    """A name that leaves room for the bars, and in which `$` is no formula."""
    cut = name if len(name) <= _NAME_LENGTH else name[: _NAME_LENGTH - 1] + "…"
    return cut.replace("$", r"\$")
