"""Token files on disk: Megatron's `.bin/.idx` pair and a small sidecar `.meta.json`.

`.bin` holds the tokens of all documents one after another; `.idx` says where sequences and
documents begin. The sidecar says which tokenizer made them; corpora from elsewhere have none.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from megaswitch import native
from megaswitch.files import sync
from megaswitch.log import UserError

# Codes of the `.idx` header for the types that can hold token ids.
TYPE_CODES: dict[int, np.dtype] = {
    1: np.dtype("<u1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    8: np.dtype("<u2"),
}
_MAGIC = b"MMIDIDX\x00\x00"
_COPY_ITEMS = 1 << 20  # lengths held in memory at a time while the index is written


def token_dtype(vocab_size: int) -> np.dtype:
    """The type Megatron stores ids of this vocabulary in: uint16 below 65,500, else int32."""
    return np.dtype("<u2") if vocab_size < 65_500 else np.dtype("<i4")


def companion(prefix: str | Path, suffix: str) -> Path:
    """`prefix` with a suffix behind it; a dot in the prefix is part of the name."""
    return Path(f"{os.fspath(prefix)}{suffix}")


@dataclass(frozen=True)
class TokenizerInfo:
    """What a corpus remembers of its tokenizer.

    Attributes:
        tokenizer_sha256: of the model file.
        vocab_size: with the sentinels.
        num_extra_ids: sentinels on top of the vocabulary.
    """

    tokenizer_sha256: str
    vocab_size: int
    num_extra_ids: int


@dataclass(frozen=True)
class CorpusMeta(TokenizerInfo):
    """The sidecar of a corpus.

    Attributes:
        tokens: in the `.bin`.
        documents: in the `.idx`.
        sequences: in the `.idx`.
        content_sha256: of the `.bin`.
        created_by: version of MegaSwitch.
    """

    tokens: int
    documents: int
    sequences: int
    content_sha256: str
    created_by: str

    @staticmethod
    def read(prefix: str | Path) -> CorpusMeta | None:
        """The sidecar beside `prefix`, or None where there is none.

        Raises:
            UserError: if it is there but not readable as one.
        """
        path = companion(prefix, ".meta.json")
        try:
            values = json.loads(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise UserError(
                f"'{path}' cannot be read ({error}). Preprocess the corpus again, or delete this "
                "file if the corpus is known to fit the tokenizer."
            ) from error
        expected = {field.name: field.type for field in fields(CorpusMeta)}
        for name, kind in expected.items():
            value = values.get(name) if isinstance(values, dict) else None
            if type(value).__name__ != kind or (isinstance(value, int) and value < 0):
                rule = "a non-negative integer" if kind == "int" else "a string"
                raise UserError(
                    f"'{path}' has {value!r} for {name}, which must be {rule}. Preprocess the "
                    "corpus again, or delete this file if the corpus is known to fit the tokenizer."
                )
        return CorpusMeta(**{name: values[name] for name in expected})


class TokenStore:
    """A corpus opened for reading: one flat stream of tokens, cut into sequences and documents.

    The files are validated in full and mapped, not loaded.

    Args:
        prefix: path of the two files without `.bin` and `.idx`.
        pread: read tokens by pread() instead of a mapping.

    Raises:
        UserError: if a file is missing, damaged or contradicts the other or the sidecar.
    """

    def __init__(self, prefix: str | Path, *, pread: bool = False) -> None:
        self.prefix = Path(prefix)
        try:
            self.native = native.IndexedTokens(os.fspath(prefix), pread=pread)
        except native.DataError as error:
            raise UserError(str(error)) from None
        self.meta = CorpusMeta.read(prefix)
        for name in ("tokens", "documents", "sequences") if self.meta else ():
            said, there = getattr(self.meta, name), getattr(self, f"num_{name}")
            if said != there:
                raise UserError(
                    f"'{companion(prefix, '.meta.json')}' speaks of {said} {name} but the corpus "
                    f"has {there}: it belongs to another corpus. Preprocess again, or delete it if "
                    "the corpus is known to fit the tokenizer."
                )

    @property
    def num_tokens(self) -> int:
        """Tokens in the flat stream."""
        return self.native.num_tokens

    @property
    def num_sequences(self) -> int:
        """Sequences; a document has any number of them."""
        return self.native.num_sequences

    @property
    def num_documents(self) -> int:
        """Documents."""
        return self.native.num_documents

    @property
    def dtype(self) -> np.dtype:
        """Type of the ids on disk."""
        return TYPE_CODES[self.native.type_code]

    def tokens(self, start: int, count: int) -> NDArray[np.int64]:
        """Tokens [start, start + count) of the flat stream.

        Raises:
            UserError: if the file was cut since it was opened.
        """
        assert 0 <= start <= start + count <= self.num_tokens, (start, count, self.num_tokens)
        return self._filled(self.native.read, start, count)

    def document(self, index: int) -> NDArray[np.int64]:
        """Tokens of one document.

        Raises:
            UserError: if the files were cut or changed since they were opened.
        """
        return self.tokens(*self.span(index, index + 1))

    def span(self, first: int, stop: int) -> tuple[int, int]:
        """Where documents [first, stop), at least one, lie in the stream: (start, count)."""
        try:
            start, count = self.native.document(first)
            end = start + count if stop == first + 1 else sum(self.native.document(stop - 1))
        except native.DataError as error:
            raise UserError(str(error)) from None
        return start, end - start

    def document_lengths(self, first: int, count: int) -> NDArray[np.int64]:
        """Tokens of each of the documents [first, first + count)."""
        return self._filled(self.native.document_lengths, first, count)

    def sequence_lengths(self, first: int, count: int) -> NDArray[np.int64]:
        """Tokens of each of the sequences [first, first + count)."""
        return self._filled(self.native.sequence_lengths, first, count)

    def document_starts(self, first: int, count: int) -> NDArray[np.int64]:
        """First sequence of each document; that of document `num_documents` is `num_sequences`."""
        return self._filled(self.native.document_starts, first, count)

    def _filled(
        self, fill: Callable[[int, NDArray[np.int64]], None], first: int, count: int
    ) -> NDArray[np.int64]:
        out = np.empty(count, dtype=np.int64)
        try:
            fill(first, out)
        except native.DataError as error:
            raise UserError(str(error)) from None
        return out


class IndexedWriter:
    """Writes a corpus document by document, in constant memory.

    All files are written aside and renamed when the `with` block ends well, `.idx` last, so that a
    corpus with an index is complete. If it ends badly, on a full disk too, nothing is left behind.
    Several writers in one `ExitStack`, each finished when it is full, appear together.

    Args:
        prefix: path of the files without suffixes; older files there are replaced at the end.
        dtype: type of the ids on disk, one of `TYPE_CODES`.
        tokenizer: written to the sidecar; without it no sidecar is written.
    """

    def __init__(
        self, prefix: str | Path, dtype: DTypeLike, *, tokenizer: TokenizerInfo | None = None
    ) -> None:
        self.prefix = Path(prefix)
        self._dtype = np.dtype(dtype).newbyteorder("<")
        codes = {kind: code for code, kind in TYPE_CODES.items()}
        assert self._dtype in codes, f"{dtype} cannot hold token ids"
        self._type_code = codes[self._dtype]
        self._tokenizer = tokenizer
        self._hash = hashlib.sha256()
        self._streams: list[IO[bytes]] = []
        self.num_tokens = self.num_sequences = self.num_documents = 0
        self._document_end = 0  # sequences in documents that are closed
        self._finished = False

    def __enter__(self) -> IndexedWriter:
        try:
            self.prefix.parent.mkdir(parents=True, exist_ok=True)
            self._bin = self._open_aside(".bin")
            # The index cannot be written before the number of sequences is known; its two arrays
            # grow on disk meanwhile.
            self._lengths = self._open_aside(".lengths")
            self._boundaries = self._open_aside(".documents")
        except OSError as error:
            self._discard()
            raise UserError(
                f"cannot write '{error.filename}': {error.strerror}. Choose an output prefix in a "
                "folder you may write to."
            ) from error
        self._boundaries.write(struct.pack("<q", 0))
        return self

    def append(self, tokens: ArrayLike) -> None:
        """Add one sequence to the document being written."""
        ids = np.asarray(tokens)
        assert len(ids) < 1 << 31, "lengths are int32"
        self._write_tokens(ids)
        self._lengths.write(struct.pack("<i", len(ids)))
        self.num_sequences += 1

    def extend(
        self,
        tokens: Iterable[NDArray],
        lengths: Iterable[NDArray[np.int64]],
        ends: Iterable[NDArray[np.int64]],
    ) -> None:
        """Add whole documents, given as three streams in pieces of any size.

        Args:
            tokens: of all sequences, flat.
            lengths: of the sequences.
            ends: of the documents, in sequences counted from the first added here.
        """
        assert self._document_end == self.num_sequences, "end_document() is missing"
        before = self.num_sequences
        for piece in ends:
            self._boundaries.write((piece + before).astype("<i8").tobytes())
            self.num_documents += len(piece)
        for piece in lengths:
            self._lengths.write(piece.astype("<i4").tobytes())
            self.num_sequences += len(piece)
        self._document_end = self.num_sequences
        for piece in tokens:
            self._write_tokens(piece)

    def _write_tokens(self, ids: NDArray) -> None:
        assert ids.ndim == 1
        limits = np.iinfo(self._dtype)
        fits = ids.dtype == self._dtype or len(ids) == 0
        assert fits or (limits.min <= ids.min() and ids.max() <= limits.max)
        content = np.ascontiguousarray(ids, dtype=self._dtype).data
        self._bin.write(content)
        self._hash.update(content)
        self.num_tokens += len(ids)

    def end_document(self) -> None:
        """Close the document: what is appended next belongs to another."""
        self.num_documents += 1
        self._boundaries.write(struct.pack("<q", self.num_sequences))
        self._document_end = self.num_sequences

    def add_document(self, tokens: ArrayLike) -> None:
        """Add one document of a single sequence."""
        self.append(tokens)
        self.end_document()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._publish()
        finally:
            self._discard()

    def _discard(self) -> None:
        """Close and remove whatever lies aside; after `_publish` that is nothing of worth."""
        for stream in self._streams:
            # On a full disk closing fails once more, as it writes what is still buffered.
            with suppress(OSError):
                stream.close()
        for suffix in (".bin", ".lengths", ".documents", ".idx", ".meta.json"):
            with suppress(OSError):
                self._aside(suffix).unlink(missing_ok=True)

    def _open_aside(self, suffix: str) -> IO[bytes]:
        stream = self._aside(suffix).open("w+b")
        self._streams.append(stream)
        return stream

    def _aside(self, suffix: str) -> Path:
        return companion(self.prefix, f"{suffix}.partial")

    def finish(self) -> None:
        """Bring all to disk and close the files, which lie aside until the block ends.

        Happens by itself at the end; a call frees the files of one among many writers.
        """
        assert self._document_end == self.num_sequences, "end_document() is missing"
        _sync(self._bin)
        with self._aside(".idx").open("wb") as index:
            self._write_index(index)
            _sync(index)
        if self._tokenizer is not None:
            with self._aside(".meta.json").open("w", encoding="utf-8") as sidecar:
                json.dump(asdict(self._meta(self._tokenizer)), sidecar, indent=2)
                sidecar.write("\n")
                _sync(sidecar)
        for stream in self._streams:
            stream.close()
        self._finished = True

    def _publish(self) -> None:
        if not self._finished:
            self.finish()
        suffixes = [".bin", ".idx"]
        if self._tokenizer is not None:
            suffixes.insert(1, ".meta.json")
        # An older index or sidecar must never be seen beside the new tokens.
        for suffix in (".idx", ".meta.json"):
            companion(self.prefix, suffix).unlink(missing_ok=True)
        for suffix in suffixes:
            self._aside(suffix).replace(companion(self.prefix, suffix))
        sync(self.prefix.parent)

    def _write_index(self, index: IO[bytes]) -> None:
        index.write(_MAGIC + struct.pack("<QB", 1, self._type_code))
        index.write(struct.pack("<QQ", self.num_sequences, self.num_documents + 1))
        self._lengths.seek(0)
        shutil.copyfileobj(self._lengths, index)
        self._lengths.seek(0)
        offset = 0
        while chunk := self._lengths.read(4 * _COPY_ITEMS):
            sizes = np.frombuffer(chunk, dtype="<i4").astype("<i8") * self._dtype.itemsize
            ends = offset + np.cumsum(sizes)
            index.write((ends - sizes).astype("<i8").tobytes())
            offset = int(ends[-1])
        self._boundaries.seek(0)
        shutil.copyfileobj(self._boundaries, index)

    def _meta(self, tokenizer: TokenizerInfo) -> CorpusMeta:
        return CorpusMeta(
            **asdict(tokenizer),
            tokens=self.num_tokens,
            documents=self.num_documents,
            sequences=self.num_sequences,
            content_sha256=self._hash.hexdigest(),
            created_by=f"megaswitch {version('megaswitch')}",
        )


def _sync(stream: IO[bytes] | IO[str]) -> None:
    stream.flush()
    os.fsync(stream.fileno())
