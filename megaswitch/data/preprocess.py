"""Text files to token files: tokenize, shuffle the documents, split off a validation set."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from megaswitch.data import native
from megaswitch.data.indexed import IndexedWriter, TokenStore, companion, token_dtype
from megaswitch.data.text_files import (
    Document,
    Rejection,
    RejectionLog,
    check_inputs,
    read_documents,
)
from megaswitch.data.tokenizer import Tokenizer
from megaswitch.log import UserError, console, info

_BATCH_CHARACTERS = 1 << 22  # tokenized at a time, in parallel
_BATCH_DOCUMENTS = 1 << 14
_ORDER_CHUNK = 1 << 16  # positions of the shuffle held in memory at a time


@dataclass
class PreprocessReport:
    """What `preprocess` did.

    Attributes:
        prefixes: of the corpora written.
        documents: written.
        tokens: written, EOS included.
        input_bytes: read from disk, compressed where the files are.
        characters: in the documents.
        rejections: lines passed over.
        seconds: wall time.
    """

    prefixes: list[Path] = field(default_factory=list)
    documents: int = 0
    tokens: int = 0
    input_bytes: int = 0
    characters: int = 0
    rejections: RejectionLog = field(default_factory=RejectionLog)
    seconds: float = 0.0

    @property
    def characters_per_token(self) -> float:
        """Characters a token stands for on average."""
        return self.characters / self.tokens

    def __str__(self) -> str:
        lines = [
            f"{self.documents:,} documents, {self.tokens:,} tokens from {self.input_bytes:,} bytes "
            f"in {self.seconds:.1f} s ({self.characters_per_token:.2f} characters per token)",
            "written: " + ", ".join(f"{prefix}.bin/.idx" for prefix in self.prefixes),
        ]
        if self.rejections.count:
            lines.append(str(self.rejections))
        return "\n".join(lines)


def preprocess(
    inputs: Sequence[Path],
    output_prefix: Path,
    tokenizer_path: Path,
    *,
    workers: int = 1,
    append_eos: bool = True,
    valid_fraction: float = 0.0,
    seed: int = 0,
    num_extra_ids: int = 100,
) -> PreprocessReport:
    """Make a corpus: tokenize all documents and write them in an order keyed by `seed`.

    Training reads chunks of the flat stream, in which neighbours stay neighbours, so documents are
    shuffled here once. Tokens go through a temporary file beside the output, as large as the
    output; memory does not grow with the corpus.

    Args:
        inputs: JSONL or plain text, optionally .gz or .zst.
        output_prefix: path of the corpus without suffixes; replaced if it exists. With a validation
            split two are written, `<prefix>_train` and `<prefix>_valid`.
        tokenizer_path: a SentencePiece model file.
        workers: threads that tokenize.
        append_eos: end every document with EOS.
        valid_fraction: share of documents held out, 0 to below 1; rounded up to at least one.
        seed: of the shuffle and of the split, 0 to 2^64 - 1.
        num_extra_ids: sentinels on top of the tokenizer's vocabulary.

    Returns:
        the report, which is also printed.

    Raises:
        UserError: if inputs are missing or damaged or hold no usable document.
    """
    _check_numbers(workers=workers, valid_fraction=valid_fraction, seed=seed)
    check_inputs(inputs)
    tokenizer = Tokenizer(tokenizer_path, num_extra_ids)
    started = time.monotonic()
    report = PreprocessReport()
    spool = companion(output_prefix, ".spool")
    try:
        with IndexedWriter(spool, token_dtype(tokenizer.vocab_size)) as writer:
            tokenize(inputs, tokenizer, writer, report, workers=workers, append_eos=append_eos)
        _write_shuffled(TokenStore(spool), output_prefix, tokenizer, report, valid_fraction, seed)
    except OSError as error:
        raise UserError(
            f"cannot write the corpus '{output_prefix}': {error.strerror}. About twice its size "
            "is needed there while it is made."
        ) from error
    finally:
        _remove(spool)
    report.seconds = time.monotonic() - started
    info(str(report))
    return report


def _remove(prefix: Path) -> None:
    for suffix in (".bin", ".idx"):
        with suppress(OSError):  # it must not hide why the folder cannot be written
            companion(prefix, suffix).unlink(missing_ok=True)


def _check_numbers(*, workers: int, valid_fraction: float, seed: int) -> None:
    if not 0.0 <= valid_fraction < 1.0:
        raise UserError(f"valid_fraction is {valid_fraction}; it must lie in [0, 1).")
    if not 0 <= seed < 1 << 64:
        raise UserError(f"the shuffle seed is {seed}; it must lie in [0, 2^64).")
    if workers < 1:
        raise UserError(f"workers is {workers}; at least 1 thread is needed.")


def tokenize(
    inputs: Sequence[Path],
    tokenizer: Tokenizer,
    writer: IndexedWriter,
    report: PreprocessReport,
    *,
    workers: int,
    append_eos: bool,
    by: str | None = None,
    written: Callable[[Document, int], None] = lambda _document, _tokens: None,
) -> None:
    """Write the documents of all inputs as they come.

    Args:
        inputs: JSONL or plain text, optionally .gz or .zst.
        tokenizer: of the documents.
        writer: open.
        report: its counts are filled in.
        workers: threads that tokenize.
        append_eos: end every document with EOS.
        by: field of JSON lines that labels documents.
        written: called with each document written and its number of tokens.
    """
    ending = [tokenizer.eos_id] if append_eos else []
    for batch in _batches(inputs, report, by):
        encoded = tokenizer.encode_batch([document.text for document in batch], threads=workers)
        for document, ids in zip(batch, encoded, strict=True):
            if not ids:
                report.rejections(Rejection(document.path, document.line, "the text has no tokens"))
                continue
            writer.add_document(ids + ending)
            written(document, len(ids) + len(ending))
            report.characters += len(document.text)
    report.documents, report.tokens = writer.num_documents, writer.num_tokens
    if report.documents == 0:
        raise UserError(
            f"the inputs hold no usable document ({report.rejections.summary()}). Give JSONL with "
            "the text under 'text', or plain text."
        )


def _batches(
    inputs: Sequence[Path], report: PreprocessReport, by: str | None
) -> Iterator[list[Document]]:
    """The documents of all inputs in batches, with a progress bar over the files' bytes."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f}%"))
    total = sum(path.stat().st_size for path in inputs)
    with Progress(*columns, TimeRemainingColumn(), console=console()) as progress:
        task = progress.add_task("tokenizing", total=total)

        def advance(count: int) -> None:
            report.input_bytes += count
            progress.advance(task, count)

        batch: list[Document] = []
        characters = 0
        for path in inputs:
            documents = read_documents(path, reject=report.rejections, advance=advance, by=by)
            for document in documents:
                batch.append(document)
                characters += len(document.text)
                if characters >= _BATCH_CHARACTERS or len(batch) >= _BATCH_DOCUMENTS:
                    yield batch
                    batch, characters = [], 0
        if batch:
            yield batch


def _write_shuffled(
    spool: TokenStore,
    output_prefix: Path,
    tokenizer: Tokenizer,
    report: PreprocessReport,
    valid_fraction: float,
    seed: int,
) -> None:
    documents = spool.num_documents
    held_out = int(np.ceil(documents * valid_fraction))
    if held_out >= documents:
        raise UserError(
            f"valid_fraction {valid_fraction} of {documents} documents leaves none to train on. "
            "Lower it or give more documents (blank lines separate them in plain text)."
        )
    parts = [(output_prefix, 0, documents)]
    if held_out:
        parts = [
            (companion(output_prefix, "_valid"), 0, held_out),
            (companion(output_prefix, "_train"), held_out, documents),
        ]
    for prefix, start, stop in parts:
        with IndexedWriter(prefix, spool.dtype, tokenizer=tokenizer.info) as writer:
            for chunk in range(start, stop, _ORDER_CHUNK):
                positions = np.arange(chunk, min(chunk + _ORDER_CHUNK, stop))
                order = native.permute(positions, size=documents, seed=seed, epoch=0)
                for document in order:
                    writer.add_document(spool.document(int(document)))
        report.prefixes.append(prefix)
