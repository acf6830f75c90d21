"""What the commands share."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import click

from megaswitch.log import is_rank_zero

if TYPE_CHECKING:
    from rich.console import Console

PATH = click.Path(path_type=Path)


def on_terminal(stream: TextIO | None) -> bool:
    """True where a person sits; standard streams that the caller closed are None."""
    return stream is not None and stream.isatty()


def stdout() -> Console:
    """A console for results: on rank 0 alone, and wide where no terminal limits it."""
    from rich.console import Console

    width = None if on_terminal(sys.stdout) else 140
    return Console(width=width, quiet=not is_rank_zero(), highlight=False)


def echo(text: str) -> None:
    """Print a result to standard output, on rank 0 alone."""
    if is_rank_zero():
        click.echo(text)


def explain(error: Exception) -> str:
    """An error in words for the user; one of the operating system names the file and a remedy."""
    if not isinstance(error, OSError) or not error.strerror:
        return str(error)
    if not error.filename:
        return f"{error.strerror}, while this command read or wrote"
    remedies: dict[type[OSError], str] = {
        PermissionError: "choose a place that you may read and write, or change its permissions",
        IsADirectoryError: "it is a folder; give a file",
        NotADirectoryError: "a part of this path is a file; give another path",
        FileNotFoundError: "check the path",
        FileExistsError: "choose another name, or remove it first",
    }
    remedy = remedies.get(type(error), "free space or choose another place")
    return f"{os.fsdecode(error.filename)}: {error.strerror}; {remedy}"
