"""Documents out of text files: JSONL, plain text or Parquet.

Everything is streamed. A bad line is handed to the caller and passed over; a damaged file is an
error.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from megaswitch.data import blocks
from megaswitch.data.blocks import Block, is_json_lines, read_blocks
from megaswitch.data.compression import read_chunks
from megaswitch.data.parquet import Row

_DECODER = json.JSONDecoder()
TEXT = "text"  # the field that holds it where the user names no other


@dataclass(frozen=True)
class Document:
    """A text and the line of the file it begins on, counted from 1."""

    text: str
    path: Path
    line: int


class Record(NamedTuple):
    """What a document of a block holds.

    Attributes:
        line: that it begins on, or its row, counted from 1.
        texts: of the fields asked for; of plain text, the one there is.
        label: what the field `by` holds; None without it.
    """

    line: int
    texts: list[str]
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

    def extend(self, other: RejectionLog) -> None:
        """Count the rejections of another log behind these."""
        self.count += other.count
        self.first += other.first[: self.SHOWN - len(self.first)]

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


def read_documents(
    path: Path, *, reject: Callable[[Rejection], None], text_field: str = TEXT
) -> Iterator[Document]:
    """Stream the documents of a file.

    `.jsonl`, `.ndjson` and `.json` files hold one object per line and `.parquet` files one row per
    document, with its text under `text_field`; all others are plain text with blank lines between
    documents.

    Args:
        path: the file; a last suffix .gz, .xz or .zst means compressed.
        reject: called with every unusable line, one that is too long to hold included.
        text_field: of JSON objects and of Parquet rows.

    Raises:
        UserError: if the file cannot be read, is cut off or corrupt.
    """
    for block in read_blocks(path, (text_field,)):
        for record in records_of(block, (text_field,), reject):
            yield Document(record.texts[0], path, record.line)


def records_of(
    block: Block,
    fields: Sequence[str],
    reject: Callable[[Rejection], None],
    by: str | None = None,
) -> Iterator[Record]:
    """The documents of a block.

    Args:
        block: of a file.
        fields: to take texts from; plain text has but one, whatever it is called.
        reject: called with every unusable line.
        by: field of JSON lines to take documents' labels from.

    Raises:
        UserError: if a document of plain text has no end.
    """
    content = block.content
    if content is None:
        reject(Rejection(block.path, block.line, _too_long()))
    elif isinstance(content, list):
        yield from _row_records(block, content, fields, reject)
    elif is_json_lines(block.path):
        yield from _json_records(block, content, fields, reject, by)
    else:
        yield from _plain_records(block, content, reject)


def _json_records(
    block: Block,
    content: bytes,
    fields: Sequence[str],
    reject: Callable[[Rejection], None],
    by: str | None,
) -> Iterator[Record]:
    for number, line in enumerate(content.split(b"\n"), start=block.line):
        if not line or line.isspace():
            continue
        record, reason = _object_of(line)
        texts: list[Any] = [record.get(field) for field in fields]
        reason = reason or _problem(fields, texts)
        if reason:
            reject(Rejection(block.path, number, reason))
        else:
            yield Record(number, texts, None if by is None else _label(record.get(by)))


def _row_records(
    block: Block, rows: list[Row], fields: Sequence[str], reject: Callable[[Rejection], None]
) -> Iterator[Record]:
    for number, row in enumerate(rows, start=block.line):
        try:
            texts = [None if text is None else text.decode("utf-8") for text in row]
            reason = _problem(fields, texts)
        except UnicodeDecodeError:
            texts, reason = [], "not UTF-8"
        if reason:
            reject(Rejection(block.path, number, reason))
        else:
            yield Record(number, [text for text in texts if text])


def _label(value: object) -> str | None:
    """A field's value as a name; None where there is none, or nothing but space."""
    if value is None:
        return None
    name = value.strip() if isinstance(value, str) else json.dumps(value)
    return (name if name.isprintable() else json.dumps(name)) or None


def _too_long() -> str:
    return f"longer than {blocks.MAX_DOCUMENT_BYTES:,} bytes"


def _object_of(line: bytes) -> tuple[dict[str, Any], str]:
    """(the object of a line of JSON, reason to reject it or nothing)."""
    if len(line) > blocks.MAX_DOCUMENT_BYTES:
        return {}, _too_long()
    try:
        text = line.strip().decode("utf-8")
        record, end = _DECODER.raw_decode(text)  # half the time of loads() for short lines
        if end != len(text):
            raise json.JSONDecodeError("Extra data", text, end)
    except UnicodeDecodeError:
        return {}, "not UTF-8"
    except (ValueError, RecursionError) as error:
        return {}, f"not JSON: {error}"
    return (record, "") if isinstance(record, dict) else ({}, "not a JSON object")


def _problem(fields: Sequence[str], texts: Sequence[object]) -> str:
    """Reason to reject these texts, or nothing."""
    for field, text in zip(fields, texts, strict=True):  # noqa: F402
        if not isinstance(text, str):
            return f"no string under '{field}'"
        if not text or text.isspace():
            return "the text is empty" if len(fields) == 1 else f"the text under '{field}' is empty"
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            return "the text has half a surrogate pair"
    return ""


def _plain_records(
    block: Block, content: bytes, reject: Callable[[Rejection], None]
) -> Iterator[Record]:
    gathered: list[str] = []
    size = 0
    first = block.line
    for number, line in enumerate(content.split(b"\n"), start=block.line):
        if not line or line.isspace():
            if gathered:
                yield Record(first, ["\n".join(gathered)])
            gathered, size = [], 0
            continue
        if len(line) > blocks.MAX_DOCUMENT_BYTES:
            reject(Rejection(block.path, number, _too_long()))
            continue
        if not gathered:
            first = number
        try:
            gathered.append(line.decode("utf-8").rstrip("\r\n"))
        except UnicodeDecodeError:
            reject(Rejection(block.path, number, "not UTF-8"))
        size += len(line)
        if size > blocks.MAX_DOCUMENT_BYTES:
            raise blocks.no_end(block.path, first)
    if gathered:
        yield Record(first, ["\n".join(gathered)])


def read_lines(path: Path) -> Iterator[bytes | None]:
    """The lines without their ends; None in the place of one too long, which is never held."""
    limit = blocks.MAX_DOCUMENT_BYTES
    pieces: list[bytes] = []  # of a line longer than a chunk; joined once
    size = 0
    for chunk in read_chunks(path):
        for position, piece in enumerate(chunk.split(b"\n")):
            if position:  # a line ended before this piece
                yield b"".join(pieces) if size <= limit else None
                pieces, size = [], 0
            size += len(piece)
            if size <= limit:
                pieces.append(piece)
            else:
                pieces.clear()
    if size:
        yield b"".join(pieces) if size <= limit else None
