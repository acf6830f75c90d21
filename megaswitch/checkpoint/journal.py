"""What of a resharding is done already, so that it may go on after it was killed.

A line of JSON for each file, written once the file is on disk.
"""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

from megaswitch.log import UserError


class Journal:
    """The journal of one folder.

    Args:
        path: of the file; what it says is taken up.
        identity: of the work. A journal of another work is refused.

    Raises:
        UserError: the journal is of another work.
    """

    def __init__(self, path: Path, identity: str) -> None:
        self.path = path
        self.written: dict[str, dict[str, Any]] = {}
        self.checked: dict[str, dict[str, Any]] = {}
        self._lock = threading.Lock()
        lines = _lines(path)
        entries = [json.loads(line) for line in lines if line.endswith(b"\n")]
        if entries and entries[0] != {"of": identity}:
            raise UserError(
                f"{path.parent} is what is left of another resharding, of another checkpoint, to "
                "another layout or by another release; go on with that, or remove the folder"
            )
        for entry in entries[1:]:
            kept = self.written if "written" in entry else self.checked
            kept[entry.pop("written", None) or entry.pop("checked")] = entry
        if lines and not lines[-1].endswith(b"\n"):  # cut while it was written
            path.write_bytes(b"".join(lines[:-1]))
        if not entries:
            self._append({"of": identity})

    def wrote(self, name: str, entry: dict[str, Any]) -> None:
        """A file of the result is on disk, with this size, checksum and fingerprints."""
        with self._lock:
            self._append({"written": name, **entry})
            self.written[name] = entry

    def found_good(self, name: str, entry: dict[str, Any]) -> None:
        """A file of the source has its checksum, and these fingerprints."""
        with self._lock:
            self._append({"checked": name, **entry})
            self.checked[name] = entry

    def _append(self, entry: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())


def finished_files(path: Path) -> set[str]:
    """Names of the files that a journal says are on disk."""
    entries = (json.loads(line) for line in _lines(path) if line.endswith(b"\n"))
    return {entry["written"] for entry in entries if "written" in entry}


def _lines(path: Path) -> list[bytes]:
    """A last line that was cut ends without a line feed."""
    return path.read_bytes().splitlines(keepends=True) if path.exists() else []
