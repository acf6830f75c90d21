"""Documents out of text files: JSONL or plain text, bare or compressed with gzip or zstd.

Everything is streamed. A bad line is handed to the caller and passed over; a damaged file is an
error, as the text behind the damage would be lost without a word.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import zstandard

from megaswitch.log import UserError

_CHUNK_BYTES = 1 << 16
_INFLATE_BYTES = 1 << 9  # given to a decompressor at a time: zstd may make 16 MiB of them
_MAX_DOCUMENT_BYTES = 1 << 28  # of a line too
_JSON_LINES = {".jsonl", ".ndjson", ".json"}


@dataclass(frozen=True)
class Document:
    """A text and the line of the file it begins on, counted from 1.

    Attributes:
        label: what the field `by` of `read_documents` holds; None without it.
    """

    text: str
    path: Path
    line: int
    label: str | None = None


@dataclass(frozen=True)
class Rejection:
    """A line, counted from 1, that holds no usable document, and why."""

    path: Path
    line: int
    reason: str


@dataclass
class RejectionLog:
    """Counts rejections and keeps the first few.

    Attributes:
        count: of all.
        first: the first `SHOWN` of them.
    """

    SHOWN: ClassVar[int] = 5
    count: int = 0
    first: list[Rejection] = field(default_factory=list)

    def __call__(self, rejection: Rejection) -> None:
        """Count one rejection."""
        self.count += 1
        if len(self.first) < self.SHOWN:
            self.first.append(rejection)

    def summary(self) -> str:
        """The count and one example, as part of a sentence."""
        if not self.count:
            return "no lines passed over"
        example = self.first[0]
        return (
            f"{self.count:,} lines passed over, the first at {example.path}:{example.line}: "
            f"{example.reason}"
        )

    def __str__(self) -> str:
        lines = [f"{self.count:,} lines passed over, the first of them:"]
        lines += [f"  {r.path}:{r.line}: {r.reason}" for r in self.first]
        return "\n".join(lines)


class _Decompressor(Protocol):
    """What zlib's and zstandard's objects for one compressed stream have in common."""

    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, /) -> bytes: ...


def _gzip_stream() -> _Decompressor:
    return zlib.decompressobj(wbits=31)


def _zstd_stream() -> _Decompressor:
    return zstandard.ZstdDecompressor().decompressobj()


_COMPRESSIONS: dict[str, Callable[[], _Decompressor]] = {".gz": _gzip_stream, ".zst": _zstd_stream}


def check_inputs(paths: Sequence[Path]) -> None:
    """Refuse missing inputs before any work is done.

    Raises:
        UserError: naming all that are not files.
    """
    missing = [f"'{path}'" for path in paths if not path.is_file()]
    if missing or not paths:
        raise UserError(
            f"no such input file: {', '.join(missing) or '(none given)'}. Inputs are JSONL or "
            "plain text files, optionally .gz or .zst; folders must be given as their files."
        )


def read_documents(
    path: Path,
    *,
    reject: Callable[[Rejection], None],
    advance: Callable[[int], None] = lambda _: None,
    by: str | None = None,
) -> Iterator[Document]:
    """Stream the documents of a file.

    `.jsonl`, `.ndjson` and `.json` files hold one object per line with its text under `text`; all
    others are plain text with blank lines between documents.

    Args:
        path: the file; a last suffix .gz or .zst means compressed.
        reject: called with every unusable line, one that is too long to hold included.
        advance: called with the number of bytes read from disk since the last call.
        by: field of JSON lines to take documents' labels from.

    Raises:
        UserError: if the file cannot be read, is cut off or corrupt.
    """
    lines = read_lines(path, advance)
    if is_json_lines(path):
        return _json_documents(path, lines, reject, by)
    return _plain_documents(path, lines, reject)


def is_json_lines(path: Path) -> bool:
    """True where `read_documents` takes the file for JSON lines, by its name."""
    return bare(path).suffix in _JSON_LINES


def bare(path: Path) -> Path:
    """`path` without the suffix of its compression."""
    return path.with_suffix("") if path.suffix in _COMPRESSIONS else path


def _json_documents(
    path: Path,
    lines: Iterator[bytes | None],
    reject: Callable[[Rejection], None],
    by: str | None,
) -> Iterator[Document]:
    for number, line in enumerate(lines, start=1):
        if line is None:
            reject(Rejection(path, number, _too_long()))
            continue
        if not line.strip():
            continue
        record, reason = _record_of(line)
        if reason:
            reject(Rejection(path, number, reason))
        else:
            label = None if by is None else _label(record.get(by))
            yield Document(record["text"], path, number, label)


def _label(value: object) -> str | None:
    """A field's value as a name; None where there is none, or nothing but space."""
    if value is None:
        return None
    name = value.strip() if isinstance(value, str) else json.dumps(value)
    return (name if name.isprintable() else json.dumps(name)) or None


