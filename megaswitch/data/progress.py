"""How far a long command is, and the time it has left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from megaswitch.log import console, info

_SECONDS_PER_LINE = 30.0


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar on a terminal, else a line every half minute; gives a function that advances it.

    Args:
        what: is done.
        total: amount of it, in any unit.
    """
    screen = console()
    started = told = time.monotonic()
    done = before = 0
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f}%"))
    with Progress(*columns, TimeRemainingColumn(), console=screen) as bar:
        task = bar.add_task(what, total=total)

        def advance(amount: int) -> None:
            nonlocal done, before, told
            done += amount
            now = time.monotonic()
            if screen.is_terminal:
                bar.advance(task, amount)
            elif now - told >= _SECONDS_PER_LINE:
                speed = (done - before) / (now - told)
                left = timedelta(seconds=round((total - done) / speed)) if speed else "?"
                gone = timedelta(seconds=round(now - started))
                info(f"{what}: {done / max(1, total):.1%} after {gone}, {left} left")
                told, before = now, done

        yield advance
        if not screen.is_terminal:
            bar.update(task, completed=done)
