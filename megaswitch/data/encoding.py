"""Tokenizing blocks of documents, in this process or in many, always in their order.

Processes rather than threads: SentencePiece lets go of the interpreter, but reading JSON does not,
and is a tenth of the work.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megaswitch.data.blocks import Block, Position, read_blocks
from megaswitch.data.indexed import IndexedWriter, token_dtype
from megaswitch.data.progress import progress
from megaswitch.data.text_files import TEXT, Rejection, RejectionLog, records_of
from megaswitch.data.tokenizer import SENTINEL, Tokenizer
from megaswitch.log import UserError

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


def encode_files(
    inputs: Sequence[Path],
    encoder: Encoder,
    *,
    workers: int,
    begin: Callable[[int], Position | None] = lambda _: Position(),
) -> Iterator[Encoded]:
    """Encode all files, in their order, showing progress.

    Args:
        inputs: JSONL, plain text or Parquet.
        encoder: of the blocks.
        workers: processes that tokenize; few blocks are done in this one. The result does not
            depend on it.
        begin: called with the number of an input before it is read; says where to begin, None to
            pass over it.

    Raises:
        UserError: if `workers` is below 1, or an input is damaged.
    """
    if workers < 1:
        raise UserError(f"workers is {workers}; at least 1 process is needed.")
    with progress("tokenizing", sum(path.stat().st_size for path in inputs)) as advance:
        blocks = _blocks(inputs, encoder.fields, begin, advance)
        if workers == 1:
            yield from (encoder(*block) for block in blocks)
            return
        first = list(islice(blocks, _INLINE_BLOCKS + 1))
        if len(first) <= _INLINE_BLOCKS:
            yield from (encoder(*block) for block in first)
            return
        yield from _in_processes(chain(first, blocks), encoder, workers)


def _blocks(
    inputs: Sequence[Path],
    fields: Sequence[str],
    begin: Callable[[int], Position | None],
    advance: Callable[[int], None],
) -> Iterator[tuple[int, Block]]:
    """The blocks of all inputs with the numbers of these."""
    for source, path in enumerate(inputs):
        start = begin(source)
        if start is None:
            advance(path.stat().st_size)
            continue
        for block in read_blocks(path, fields, start=start, advance=advance):
            yield source, block


def _in_processes(
    blocks: Iterator[tuple[int, Block]], encoder: Encoder, workers: int
) -> Iterator[Encoded]:
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(encoder,),
    )
    running: deque[tuple[Future[Encoded], int]] = deque()
    try:
        for source, block in blocks:
            size = _size(block)
            # Few blocks, and not much text, wait in memory; a giant alone is always let through.
            while running and (
                len(running) >= 3 * workers
                or size + sum(s for _, s in running) > workers * _AHEAD_BYTES
            ):
                yield running.popleft()[0].result()
            running.append((pool.submit(_encode, source, block), size))
        while running:
            yield running.popleft()[0].result()
    except BrokenProcessPool as error:
        raise UserError(
            "a process that tokenizes was killed, most likely as memory ran out. Use fewer "
            "--workers."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _size(block: Block) -> int:
    if isinstance(block.content, list):
        return sum(len(text) for row in block.content for text in row if text)
    return len(block.content or b"")


_encoder: Encoder  # of a process of the pool


def _start_worker(encoder: Encoder) -> None:
    global _encoder
    _encoder = encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that was killed cannot tell its processes to end."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode(source: int, block: Block) -> Encoded:
    return _encoder(source, block)
