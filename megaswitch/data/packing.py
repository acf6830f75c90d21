"""Which documents share a row: the oracle of `csrc/packing.h`, and the file that keeps the answer.

A document's share of a row is known from its length alone, so rows are made once, without random
numbers, and kept beside the corpus. Their file is named after content and settings, and checked in
full whenever it is opened: that every row fits, and that each piece is in exactly one row.
"""

from __future__ import annotations

import bisect
import fcntl
import hashlib
import json
import os
import secrets
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from megaswitch import native
from megaswitch.data.indexed import companion
from megaswitch.files import sync
from megaswitch.log import UserError, info, warn

WINDOW = 4096  # pieces that are packed together
SHORTEST = 2  # tokens that a piece of a document needs

_MAGIC = b"MSROWS01"
_ZEROS = bytes(1 << 20)


def cut(length: int, longest: int) -> list[tuple[int, int]]:
    """The pieces (start, tokens) of a document: full ones, then the rest.

    A rest of one token, which nothing can be done with, takes one from the piece before it; a
    document of fewer than `SHORTEST` has no piece.
    """
    assert longest > SHORTEST
    if length < SHORTEST:
        return []
    starts = [min(at, length - SHORTEST) for at in range(0, length, longest)]
    return [(a, b - a) for a, b in zip(starts, [*starts[1:], length], strict=True)]


def pack(
    rooms: Sequence[tuple[int, int]], encoder_length: int, decoder_length: int, window: int = WINDOW
) -> list[list[int]]:
    """Put pieces into rows: best fit, by falling size, within windows of the corpus's order.

    A piece goes into the row that has the least encoder room left for it (of equals, the least
    decoder room; of equals, the oldest), or begins a new one. Its size is the larger of its shares
    of encoder and decoder.

    Args:
        rooms: positions that each piece takes in the encoder and in the decoder.
        encoder_length: positions of a row.
        decoder_length: likewise.
        window: pieces that are packed together.

    Returns:
        for each row its pieces, ascending; each piece is in one row.
    """
    rows: list[list[int]] = []
    for first in range(0, len(rooms), window):

        def size(piece: int) -> int:
            encoder, decoder = rooms[piece]
            return max(encoder * decoder_length, decoder * encoder_length)

        of_window: list[list[int]] = []
        left: list[tuple[int, int, int]] = []  # encoder and decoder room, row; sorted
        for piece in sorted(range(first, min(first + window, len(rooms))), key=size, reverse=True):
            encoder, decoder = rooms[piece]
            place = bisect.bisect_left(left, (encoder, 0, 0))
            while place < len(left) and left[place][1] < decoder:
                place += 1
            if place < len(left):
                row = left.pop(place)
            else:
                row = (encoder_length, decoder_length, len(of_window))
                of_window.append([])
            of_window[row[2]].append(piece)
            bisect.insort(left, (row[0] - encoder, row[1] - decoder, row[2]))
        rows += [sorted(row) for row in of_window]
    return rows


def in_file_order(rows: Sequence[list[int]]) -> list[list[int]]:
    """Rows as they are numbered: those of one piece first, then those of two, and so on.

    So the file needs no pointers: a row's place follows from how many rows have how many pieces.
    """
    return sorted(rows, key=len)


def open_rows(
    prefix: str | Path,
    pieces: native.Pieces,
    shape: native.RowShape,
    settings: Mapping[str, object],
) -> native.RowIndex:
    """The rows of a corpus, from the file beside it; it is made where there is none.

    Of the processes of a machine one makes it and the others wait. Where the file system has no
    locks several may; they rename the same bytes into the same place.

    Args:
        prefix: of the corpus, for the file's name.
        pieces: of the corpus.
        shape: of the rows.
        settings: everything that rows depend on, the corpus's digest included; JSON values.

    Raises:
        UserError: if the corpus has no piece, or the file cannot be written.
    """
    rule = {"packing": "best fit", "window": WINDOW}
    key = hashlib.sha256(json.dumps({**settings, **rule}, sort_keys=True).encode()).digest()
    path = companion(prefix, f".{key.hex()[:16]}.rows")
    try:
        if not path.exists():
            with _claimed(path.parent):
                if not path.exists():
                    _make(path, key, pieces, shape)
        try:
            return native.RowIndex(os.fspath(path), key, pieces, shape)
        except native.DataError as error:
            warn(f"{str(error).removesuffix('delete it.')}it is made again.")
            _make(path, key, pieces, shape)
            return native.RowIndex(os.fspath(path), key, pieces, shape)
    except native.DataError as error:
        raise UserError(str(error)) from None
    except OSError as error:
        raise UserError(
            f"cannot write '{path}', which says which documents share a row: {error.strerror}. It "
            "is made once, beside the corpus; free space there, or let someone who may write there "
            "start the run."
        ) from error


@contextmanager
def _claimed(folder: Path) -> Iterator[None]:
    """Keep other processes of this machine from making rows in `folder` meanwhile."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some cluster file systems have no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _make(path: Path, key: bytes, pieces: native.Pieces, shape: native.RowShape) -> None:
    """Write the file aside, and rename it into place once it is on disk."""
    counts = native.count_rows(pieces, shape)
    total = sum(rows * size for size, rows in enumerate(counts, 1))
    if not total:
        raise UserError(
            f"the corpus of '{path}' has no document of at least {SHORTEST} tokens. Preprocess a "
            "text that is not empty."
        )
    header = _MAGIC + key + struct.pack("<QQ", total, len(counts))
    header += np.array(counts, dtype="<u8").tobytes()
    aside = companion(path, f".{secrets.token_hex(4)}.partial")
    try:
        with aside.open("wb") as file:
            file.write(header)
            # Real zeros: a mapped file with holes would kill the process when the disk is full.
            for start in range(0, 8 * total, len(_ZEROS)):
                file.write(_ZEROS[: min(len(_ZEROS), 8 * total - start)])
        out = np.memmap(aside, dtype=np.uint64, mode="r+", offset=len(header))
        native.write_rows(pieces, shape, counts, out)
        out.flush()
        sync(aside)
        aside.replace(path)
        sync(path.parent)
    finally:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
    info(f"{sum(counts):,} rows of {total:,} documents and parts of documents: '{path}'")
