"""`megaswitch watch`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from megaswitch.cli.common import PATH, on_terminal, stdout

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text

    from megaswitch.cli.run_view import RunView

_EVENTS = 6
_SHADES = ("#1a1a2e", "#16325c", "#1f5f8b", "#3d9970", "#e0c341", "#e07b39", "#d7263d")


@click.command()
@click.argument("run", type=PATH)
@click.option("--interval", type=click.FloatRange(0.2), default=2.0, show_default=True,
              help="Seconds between two looks.")  # fmt: skip
@click.option("--once", is_flag=True, help="Show it once; also where there is no terminal.")
def watch(run: Path, interval: float, once: bool) -> None:
    """Watch a run: progress, loss, speed, drops, load of experts, checkpoints, what happened.

    Reads the files of the run's folder, from any machine that sees it. Ctrl-C ends it, and not the
    run.

    \b
    Examples:
      megaswitch watch runs/base-8
      megaswitch watch runs/base-8 --once
    """
    import sys

    from megaswitch.cli.run_view import RunView

    console = stdout()
    if once or not on_terminal(sys.stdout):
        console.print(dashboard(RunView.read(run)))
        return
    from rich.live import Live

    with Live(
        dashboard(RunView.read(run)), console=console, screen=True, auto_refresh=False
    ) as live:
        while True:
            time.sleep(interval)
            live.update(dashboard(RunView.read(run)), refresh=True)


def dashboard(view: RunView) -> RenderableType:
    """Everything as one panel."""
    from rich.console import Group
    from rich.panel import Panel

    parts: list[RenderableType] = [_summary(view)]
    parts += [Panel(body, title=title, title_align="left") for title, body in _panels(view)]
    return Panel(Group(*parts), title=f"{view.path}", title_align="left")


def _summary(view: RunView) -> Table:
    from rich.table import Table

    from megaswitch.cli.run_view import duration

    grid = Table.grid(padding=(0, 2))
    steps = view.config.train.steps
    speeds = view.series("tokens_per_second")
    grid.add_row("progress", f"step {view.step:,} of {steps:,} ({view.step / steps:.0%})")
    grid.add_row("trained by", view.holder or "nobody")
    if speeds:
        grid.add_row("speed", f"{speeds[-1][1]:,.0f} tokens/s" + _mfu(view))
    if view.checkpoints:
        step, age = view.checkpoints[-1]
        grid.add_row("checkpoint", f"step {step:,}, {duration(age)} ago")
    else:
        grid.add_row("checkpoint", "none yet")
    if skipped := view.series("skipped_steps"):
        grid.add_row("bad steps", f"{skipped[-1][1]:.0f} left out")
    return grid


def _mfu(view: RunView) -> str:
    found = view.series("mfu")
    return f" · MFU {found[-1][1]:.1%}" if found else ""


def _panels(view: RunView) -> list[tuple[str, RenderableType]]:
    from rich.text import Text

    from megaswitch.cli.show import curve, sparkline

    panels: list[tuple[str, RenderableType]] = []
    for title, key in (("training loss", "loss"), ("validation loss", "valid/loss")):
        points = view.series(key)
        lines = curve([s for s, _ in points], [v for _, v in points])
        if lines:
            panels.append((f"{title}: {points[-1][1]:.4f}", Text("\n".join(lines))))
    rows = [
        f"{name:17} {sparkline([v for _, v in points], 40)}  {points[-1][1]:{form}}"
        for name, key, form in (
            ("tokens/s", "tokens_per_second", ",.0f"),
            ("gradient norm", "grad_norm", ".3g"),
            ("dropped tokens", "dropped_fraction", ".1%"),
            ("busiest ÷ even", "load_imbalance", ".2f"),
        )
        if (points := view.series(key))
    ]
    if rows:
        panels.append(("speed and router", Text("\n".join(rows))))
    if view.experts:
        panels.append(("load of experts ÷ even share", heat_map(view.experts[-1]["loads"])))
    if view.events:
        panels.append(("what happened", _events(view)))
    return panels


def heat_map(loads: dict[str, list[float]]) -> Text:
    """A row of cells for each layer, from 0 for idle experts to 6 for three times their share."""
    from rich.text import Text

    text = Text()
    width = max(map(len, loads))
    for number, (layer, values) in enumerate(loads.items()):
        text.append(f"{chr(10) if number else ''}{layer:{width}}  ")
        for value in values:
            shade = min(int(value / 3 * len(_SHADES)), len(_SHADES) - 1)
            text.append(f"{shade}" if value < 10 else "!", style=f"white on {_SHADES[shade]}")
        text.append(f"  {min(values):.2f} … {max(values):.2f}")
    return text


def _events(view: RunView) -> Table:
    from rich.table import Table
    from rich.text import Text

    from megaswitch.cli.run_view import words_of

    table = Table.grid(padding=(0, 2))
    for event in view.events[-_EVENTS:]:
        words = Text(words_of(event), no_wrap=True, overflow="ellipsis")
        table.add_row(
            Text(event["time"][:19]), Text(event["event"]), f"step {event['step']}", words
        )
    return table
