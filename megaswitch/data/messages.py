"""What goes over the pipes between `workers.py` and its processes: a header in JSON, then bytes."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from megaswitch.data.blocks import Block, Position
from megaswitch.data.encoding import Encoded, Encoder, Tokens
from megaswitch.data.text_files import Rejection, RejectionLog
from megaswitch.data.tokenizer import Tokenizer
from megaswitch.log import UserError

Message = tuple[dict[str, Any], Sequence[bytes]]

_SIZE = struct.Struct("<I")


def send(stream: IO[bytes], message: Message) -> None:
    """Write a message."""
    header, parts = message
    content = json.dumps([header, [len(part) for part in parts]]).encode()
    stream.write(_SIZE.pack(len(content)) + content)
    for part in parts:
        stream.write(part)
    stream.flush()


def receive(stream: IO[bytes]) -> tuple[dict[str, Any], list[bytes]]:
    """The next message.

    Raises:
        EOFError: if the other side has ended.
    """
    (size,) = _SIZE.unpack(_exactly(stream, _SIZE.size))
    header, sizes = json.loads(_exactly(stream, size))
    return header, [_exactly(stream, size) for size in sizes]


def _exactly(stream: IO[bytes], size: int) -> bytes:
    content = stream.read(size)
    if len(content) < size:
        raise EOFError
    return content


def of_encoder(encoder: Encoder) -> Message:
    """What a process must know to be this encoder."""
    header = {
        "tokenizer": str(encoder.tokenizer.path.absolute()),
        "sha256": encoder.tokenizer.sha256,
        "num_extra_ids": encoder.tokenizer.num_extra_ids,
        "fields": encoder.fields,
        "append_eos": encoder.append_eos,
        "sentinels": encoder.sentinels,
        "by": encoder.by,
    }
    return header, []


def encoder(header: dict[str, Any]) -> Encoder:
    """The encoder of a message.

    Raises:
        UserError: if the tokenizer's file is another by now.
    """
    tokenizer = Tokenizer(header["tokenizer"], header["num_extra_ids"])
    if tokenizer.sha256 != header["sha256"]:
        raise UserError(f"'{tokenizer.path}' was replaced meanwhile. Start again.")
    fields = tuple(header["fields"])
    return Encoder(tokenizer, fields, header["append_eos"], header["sentinels"], header["by"])


def of_block(source: int, block: Block) -> Message:
    """A block of input number `source`."""
    header: dict[str, Any] = {
        "source": source,
        "path": str(block.path),
        "line": block.line,
        "end": [block.end.offset, block.end.line],
    }
    if isinstance(block.content, list):
        header["rows"] = [[t if t is None else len(t) for t in row] for row in block.content]
        return header, [b"".join(text for row in block.content for text in row if text)]
    return header, [] if block.content is None else [block.content]


def block(header: dict[str, Any], parts: Sequence[bytes]) -> tuple[int, Block]:
    """The number of the input, and the block, of a message."""
    content: Any = parts[0] if parts else None
    if "rows" in header:
        content = _rows(header["rows"], parts[0])
    end = Position(*header["end"])
    return header["source"], Block(Path(header["path"]), header["line"], end, content)


def _rows(sizes: Sequence[Sequence[int | None]], content: bytes) -> list[tuple[bytes | None, ...]]:
    rows: list[tuple[bytes | None, ...]] = []
    start = 0
    for row in sizes:
        texts: list[bytes | None] = []
        for size in row:
            texts.append(None if size is None else content[start : start + size])
            start += size or 0
        rows.append(tuple(texts))
    return rows


def of_encoded(encoded: Encoded) -> Message:
    """What became of a block."""
    header = {
        "source": encoded.source,
        "end": [encoded.end.offset, encoded.end.line],
        "characters": encoded.characters,
        "labels": encoded.labels,
        "rejected": encoded.rejections.count,
        "first": [[str(r.path), r.line, r.reason] for r in encoded.rejections.first],
        "dtype": encoded.columns[0].ids.dtype.str,
    }
    arrays = [array for column in encoded.columns for array in (column.ids, column.lengths)]
    return header, [encoded.rejected, *(array.tobytes() for array in arrays)]


def encoded(header: dict[str, Any], parts: Sequence[bytes]) -> Encoded:
    """What became of a block, out of a message."""
    columns = [
        Tokens(np.frombuffer(ids, header["dtype"]), np.frombuffer(lengths, np.int64))
        for ids, lengths in zip(parts[1::2], parts[2::2], strict=True)
    ]
    first = [Rejection(Path(path), line, reason) for path, line, reason in header["first"]]
    return Encoded(
        header["source"],
        Position(*header["end"]),
        columns,
        header["characters"],
        header["labels"],
        RejectionLog(header["rejected"], first),
        parts[0],
    )
