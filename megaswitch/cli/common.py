"""What the commands share."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import click

from megaswitch.log import is_rank_zero

if TYPE_CHECKING:
    from rich.console import Console

    from megaswitch.config import ParallelConfig
    from megaswitch.parallel.mesh import Mesh
    from megaswitch.parallel.watchdog import Watchdog

PATH = click.Path(path_type=Path)

_GRACE = 5.0  # seconds in which ranks may tell why the job ends


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


@contextmanager
def joined(device: str, parallel: ParallelConfig) -> Iterator[tuple[Mesh, Watchdog]]:
    """The ranks of a command, watched; at the end all leave together.

    Args:
        device: as of `Mesh.start`.
        parallel: the layout, already checked.
    """
    from megaswitch.parallel.mesh import Mesh
    from megaswitch.parallel.watchdog import watch

    mesh = Mesh.start(device, parallel)
    with (
        _orderly_sigterm(_GRACE if mesh.size > 1 else 0.0),
        watch(mesh, parallel.timeout) as watchdog,
    ):
        yield mesh, watchdog
    mesh.stop()


@contextmanager
def _orderly_sigterm(grace: float) -> Iterator[None]:
    """Let SIGTERM end the process as an exception does, so that temporary files go, too.

    torchrun sends it to the other ranks as soon as one has ended; the watchdogs of these then get
    `grace` seconds to say which.
    """
    since: float | None = None

    def end(*_: object) -> None:
        nonlocal since
        if since is None and grace:
            since = time.monotonic()
            again = threading.Timer(grace, os.kill, (os.getpid(), signal.SIGTERM))
            again.daemon = True
            again.start()
        elif since is None or time.monotonic() - since >= grace:
            sys.exit(143)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
