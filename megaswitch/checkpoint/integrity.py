"""Whether the files of a checkpoint are those that it lists, as far as a look can tell."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megaswitch.log import UserError


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
