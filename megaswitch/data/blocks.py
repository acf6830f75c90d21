"""Text files cut into blocks of whole documents, which can then be worked on side by side.

Cutting looks for line ends and nothing else, so that one process can cut for many. A block knows
where it ends: reading can go on from there, and the documents do not depend on where it was cut.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megaswitch.data import parquet
from megaswitch.data.compression import bare, is_compressed, read_chunks
from megaswitch.data.parquet import Row
from megaswitch.log import UserError

MAX_DOCUMENT_BYTES = 1 << 28  # of a line too
_BLOCK_BYTES = 1 << 20
_JSON_LINES = {".jsonl", ".ndjson", ".json"}
_BLANK_LINE = re.compile(rb"\n[ \t\r\v\f]*\n")


@dataclass(frozen=True)
class Position:
    """A place between two documents of a file.

    Attributes:
        offset: unpacked bytes before it; of a Parquet file, rows.
        line: that begins there, counted from 1.
    """

    offset: int = 0
    line: int = 1


@dataclass(frozen=True)
class Block:
    """Neighbouring documents of a file.

    Attributes:
        path: of the file.
        line: the first, counted from 1.
        end: behind the last.
        content: lines of text, or rows; None stands for one line that is too long to hold.
    """

    path: Path
    line: int
    end: Position
    content: bytes | list[Row] | None

    @property
    def size(self) -> int:
        """Bytes of text."""
        if isinstance(self.content, list):
            return sum(len(text) for row in self.content for text in row if text)
        return len(self.content or b"")


def is_json_lines(path: Path) -> bool:
    """True where the file is taken for JSON lines, by its name."""
    return bare(path).suffix in _JSON_LINES


def is_parquet(path: Path) -> bool:
    """True where the file is taken for Parquet, by its name."""
    return bare(path).suffix == ".parquet"


def check_inputs(paths: Sequence[Path], fields: Sequence[str] = ()) -> None:
    """Refuse missing and unreadable inputs before any work is done.

    Args:
        paths: of the inputs.
        fields: that they must have, where their format has fields.

    Raises:
        UserError: naming all that are not files, or what is wrong with a Parquet file.
    """
    missing = [f"'{path}'" for path in paths if not path.is_file()]
    if missing or not paths:
        raise UserError(
            f"no such input file: {', '.join(missing) or '(none given)'}. Inputs are JSONL, plain "
            "text (optionally .gz, .xz or .zst) or Parquet files; folders must be given as their "
            "files."
        )
    for path in filter(is_parquet, paths):
        if is_compressed(path):
            raise UserError(
                f"'{path}' is a compressed Parquet file. Parquet is compressed inside: unpack it."
            )
        parquet.check(path, fields)


def read_blocks(
    path: Path,
    fields: Sequence[str],
    *,
    start: Position | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> Iterator[Block]:
    """Cut a file, in constant memory: a block is a MiB or so, or one document that is larger.

    Args:
        path: the file; its name says what it holds, as `read_documents` has it.
        fields: the columns of a Parquet file to read.
        start: the end of a block to go on behind.
        advance: called with the number of bytes passed on disk since the last call.

    Raises:
        UserError: if the file cannot be read, is cut off or corrupt, or not text in documents.
    """
    start = start or Position()
    if is_parquet(path):
        yield from _row_blocks(path, fields, start, advance)
        return
    chunks = read_chunks(path, advance, skip=start.offset)
    cutter = _Cutter(path, start, by_blank_lines=not is_json_lines(path))
    for chunk in chunks:
        yield from cutter.add(chunk)
    yield from cutter.rest()


class _Cutter:
    """Cuts a stream of bytes at line ends, or at blank lines."""

    def __init__(self, path: Path, start: Position, *, by_blank_lines: bool) -> None:
        self.path = path
        self.offset, self.line = start.offset, start.line  # of the first byte of `held`
        self.by_blank_lines = by_blank_lines
        self.held = bytearray()
        self.cut = 0  # where a block can end in `held`
        self.line_start = 0  # of the last line in `held`, which has no end yet
        self.blank = True  # nothing but space is in that line so far
        self.dropped = 0  # bytes of a line too long to hold

    def add(self, chunk: bytes) -> Iterator[Block]:
        """Take in what comes next."""
        if self.dropped:
            end = chunk.find(b"\n") + 1
            self.dropped += end or len(chunk)
            if not end:
                return
            yield self._too_long()
            chunk = chunk[end:]
        before = len(self.held)
        self.held += chunk
        last = self.held.rfind(b"\n", before) + 1
        if self.by_blank_lines:
            # A blank line may have begun before; what was seen before is not searched again.
            begin = self.line_start - 1 if self.blank and self.line_start else before
            for match in _BLANK_LINE.finditer(self.held, begin):
                self.cut = match.end()
        else:
            self.cut = last or self.cut
        behind = chunk[last - before if last else 0 :]
        self.blank = (bool(last) or self.blank) and not behind.strip()
        self.line_start = last or self.line_start
        if self.cut and len(self.held) >= _BLOCK_BYTES:
            yield self._block()
        if len(self.held) > MAX_DOCUMENT_BYTES and not self.cut:
            if self.line_start:
                raise no_end(self.path, self.line)
            self.dropped = len(self.held)
            self.held.clear()

    def rest(self) -> Iterator[Block]:
        """What is left at the end of the file."""
        if self.dropped:
            yield self._too_long()
        elif self.held:
            self.cut = len(self.held)
            yield self._block()

    def _block(self) -> Block:
        content = bytes(memoryview(self.held)[: self.cut])
        del self.held[: self.cut]
        first = self.line
        self.offset += self.cut
        self.line += content.count(b"\n")
        self.line_start -= self.cut
        self.cut = 0
        return Block(self.path, first, Position(self.offset, self.line), content)

    def _too_long(self) -> Block:
        first = self.line
        self.offset += self.dropped
        self.line += 1
        self.dropped = 0
        return Block(self.path, first, Position(self.offset, self.line), None)


def no_end(path: Path, line: int) -> UserError:
    """The error of plain text without blank lines."""
    return UserError(
        f"the document at line {line} of '{path}' is larger than {MAX_DOCUMENT_BYTES} bytes. Plain "
        "text needs a blank line between documents; with one document per line, use JSONL."
    )


def _row_blocks(
    path: Path, fields: Sequence[str], start: Position, advance: Callable[[int], None]
) -> Iterator[Block]:
    row = start.offset
    held: list[Row] = []
    size = 0

    def block(content: list[Row] | None, rows: int) -> Block:
        nonlocal row
        first, row = row, row + rows
        return Block(path, first + 1, Position(row, row + 1), content)

    for texts in parquet.read_rows(path, fields, skip=row, longest=MAX_DOCUMENT_BYTES,
                                   advance=advance):  # fmt: skip
        if texts is not None:
            held.append(texts)
            size += sum(len(text) for text in texts if text)
        if held and (texts is None or size >= _BLOCK_BYTES or len(held) >= _BLOCK_BYTES >> 4):
            yield block(held, len(held))
            held, size = [], 0
        if texts is None:
            yield block(None, 1)
    if held:
        yield block(held, len(held))
