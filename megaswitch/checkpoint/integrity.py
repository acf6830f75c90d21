"""Checksums of the files of a checkpoint, and whether the files are those that it lists.

Files carry BLAKE3 sums: as hard to forge as SHA-256, and ten times faster on a processor without
instructions for that one, so that summing keeps up with disks. Checkpoints with SHA-256 are read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from blake3 import blake3

from megaswitch.log import UserError

SUM = "blake3"  # what new files carry


class Digest(Protocol):
    """A checksum that grows with what is given to it."""

    def update(self, data: Any, /) -> Any:
        """Take in more bytes."""

    def hexdigest(self) -> str:
        """The sum of all bytes so far."""


def new_digest(name: str = SUM) -> Digest:
    """An empty checksum: "blake3" or "sha256"."""
    return blake3() if name == "blake3" else hashlib.new(name)


def recorded_sum(entry: Mapping[str, Any]) -> tuple[str, str]:
    """Name and value of the checksum that a checkpoint lists for a file.

    Raises:
        KeyError: there is none.
    """
    name = SUM if SUM in entry else "sha256"
    return name, entry[name]


def file_sum(path: Path, name: str = SUM) -> str:
    """The checksum of a file."""
    digest = new_digest(name)
    piece = memoryview(bytearray(1 << 20))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(piece):
            digest.update(piece[:count])
    return digest.hexdigest()


def entry_of(path: Path) -> dict[str, Any]:
    """Size and checksum of a file, as a checkpoint lists them."""
    return {"bytes": path.stat().st_size, SUM: file_sum(path)}


def matches(path: Path, entry: Mapping[str, Any]) -> bool:
    """Whether a file has the checksum that a checkpoint lists for it."""
    name, value = recorded_sum(entry)
    return file_sum(path, name) == value


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A table of JSON, in which no name may stand twice."""
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError("something is listed twice")
    return table


def misfits(path: Path, files: Mapping[str, Any], names: set[str] | None = None) -> list[str]:
    """What is wrong with the files of a checkpoint, their content aside.

    Args:
        path: the checkpoint.
        files: that it lists.
        names: which of them to look at; None for all.
    """
    # The reader takes every tensor file that it finds, so one that is not listed is not harmless.
    unlisted = {p.name for p in path.glob("*.safetensors")} - set(files)
    wrong = [f"{name} is not part of it" for name in sorted(unlisted)]
    for name, entry in files.items():
        file = path / name
        if names is not None and name not in names:
            continue
        if file.is_symlink():
            wrong.append(f"{name} is a symbolic link, and may change behind its checksum")
        elif not file.is_file():
            wrong.append(f"{name} is missing")
        elif file.stat().st_size != entry["bytes"]:
            wrong.append(f"{name} has {file.stat().st_size:,} of {entry['bytes']:,} bytes")
    return wrong


def damaged_checkpoint(path: Path, what: Iterable[str]) -> UserError:
    """The refusal of a checkpoint with what is wrong with its files."""
    return UserError(
        f"checkpoint {path} is damaged: {'; '.join(what)}. Use another one, such as the one before "
        "(remove this one to resume from that), or copy it again"
    )


def check_sizes(path: Path, files: Mapping[str, Any]) -> None:
    """Refuse a checkpoint whose files are not those that it lists, as far as a look can tell.

    Raises:
        UserError: naming the files that differ.
    """
    if damaged := misfits(path, files):
        raise damaged_checkpoint(path, damaged)
