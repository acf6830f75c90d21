"""Files that survive: durable writes, checksums, and one writer per run folder."""

from __future__ import annotations

import fcntl
import hashlib
import os
from pathlib import Path
from typing import IO

from megaswitch.log import UserError, warn


def write_durably(path: Path, text: str) -> None:
    """Write a small file so that it survives a power cut once this returns."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """The file's SHA-256 in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def lock(folder: Path, *, doing: str = "training", other: str = "train.run_dir") -> IO[str]:
    """Claim `folder` for this process until the returned file is closed or the process ends.

    Some cluster file systems have no locks; there it only warns.

    Args:
        folder: made if it is not there.
        doing: what the holder does there, for the error.
        other: what names another folder, for the error.

    Raises:
        UserError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / ".lock").open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if not isinstance(error, BlockingIOError):
            warn(
                f"{folder} cannot be locked ({error.strerror}); see to it that only one run uses it"
            )
            return file
        file.seek(0)
        holder = file.read().strip() or "unknown"
        file.close()
        raise UserError(
            f"another process ({holder}) is {doing} in {folder}; wait for it, stop it, or choose "
            f"another {other}"
        ) from None
    file.truncate(0)
    file.write(f"pid {os.getpid()}")
    file.flush()
    return file


def holder(folder: Path) -> str | None:
    """Who holds `folder`, such as "pid 123" of the machine that it runs on, or None if nobody does.

    Where the file system has no locks nobody is seen to.
    """
    try:
        file = (folder / ".lock").open(encoding="utf-8")
    except FileNotFoundError:
        return None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return file.read().strip() or "an unknown process"
        except OSError:
            return None
    return None


def relink(link: Path, target: str) -> None:
    """Make `link` lead to `target`, relative to its folder; at no instant does it lead nowhere."""
    aside = link.with_name(f"{link.name}.new")
    aside.unlink(missing_ok=True)
    aside.symlink_to(target)
    aside.replace(link)
