"""Which checkpoints of a run are kept, and how others go: at no instant is a half one in sight."""

from __future__ import annotations

import shutil
from pathlib import Path

from megaswitch.log import warn

PREFIX = "step_"
UNFINISHED = ".unfinished"
BEST = "best"  # a link to the best checkpoint, beside it
_DAMAGED = ".damaged"


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in `folder`, oldest first."""
    found = (p for p in folder.glob(f"{PREFIX}*") if p.name.removeprefix(PREFIX).isdecimal())
    return sorted((p for p in found if (p / "state.json").is_file()), key=lambda p: p.name)


def step_of(checkpoint: Path) -> int:
    """The step after which it was written."""
    return int(checkpoint.name.removeprefix(PREFIX))


def keep_only(folder: Path, newest: int, every: int | None) -> None:
    """Remove all checkpoints but some.

    Args:
        folder: of the checkpoints; the one that the link `best` there leads to stays.
        newest: how many of the newest stay.
        every: those of steps that it divides stay; None: of none.
    """
    best = (folder / BEST).resolve()
    for old in checkpoints(folder)[:-newest]:
        if old.resolve() != best and (every is None or step_of(old) % every):
            discard(old)


def discard(path: Path) -> None:
    """Remove a checkpoint; at no instant is a part of it left that looks complete.

    A folder that cannot be removed (some network file systems keep what others still read) is no
    reason to end a healthy run; the next save tries again.
    """
    aside = path.with_name(f"{path.name}.old{UNFINISHED}")
    try:
        path.rename(aside)
        shutil.rmtree(aside)
    except OSError as error:
        warn(f"old checkpoint {path} could not be removed: {error}")


def set_aside(path: Path, reason: str) -> None:
    """Take a damaged checkpoint out of the run's sight, and say so; nothing of it is removed."""
    aside = path.with_name(path.name + _DAMAGED)
    try:
        if aside.exists():  # of the same step, from before
            shutil.rmtree(aside)
        path.rename(aside)
    except OSError as error:
        warn(f"{reason}. It could not be renamed to {aside.name}: {error}")
    else:
        warn(f"{reason}. It is now {aside.name}, and the checkpoint before it is used")