def _too_long() -> str:
    return f"longer than {_MAX_DOCUMENT_BYTES:,} bytes"


def _record_of(line: bytes) -> tuple[dict[str, Any], str]:
    """(object with a usable text, reason to reject it or nothing) of a line of JSON."""
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return {}, "not UTF-8"
    except (ValueError, RecursionError) as error:
        return {}, f"not JSON: {error}"
    if not isinstance(record, dict):
        return {}, "not a JSON object"
    text = record.get("text")
    if not isinstance(text, str):
        return {}, "no string under 'text'"
    if not text.strip():
        return {}, "the text is empty"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return {}, "the text has half a surrogate pair"
    return record, ""


def _plain_documents(
    path: Path, lines: Iterator[bytes | None], reject: Callable[[Rejection], None]
) -> Iterator[Document]:
    gathered: list[str] = []
    size = 0
    first = 1
    for number, line in enumerate(lines, start=1):
        if line is None:
            reject(Rejection(path, number, _too_long()))
            continue
        if not line.strip():
            if gathered:
                yield Document("\n".join(gathered), path, first)
            gathered, size = [], 0
            continue
        if not gathered:
            first = number
        try:
            gathered.append(line.decode("utf-8").rstrip("\r\n"))
        except UnicodeDecodeError:
            reject(Rejection(path, number, "not UTF-8"))
        size += len(line)
        if size > _MAX_DOCUMENT_BYTES:
            raise UserError(
                f"the document at line {first} of '{path}' is larger than {_MAX_DOCUMENT_BYTES} "
                "bytes. Plain text needs a blank line between documents; with one document per "
                "line, use JSONL."
            )
    if gathered:
        yield Document("\n".join(gathered), path, first)


def read_lines(
    path: Path, advance: Callable[[int], None] = lambda _: None
) -> Iterator[bytes | None]:
    """The lines without their ends; None in the place of one too long, which is never held."""
    pieces: list[bytes] = []  # of a line longer than a chunk; joined once
    size = 0
    for chunk in _chunks(path, advance):
        for position, piece in enumerate(chunk.split(b"\n")):
            if position:  # a line ended before this piece
                yield b"".join(pieces) if size <= _MAX_DOCUMENT_BYTES else None
                pieces, size = [], 0
            size += len(piece)
            if size <= _MAX_DOCUMENT_BYTES:
                pieces.append(piece)
            else:
                pieces.clear()
    if size:
        yield b"".join(pieces) if size <= _MAX_DOCUMENT_BYTES else None


def _chunks(path: Path, advance: Callable[[int], None]) -> Iterator[bytes]:
    start_stream = _COMPRESSIONS.get(path.suffix)
    try:
        with path.open("rb") as file:
            stream = start_stream() if start_stream else None
            while data := file.read(_CHUNK_BYTES):
                advance(len(data))
                if start_stream is None:
                    yield data
                    continue
                for start in range(0, len(data), _INFLATE_BYTES):
                    part = data[start : start + _INFLATE_BYTES]
                    # A file may be several compressed streams one after another.
                    while part:
                        if stream is None or stream.eof:
                            stream = start_stream()
                        yield stream.decompress(part)
                        part = stream.unused_data if stream.eof else b""
    except (zlib.error, zstandard.ZstdError) as error:
        raise UserError(f"'{path}' is corrupt ({error}). Download or compress it again.") from error
    except OSError as error:
        raise UserError(
            f"cannot read '{path}': {error.strerror}. Check the file and its permissions."
        ) from error
    if stream is not None and not stream.eof:
        raise UserError(
            f"'{path}' is cut off: its compressed data ends too early. Download or compress it "
            "again."
        )
