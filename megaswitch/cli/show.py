"""Plain text drawings for results: sizes, curves, histograms, blocks of fields."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from megaswitch.cli.common import echo, stdout

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

_EIGHTHS = " ▁▂▃▄▅▆▇█"


def print_json(report: Any) -> None:
    """Print a result for programs; JSON has no NaN or infinity, so those become null."""
    echo(json.dumps(_finite(report), indent=2, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(held) for key, held in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(held) for held in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_fields(title: str, fields: Iterable[tuple[str, object]]) -> None:
    """Print a heading and, below it, names with their values; None leaves a field out."""
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    for name, value in fields:
        if value is not None:
            grid.add_row(f"  {name}", Text(str(value)))
    _print(Text(title, style="bold"), grid)


def print_table(title: str, table: Table, *, right_from: int = 1) -> None:
    """Print a heading and a table whose columns from `right_from` on are numbers."""
    from rich.padding import Padding
    from rich.text import Text

    for place, column in enumerate(table.columns):
        column.no_wrap = True
        column.justify = "right" if place >= right_from else "left"
    _print(Text(title, style="bold"), Padding(table, (0, 0, 0, 1)))


def print_lines(title: str, lines: Iterable[str]) -> None:
    """Print a heading and lines below it, as they are."""
    from rich.text import Text

    rows = (Text(f"  {line}", no_wrap=True, overflow="ellipsis") for line in lines)
    _print(Text(title, style="bold"), *rows)


def _print(*parts: RenderableType) -> None:
    from rich.padding import Padding

    console = stdout()
    # A terminal too narrow wraps lines; it must not cost a figure its digits.
    unlimited = console.options.update(max_width=1000)
    tables = [console.measure(p, options=unlimited) for p in parts if isinstance(p, Padding)]
    console.width = max([console.width, *(table.maximum for table in tables)])
    if console.is_terminal:
        console.print(*parts, sep="\n")
        return
    # rich fills lines with spaces, which only a terminal hides.
    with console.capture() as captured:
        console.print(*parts, sep="\n")
    echo("\n".join(line.rstrip() for line in captured.get().rstrip().splitlines()))


def size(count: float) -> str:
    """Bytes for people, in powers of 1024."""
    for unit in ("bytes", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024:
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:,.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} PiB"


def sparkline(values: Sequence[float], width: int = 32) -> str:
    """The values as one line of bars from the least to the greatest; "!" is not finite."""
    columns = _columns(values, width)
    finite = [v for v in columns if math.isfinite(v)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    scale = 7 / (high - low) if high > low else 0.0
    return "".join(
        _EIGHTHS[1 + round((v - low) * scale)] if math.isfinite(v) else "!" for v in columns
    )


def curve(
    steps: Sequence[float], values: Sequence[float], *, width: int = 64, height: int = 7
) -> list[str]:
    """Lines of a small plot of finite values over steps; the area below the curve is filled.

    The bottom is the least value, not zero.
    """
    points = [(s, v) for s, v in zip(steps, values, strict=True) if math.isfinite(v)]
    if len(points) < 2:
        return []
    columns = _columns([v for _, v in points], width)
    columns = [value for value in columns for _ in range(width // len(columns))]
    low, high = min(columns), max(columns)
    scale = (height * 8 - 1) / (high - low) if high > low else 0.0
    levels = [1 + round((v - low) * scale) for v in columns]
    lines = []
    for row in range(height - 1, -1, -1):
        label = {height - 1: f"{high:.3f}", 0: f"{low:.3f}"}.get(row, "")
        bars = "".join(_EIGHTHS[min(max(level - 8 * row, 0), 8)] for level in levels)
        lines.append(f"{label:>9} ┤{bars}".rstrip())
    first, last = f"{points[0][0]:g}", f"{points[-1][0]:g}"
    return [*lines, f"{'':>9}  {first}{last:>{max(len(columns) - len(first), len(last) + 1)}}"]


def histogram(labels: Sequence[str], counts: Sequence[int], *, width: int = 40) -> list[str]:
    """One line of bar for each count."""
    most = max(counts, default=0)
    column = max(map(len, labels), default=0)
    lines = []
    for label, count in zip(labels, counts, strict=True):
        eighths = math.ceil(count * width * 8 / most) if most else 0
        bar = "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()
        lines.append(f"{label:>{column}}  {bar} {count:,}")
    return lines


def _columns(values: Sequence[float], width: int) -> list[float]:
    """At most `width` means of neighbouring values."""
    count = len(values)
    columns = min(count, width)
    parts = [values[count * i // columns : count * (i + 1) // columns] for i in range(columns)]
    return [math.fsum(part) / len(part) if all(map(math.isfinite, part)) else math.nan
            for part in parts]  # fmt: skip
