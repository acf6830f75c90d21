"""What the commands share."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from megaswitch.log import is_rank_zero

if TYPE_CHECKING:
    from rich.console import Console

PATH = click.Path(path_type=Path)


def stdout() -> Console:
    """A console for results: on rank 0 alone, and wide where no terminal limits it."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else 140
    return Console(width=width, quiet=not is_rank_zero(), highlight=False)


def echo(text: str) -> None:
    """Print a result to standard output, on rank 0 alone."""
    if is_rank_zero():
        click.echo(text)
