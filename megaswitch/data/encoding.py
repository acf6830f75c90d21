"""Tokenizing blocks of documents."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
from numpy.typing import NDArray

from megaswitch.data.blocks import Block, Position
from megaswitch.data.indexed import IndexedWriter, token_dtype
from megaswitch.data.text_files import TEXT, Rejection, RejectionLog, records_of
from megaswitch.data.tokenizer import SENTINEL, Tokenizer

_INLINE_BLOCKS = 8  # so few are done before other processes have started
_AHEAD_BYTES = 1 << 22  # of text waiting for each process


@dataclass
class Tokens:
    """Documents of tokens.

    Attributes:
        ids: of all documents, one after another.
        lengths: of the documents.
    """

    ids: NDArray
    lengths: NDArray[np.int64]

    def write_to(self, writer: IndexedWriter) -> None:
        """Add the documents, of a single sequence each."""
        writer.extend([self.ids], [self.lengths], [np.arange(1, len(self.lengths) + 1)])


@dataclass
class Encoded:
    """What became of a block.

    Attributes:
        source: number of the input.
        end: of the block.
        columns: tokens of each field.
        characters: in the documents.
        labels: of the documents, where a field for them was named.
        rejections: lines passed over.
        rejected: all of these, as JSON lines.
    """

    source: int
    end: Position
    columns: list[Tokens]
    characters: int = 0
    labels: list[str | None] = field(default_factory=list)
    rejections: RejectionLog = field(default_factory=RejectionLog)
    rejected: bytes = b""

    @property
    def documents(self) -> int:
        """Documents with tokens."""
        return len(self.columns[0].lengths)


@dataclass(frozen=True)
class Encoder:
    """Turns blocks into tokens.

    Args:
        tokenizer: of the texts.
        fields: with the texts.
        append_eos: end each text with EOS.
        sentinels: read `<extra_id_n>` in texts as that sentinel.
        by: field of JSON lines that labels documents.
    """

    tokenizer: Tokenizer
    fields: tuple[str, ...] = (TEXT,)
    append_eos: bool = True
    sentinels: bool = False
    by: str | None = None

    @property
    def settings(self) -> dict[str, object]:
        """All that tokens depend on besides the files."""
        settings = {"fields": self.fields, "eos": self.append_eos, "sentinels": self.sentinels}
        return {**settings, **asdict(self.tokenizer.info)}

    def __call__(self, source: int, block: Block) -> Encoded:
        """Encode a block of input number `source`."""
        rejections: list[Rejection] = []
        records = list(records_of(block, self.fields, rejections.append, self.by))
        columns = [
            self._ids([record.texts[column] for record in records])
            for column in range(len(self.fields))
        ]
        least = 1 + self.append_eos
        empty = {
            number: name
            for name, column in zip(self.fields, columns, strict=True)
            for number, ids in enumerate(column)
            if len(ids) < least
        }
        for number, name in empty.items():
            reason = "the text has no tokens" if len(columns) == 1 else f"no tokens under '{name}'"
            rejections.append(Rejection(block.path, records[number].line, reason))
        if empty:
            rejections.sort(key=lambda rejection: rejection.line)
            records = [r for number, r in enumerate(records) if number not in empty]
            columns = [[i for n, i in enumerate(c) if n not in empty] for c in columns]
        result = Encoded(source, block.end, [self._tokens(column) for column in columns])
        result.characters = sum(len(text) for record in records for text in record.texts)
        if self.by is not None:
            result.labels = [record.label for record in records]
        for rejection in rejections:
            result.rejections(rejection)
        result.rejected = b"".join(map(_line, rejections))
        return result

    def _ids(self, texts: list[str]) -> list[NDArray[np.int32]]:
        ids = self.tokenizer.encode_batch(texts, eos=self.append_eos)
        if self.sentinels:
            ending = [self.tokenizer.eos_id] if self.append_eos else []
            for place, text in enumerate(texts):
                if SENTINEL.search(text):
                    ids[place] = np.array(self.tokenizer.encode(text) + ending, dtype=np.int32)
        return ids

    def _tokens(self, column: Sequence[NDArray[np.int32]]) -> Tokens:
        kind = token_dtype(self.tokenizer.vocab_size)
        lengths = np.fromiter(map(len, column), dtype=np.int64, count=len(column))
        ids = np.empty(int(lengths.sum()), dtype=kind)
        if column:
            np.concatenate(column, out=ids, casting="unsafe")  # ids are within the vocabulary
        return Tokens(ids, lengths)


def _line(rejection: Rejection) -> bytes:
    values = {"file": str(rejection.path), "line": rejection.line, "reason": rejection.reason}
    return json.dumps(values).encode() + b"\n"
