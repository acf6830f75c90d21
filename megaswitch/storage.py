"""Where conversions read and write: local folders, or object stores by URL.

A location is a `pathlib.Path`, or its twin of universal-pathlib for `s3://`, `gs://` and whatever
else fsspec knows, so that the same code walks both. What differs is here: reading a range of bytes,
and making a folder appear whole. A local folder is written aside and renamed. Object stores cannot
rename; there the folder is marked as unfinished, and the file without which nobody can load it is
written last.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from megaswitch.log import UserError

_UNFINISHED = ".unfinished"
_MARK = "conversion.unfinished"


def location(text: str | Path) -> Path:
    """A local path, or the universal-pathlib twin of one for a URL.

    Raises:
        UserError: nothing that is installed can open such URLs.
    """
    scheme, separator, rest = str(text).partition("://")
    if not separator:
        return Path(text)
    if scheme == "file":
        return Path(rest)
    extra = {"s3": "s3", "gs": "gcs", "gcs": "gcs"}.get(scheme, "storage")
    try:
        from upath import UPath

        place: Any = UPath(str(text))
        _ = place.fs  # imports what speaks to that store
    except (ImportError, ValueError) as error:
        raise UserError(
            f"{text} cannot be opened ({error}); local folders need nothing, URLs need "
            f'pip install "megaswitch[{extra}]" or what fsspec names'
        ) from error
    return place


def is_local(path: Path) -> bool:
    """Whether `path` lies on a file system of this machine."""
    return isinstance(path, Path)


class RangedFile:
    """Reads ranges of a file; nothing is cached or mapped, so memory is what a read returns.

    Args:
        path: a local file, or one of an object store.

    Raises:
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = path.stat().st_size
        self._descriptor = os.open(path, os.O_RDONLY) if is_local(path) else None

    def read(self, start: int, length: int) -> bytearray:
        """Bytes [start, start + length).

        Raises:
            UserError: the file ends before.
        """
        if start < 0 or length < 0 or start + length > self.size:
            raise UserError(
                f"{self.path} has {self.size} bytes, and {length} are said to lie at {start}; "
                "it is damaged or cut short: copy it again"
            )
        if self._descriptor is None:
            remote: Any = self.path
            data = bytearray(remote.fs.cat_file(remote.path, start, start + length))
        else:
            data = bytearray(length)
            done = 0
            while done < length:
                read = os.preadv(self._descriptor, [memoryview(data)[done:]], start + done)
                if not read:
                    break
                done += read
            del data[done:]
        if len(data) != length:
            raise UserError(f"{self.path} was cut while it was read; copy it again")
        return data

    def close(self) -> None:
        """Give the file back."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def member(folder: Path, name: str) -> Path:
    """The file `name` of `folder`, which may be a link only if that stays inside.

    The cache of the Hugging Face hub links from `snapshots/REVISION` to `blobs` beside it; those
    two count as one folder.

    Raises:
        UserError: the name is no plain file name, or the link leads out.
    """
    if not name or name in (".", "..") or any(c in name for c in "/\\\0"):
        raise UserError(
            f"{folder} names a file {name!r}, and only plain names of files beside it are read; "
            "the index is damaged or malicious"
        )
    path = folder / name
    if is_local(path) and path.is_symlink():
        roots = [folder.resolve()]
        if roots[0].parent.name == "snapshots":
            roots.append(roots[0].parent.parent / "blobs")
        try:
            target = path.resolve()
        except (OSError, RuntimeError) as error:  # links in a circle
            raise UserError(f"{path} is a link that leads nowhere ({error})") from error
        if not any(target.is_relative_to(root) for root in roots):
            raise UserError(
                f"{path} is a link to {target}, outside the folder, and is not followed; "
                "copy the file itself there"
            )
    return path


def read_small(path: Path, limit: int) -> bytes:
    """All bytes of a file that has at most `limit`.

    Raises:
        UserError: it is larger, or cannot be read.
    """
    try:
        with path.open("rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    if len(content) > limit:
        raise UserError(
            f"{path} has more than {limit} bytes, which no such file needs; it is damaged or "
            "malicious"
        )
    return content


@contextmanager
def writing(path: Path) -> Iterator[IO[bytes]]:
    """A new file to write to; it is in the store, or on disk to stay, when the block ends."""
    with path.open("wb") as file:
        yield file
        if is_local(path):
            file.flush()
            os.fsync(file.fileno())


@contextmanager
def publishing(final: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `final` if the block ends well, and else vanishes.

    The block writes the file that makes the folder loadable last. A process that is killed leaves
    nothing that loads, and the next one over the same destination starts afresh.

    Raises:
        UserError: `final` exists, or is being written, or cannot be written.
    """
    try:
        with _aside(final) if is_local(final) else _in_place(final) as folder:
            yield folder
    except OSError as error:
        raise UserError(
            f"{final} could not be written: {error.strerror or error}. Nothing of it is left; free "
            "space or choose another destination"
        ) from error


@contextmanager
def _aside(final: Path) -> Iterator[Path]:
    if final.exists() or final.is_symlink():
        raise UserError(f"{final} exists already; choose another destination, or remove it")
    final.parent.mkdir(parents=True, exist_ok=True)
    aside = final.with_name(final.name + _UNFINISHED)
    aside.mkdir(exist_ok=True)
    descriptor = os.open(aside, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(f"another process is writing {final}; wait for it, or stop it") from None
    try:
        for stale in aside.iterdir():  # of a process that was killed
            stale.unlink()
        yield aside
        os.fsync(descriptor)
        aside.rename(final)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    finally:
        os.close(descriptor)
    parent = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)


@contextmanager
def _in_place(final: Path) -> Iterator[Path]:
    """In a store without renames. A marked folder is what a killed conversion left."""
    store: Any = final
    held = {path.name for path in final.iterdir()} if final.exists() else set()
    if held and _MARK not in held:
        raise UserError(f"{final} exists already; choose another destination, or remove it")
    if held:
        store.fs.rm(store.path, recursive=True)
    final.mkdir(parents=True, exist_ok=True)
    (final / _MARK).write_bytes(b"This folder is being written, or its writer was killed.\n")
    try:
        yield final
        (final / _MARK).unlink()
    except BaseException:
        store.fs.rm(store.path, recursive=True)
        raise
