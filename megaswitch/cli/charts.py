"""Curves and heat maps as SVG, for pages that hold everything themselves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

_WIDTH, _HEIGHT = 640, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 12, 20, 28
_COLOURS = ("#1f5f8b", "#e07b39", "#3d9970", "#d7263d", "#7b4fa3", "#888888")
_POINTS = 600  # of a curve; more are not seen

Points = Sequence[tuple[float, float]]


def line_chart(series: Sequence[tuple[str, Points]], label: str) -> str:
    """Curves over steps; values that are not finite are left out. Empty if nothing is left.

    Args:
        series: name and (step, value) of each.
        label: of the picture, for those who do not see it.
    """
    kept = [(name, _thin([p for p in points if math.isfinite(p[1])])) for name, points in series]
    kept = [(name, points) for name, points in kept if points]
    if not kept:
        return ""
    xs = [x for _, points in kept for x, _ in points]
    ys = [y for _, points in kept for _, y in points]
    low_x, high_x = min(xs), max(xs)
    ticks = _ticks(min(ys), max(ys))
    low, high = min(*ys, ticks[0]), max(*ys, ticks[-1])

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - low_x) / (high_x - low_x) if high_x > low_x else 0.5
        up = (y - low) / (high - low) if high > low else 0.5
        return (
            _LEFT + across * (_WIDTH - _LEFT - _RIGHT),
            _HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM),
        )

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(label)}">']
    for tick in ticks:
        _, y = place(low_x, tick)
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(f'<text class="end" x="{_LEFT - 6}" y="{y + 4:.1f}">{tick:.4g}</text>')
    for value in dict.fromkeys((low_x, high_x)):
        x, _ = place(value, low)
        side = "end" if value == high_x > low_x else "start"
        parts.append(f'<text class="{side}" x="{x:.1f}" y="{_HEIGHT - 8}">{value:g}</text>')
    legend = _LEFT
    for number, (name, points) in enumerate(kept):
        colour = _COLOURS[number % len(_COLOURS)]
        path = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in points)
        if len(points) == 1:
            x, y = place(*points[0])
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>')
        parts.append(
            f'<polyline points="{path}" stroke="{colour}"><title>{escape(name)}</title></polyline>'
        )
        if len(kept) > 1:
            parts.append(f'<text x="{legend}" y="12" fill="{colour}">{escape(name)}</text>')
            legend += 7 * len(name) + 16
    return "".join([*parts, "</svg>"])


def heat_map(rows: Sequence[tuple[str, Sequence[float]]], label: str) -> str:
    """A row of cells for each name: white at 0, blue at 1, red at 3 and more."""
    if not rows:
        return ""
    cells = max(len(values) for _, values in rows)
    width, height, left = 560 / cells, 18, 170
    total = height * len(rows) + 4
    parts = [f'<svg viewBox="0 0 {left + 570} {total}" role="img" aria-label="{escape(label)}">']
    for row, (name, values) in enumerate(rows):
        y = row * height
        parts.append(f'<text class="end" x="{left - 8}" y="{y + 13}">{escape(name)}</text>')
        for column, value in enumerate(values):
            parts.append(
                f'<rect x="{left + column * width:.1f}" y="{y}" width="{width:.1f}" '
                f'height="{height - 2}" fill="{shade(value)}"><title>{escape(name)}, '
                f"{column}: {value:g}</title></rect>"
            )
    return "".join([*parts, "</svg>"])


def shade(value: float) -> str:
    """The colour of a load ÷ an even share."""
    if not math.isfinite(value):
        return "#888888"
    below, above = min(max(value, 0.0), 1.0), min(max(value - 1, 0.0) / 2, 1.0)
    red = 245 - 214 * below + 184 * above
    green = 245 - 150 * below - 57 * above
    blue = 245 - 106 * below - 78 * above
    return f"#{int(red):02x}{int(green):02x}{int(blue):02x}"


def _thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most so many points: means of neighbours, the last one as it is."""
    size = -(-len(points) // _POINTS)
    if size <= 1:
        return points
    parts = [points[i : i + size] for i in range(0, len(points) - 1, size)]
    means = [(part[-1][0], math.fsum(y for _, y in part) / len(part)) for part in parts]
    return [*means, points[-1]]


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers in [low, high], or a value that is alone."""
    if high <= low:
        return [low]
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough)
    first = math.ceil(low / step)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)] or [low, high]
