"""Tokens on their way from the inputs to the corpus, in a folder that survives a kill.

Documents are appended to flat files. Now and then these are brought to disk and then the state, a
small file that is replaced whole, is told how much of them counts: what lies behind that is cut off
when the folder is opened again, so a run that goes on writes what one without a break writes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from itertools import islice
from mmap import ACCESS_READ, MADV_RANDOM, mmap
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np
from numpy.typing import NDArray

from megaswitch.data.blocks import Position
from megaswitch.data.encoding import Encoded, Tokens
from megaswitch.data.indexed import companion
from megaswitch.data.text_files import Rejection, RejectionLog
from megaswitch.files import lock, sync, write_durably
from megaswitch.log import info

_FORMAT = 1
_SAVE_SECONDS = 10.0
_SAMPLE_BYTES = 1 << 16
_PIECE_TOKENS = 1 << 20  # read at a time


@dataclass
class InputCounts:
    """What an input gave.

    Attributes:
        path: of the file.
        bytes: of the file.
        documents: with tokens.
        tokens: EOS included.
        characters: in the documents.
        rejected: lines passed over.
    """

    path: str
    bytes: int
    documents: int = 0
    tokens: int = 0
    characters: int = 0
    rejected: int = 0

    def add(self, encoded: Encoded) -> None:
        """Count a block."""
        self.documents += encoded.documents
        self.tokens += sum(len(column.ids) for column in encoded.columns)
        self.characters += encoded.characters
        self.rejected += encoded.rejections.count


@dataclass
class _Input(InputCounts):
    """What the state remembers of an input that was begun."""

    fingerprint: str = ""
    finished: bool = False
    rejected_bytes: int = 0
    offset: int = 0
    line: int = 1

    def add(self, encoded: Encoded) -> None:
        """Count a block, and note where it ends."""
        super().add(encoded)
        self.rejected_bytes += len(encoded.rejected)
        self.offset, self.line = encoded.end.offset, encoded.end.line


class Spool:
    """The folder, open for one process.

    Args:
        folder: made if it is not there. What an earlier run left in it counts as far as it was
            made with the same `settings` from the same files.
        inputs: the files.
        settings: all else that the tokens depend on.
        dtype: of the tokens.

    Raises:
        UserError: another process works in the folder.
    """

    def __init__(
        self, folder: Path, inputs: Sequence[Path], settings: dict[str, object], dtype: np.dtype
    ) -> None:
        self.folder, self.inputs, self.dtype = folder, inputs, dtype
        text = json.dumps([_FORMAT, dtype.str, settings], sort_keys=True)
        self._settings = hashlib.sha256(text.encode()).hexdigest()
        self._lock = lock(folder, doing="preprocessing", other="output prefix")
        self._files: list[IO[bytes]] = []
        self.saved = False  # the folder holds a state to go on from
        self._inputs = self._left_behind()
        self.num_documents = sum(one.documents for one in self._inputs)
        self.num_tokens = sum(one.tokens for one in self._inputs)
        self._rejected_bytes = sum(one.rejected_bytes for one in self._inputs)
        self._saved_at = time.monotonic()
        self._reached = 0  # the input of the newest block

    def __enter__(self) -> Spool:
        try:
            self._tokens = self._open("tokens", self.num_tokens * self.dtype.itemsize)
            self._ends = self._open("ends", 8 * self.num_documents)
            self._rejected = self._open("rejected.jsonl", self._rejected_bytes)
        except BaseException:
            self._close()
            raise
        if self.num_documents:
            info(f"going on from '{self.folder}': {self.num_documents:,} documents are done")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._close()
        if kind is not None and self.saved and self.num_documents:
            info(f"what is done lies in '{self.folder}'; the same command goes on from there")
        else:
            shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()

    def _close(self) -> None:
        for file in self._files:
            with suppress(OSError):  # a full disk fails once more
                file.close()

    @property
    def counts(self) -> list[InputCounts]:
        """What each input gave."""
        names = [field.name for field in fields(InputCounts)]
        return [InputCounts(**{name: getattr(one, name) for name in names}) for one in self._inputs]

    def begin(self, source: int) -> Position | None:
        """Where input number `source` is to be read from, None if it is finished.

        To be asked in the order of the inputs.
        """
        if source == len(self._inputs):
            path = self.inputs[source]
            self._inputs.append(
                _Input(str(path), path.stat().st_size, fingerprint=_fingerprint(path))
            )
        one = self._inputs[source]
        return None if one.finished else Position(one.offset, one.line)

    def add(self, encoded: Encoded) -> None:
        """Append the documents of the next block."""
        (column,) = encoded.columns
        self._tokens.write(column.ids.data)
        self._ends.write((self.num_tokens + np.cumsum(column.lengths)).astype("<i8").tobytes())
        self._rejected.write(encoded.rejected)
        self.num_documents += encoded.documents
        self.num_tokens += len(column.ids)
        self._inputs[encoded.source].add(encoded)
        self._finish_until(encoded.source)
        self._save_if_due()

    def finish(self) -> None:
        """Note that all inputs are done; their documents can be read now."""
        self._finish_until(len(self._inputs))
        self._save_if_due()
        for file in self._files:
            file.flush()

    def _finish_until(self, source: int) -> None:
        while self._reached < source:
            self._inputs[self._reached].finished = True
            self._reached += 1

    def _save_if_due(self) -> None:
        if time.monotonic() - self._saved_at < _SAVE_SECONDS:
            return
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())
        state = {"settings": self._settings, "inputs": [asdict(one) for one in self._inputs]}
        aside = self.folder / "state.json.partial"
        write_durably(aside, json.dumps(state))
        aside.replace(self.folder / "state.json")
        sync(self.folder)
        self.saved = True
        self._saved_at = time.monotonic()

    def _open(self, name: str, size: int) -> IO[bytes]:
        """A file of the spool, cut to what counts of it, for appending."""
        file = (self.folder / name).open("ab")
        self._files.append(file)
        file.truncate(size)
        return file

    def _left_behind(self) -> list[_Input]:
        """The inputs that an earlier run began and that have not changed since."""
        try:
            state = json.loads((self.folder / "state.json").read_bytes())
            if state["settings"] != self._settings:
                raise ValueError("made otherwise")
            known = [_input_of(values) for values in state["inputs"]]
            self._check_sizes(known)
        except (OSError, ValueError, TypeError, KeyError):
            known = []
        kept: list[_Input] = []
        for one, path in zip(known, self.inputs, strict=False):
            if (one.path, one.fingerprint) != (str(path), _fingerprint(path)):
                break
            kept.append(one)
            if not one.finished:
                break
        self.saved = bool(kept)
        if not kept:
            # Before anything is written: an old state must never speak of new tokens.
            (self.folder / "state.json").unlink(missing_ok=True)
        return kept

    def _check_sizes(self, inputs: Sequence[_Input]) -> None:
        sizes = {
            "tokens": self.dtype.itemsize * sum(one.tokens for one in inputs),
            "ends": 8 * sum(one.documents for one in inputs),
            "rejected.jsonl": sum(one.rejected_bytes for one in inputs),
        }
        if any((self.folder / name).stat().st_size < size for name, size in sizes.items()):
            raise ValueError("a file is shorter than the state says")

    def rejections(self) -> RejectionLog:
        """The lines passed over: their number, and the first few."""
        log = RejectionLog(count=sum(one.rejected for one in self._inputs))
        with (self.folder / "rejected.jsonl").open("rb") as file:
            for line in islice(file, RejectionLog.SHOWN):
                values = json.loads(line)
                log.first.append(Rejection(Path(values["file"]), values["line"], values["reason"]))
        return log

    def publish_rejections(self, path: Path) -> bool:
        """Write the list of all lines passed over; False, and no file, if there are none."""
        if not any(one.rejected for one in self._inputs):
            path.unlink(missing_ok=True)
            return False
        aside = companion(path, ".partial")
        shutil.copyfile(self.folder / "rejected.jsonl", aside)
        aside.replace(path)
        return True

    def documents(self, order: Iterable[NDArray[np.int64]]) -> Iterator[Tokens]:
        """Documents by number, in pieces that fit into memory.

        Args:
            order: numbers, in pieces; what belongs to one is read together.
        """
        if not self.num_tokens:
            return
        ends = np.memmap(self.folder / "ends", dtype="<i8", mode="r")
        with (
            (self.folder / "tokens").open("rb") as file,
            mmap(file.fileno(), 0, access=ACCESS_READ) as mapping,
        ):
            mapping.madvise(MADV_RANDOM)
            for numbers in order:
                stops = ends[numbers]
                starts = np.where(numbers > 0, ends[numbers - 1], 0)
                groups = np.flatnonzero(np.diff(np.cumsum(stops - starts) // _PIECE_TOKENS)) + 1
                for some in np.split(np.arange(len(numbers)), groups):
                    yield self._gathered(mapping, starts[some], stops[some])

    def _gathered(self, mapping: mmap, starts: NDArray, stops: NDArray) -> Tokens:
        size = self.dtype.itemsize
        with memoryview(mapping) as view:
            spans = zip((starts * size).tolist(), (stops * size).tolist(), strict=True)
            content = b"".join([view[start:stop] for start, stop in spans])
        return Tokens(np.frombuffer(content, dtype=self.dtype), stops - starts)


def _input_of(values: object) -> _Input:
    """An entry of the state; ValueError or TypeError if it is none."""
    if not isinstance(values, dict):
        raise ValueError("not an object")
    one = _Input(**values)
    for item in fields(_Input):
        value = getattr(one, item.name)
        if type(value).__name__ != item.type or (isinstance(value, int) and value < 0):
            raise ValueError(f"{item.name} is {value!r}")
    return one


def _fingerprint(path: Path) -> str:
    """Changes when the file does: of its size, its time, and its two ends."""
    with path.open("rb") as file:
        about = os.fstat(file.fileno())
        digest = hashlib.sha256(f"{about.st_size} {about.st_mtime_ns}".encode())
        digest.update(file.read(_SAMPLE_BYTES))
        file.seek(max(0, about.st_size - _SAMPLE_BYTES))
        digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
