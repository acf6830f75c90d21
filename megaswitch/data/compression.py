"""Files that may be compressed, as streams of bytes: bare, gzip, zstd or xz.

A damaged file is an error, as the text behind the damage would be lost without a word. What a
stream claims about its sizes is not believed: it is unpacked a little at a time.
"""

from __future__ import annotations

import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import zstandard

from megaswitch.log import UserError

_CHUNK_BYTES = 1 << 18
# Given to a decompressor at a time: a bomb makes 16 MiB of them (zstd), others 4 MiB at most.
_INFLATE_BYTES = 1 << 9
_XZ_MEMORY = 1 << 28  # `xz -9` needs a quarter of it


class _Decompressor(Protocol):
    """What the libraries' objects for one compressed stream have in common."""

    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, /) -> bytes: ...


def _gzip_stream() -> _Decompressor:
    return zlib.decompressobj(wbits=31)


def _zstd_stream() -> _Decompressor:
    return zstandard.ZstdDecompressor().decompressobj()


def _xz_stream() -> _Decompressor:
    return lzma.LZMADecompressor(format=lzma.FORMAT_XZ, memlimit=_XZ_MEMORY)


_COMPRESSIONS: dict[str, Callable[[], _Decompressor]] = {
    ".gz": _gzip_stream,
    ".xz": _xz_stream,
    ".zst": _zstd_stream,
}


def is_compressed(path: Path) -> bool:
    """True where the last suffix is that of a compression."""
    return path.suffix in _COMPRESSIONS


def bare(path: Path) -> Path:
    """`path` without the suffix of its compression."""
    return path.with_suffix("") if is_compressed(path) else path


def read_chunks(
    path: Path, advance: Callable[[int], None] = lambda _: None, *, skip: int = 0
) -> Iterator[bytes]:
    """The file's content, unpacked, in pieces of no particular size.

    Args:
        path: the file; a last suffix .gz, .xz or .zst means compressed.
        advance: called with the number of bytes passed on disk since the last call.
        skip: unpacked bytes to leave out at the beginning.

    Raises:
        UserError: if the file cannot be read, is cut off or corrupt, or needs much memory.
    """
    try:
        if is_compressed(path):
            yield from _after(_unpacked(path, advance), skip)
            return
        with path.open("rb") as file:
            file.seek(skip)
            advance(skip)
            while data := file.read(_CHUNK_BYTES):
                advance(len(data))
                yield data
    except lzma.LZMAError as error:
        if "memory" in str(error).lower():
            raise UserError(
                f"'{path}' wants more than {_XZ_MEMORY >> 20} MiB of memory to be unpacked. "
                "Compress it again with `xz -9` or less."
            ) from error
        raise _corrupt(path, error) from error
    except (zlib.error, zstandard.ZstdError) as error:
        raise _corrupt(path, error) from error
    except OSError as error:
        raise UserError(
            f"cannot read '{path}': {error.strerror}. Check the file and its permissions."
        ) from error


def _corrupt(path: Path, error: Exception) -> UserError:
    return UserError(f"'{path}' is corrupt ({error}). Download or compress it again.")


def _unpacked(path: Path, advance: Callable[[int], None]) -> Iterator[bytes]:
    start_stream = _COMPRESSIONS[path.suffix]
    stream = start_stream()
    pieces: list[bytes] = []
    size = 0
    with path.open("rb") as file:
        while data := file.read(_CHUNK_BYTES):
            advance(len(data))
            for start in range(0, len(data), _INFLATE_BYTES):
                part = data[start : start + _INFLATE_BYTES]
                # A file may be several compressed streams one after another.
                while part:
                    if stream.eof:
                        if path.suffix == ".xz":  # the format allows zeros between streams
                            part = part.lstrip(b"\0")
                            if not part:
                                break
                        stream = start_stream()
                    pieces.append(stream.decompress(part))
                    size += len(pieces[-1])
                    if size >= _CHUNK_BYTES:
                        yield b"".join(pieces)
                        pieces, size = [], 0
                    part = stream.unused_data if stream.eof else b""
    yield b"".join(pieces)
    if not stream.eof:
        raise UserError(
            f"'{path}' is cut off: its compressed data ends too early. Download or compress it "
            "again."
        )


def _after(chunks: Iterator[bytes], skip: int) -> Iterator[bytes]:
    for chunk in chunks:
        if skip < len(chunk):
            yield chunk[skip:] if skip else chunk
        skip = max(0, skip - len(chunk))
