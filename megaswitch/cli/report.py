"""`megaswitch report`."""

from __future__ import annotations

from pathlib import Path

import click

from megaswitch.cli.common import PATH, echo


@click.command()
@click.argument("run", type=PATH)
@click.option("--output", type=PATH, show_default="report.html in the run's folder",
              help="The page to write.")  # fmt: skip
def report(run: Path, output: Path | None) -> None:
    """Write one HTML page about a run: curves, load of experts, what happened, configuration.

    The page holds all that it shows and asks the network for nothing, so that it can be mailed or
    archived.

    \b
    Examples:
      megaswitch report runs/base-8
      megaswitch report runs/base-8 --output base-8.html
    """
    from megaswitch.cli.run_page import page
    from megaswitch.cli.run_view import RunView

    path = output or run / "report.html"
    path.write_text(page(RunView.read(run)), encoding="utf-8")
    echo(f"written: {path}")
