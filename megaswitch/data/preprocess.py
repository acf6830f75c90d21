"""Text files to token files: tokenize, shuffle the documents, split off a validation set."""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megaswitch import native
from megaswitch.data.blocks import check_inputs
from megaswitch.data.encode_files import encode_files
from megaswitch.data.encoding import Encoder
from megaswitch.data.indexed import IndexedWriter, companion, token_dtype
from megaswitch.data.progress import progress
from megaswitch.data.spool import InputCounts, Spool
from megaswitch.data.text_files import TEXT, RejectionLog
from megaswitch.data.tokenizer import Tokenizer
from megaswitch.log import UserError, info

_ORDER_CHUNK = 1 << 16  # positions of the shuffle held in memory at a time


@dataclass
class PreprocessReport:
    """What `preprocess` did.

    Attributes:
        prefixes: of the corpora written.
        inputs: what each input gave.
        rejections: lines passed over.
        rejected_file: with all of these, if there are any.
        seconds: wall time, of the last run if it went on from another.
    """

    prefixes: list[Path] = field(default_factory=list)
    inputs: list[InputCounts] = field(default_factory=list)
    rejections: RejectionLog = field(default_factory=RejectionLog)
    rejected_file: Path | None = None
    seconds: float = 0.0

    @property
    def documents(self) -> int:
        """Written, or pairs of them."""
        return sum(one.documents for one in self.inputs)

    @property
    def tokens(self) -> int:
        """Written, EOS included."""
        return sum(one.tokens for one in self.inputs)

    @property
    def input_bytes(self) -> int:
        """On disk, compressed where the files are."""
        return sum(one.bytes for one in self.inputs)

    @property
    def characters(self) -> int:
        """In the documents."""
        return sum(one.characters for one in self.inputs)

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
        if self.rejected_file:
            lines.append(f"all of them: {self.rejected_file}")
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        """The same for programs."""
        return {
            "documents": self.documents,
            "tokens": self.tokens,
            "input_bytes": self.input_bytes,
            "characters": self.characters,
            "characters_per_token": self.characters_per_token,
            "rejected": self.rejections.count,
            "rejected_file": str(self.rejected_file) if self.rejected_file else None,
            "seconds": round(self.seconds, 3),
            "prefixes": [str(prefix) for prefix in self.prefixes],
            "inputs": [asdict(one) for one in self.inputs],
        }


def preprocess(
    inputs: Sequence[Path],
    output_prefix: Path,
    tokenizer_path: Path,
    *,
    workers: int = 1,
    text_field: str = TEXT,
    append_eos: bool = True,
    valid_fraction: float = 0.0,
    shuffle: bool = True,
    seed: int = 0,
    num_extra_ids: int = 100,
) -> PreprocessReport:
    """Make a corpus: tokenize all documents and write them in an order keyed by `seed`.

    Training reads chunks of the flat stream, in which neighbours stay neighbours, so documents are
    shuffled here once. Tokens go through `<prefix>.spool`, a folder as large as the output; memory
    does not grow with the corpus. The same call after a kill goes on from that folder, as far as
    the inputs and what tokens depend on are the same, and writes the same files.

    Args:
        inputs: JSONL, plain text or Parquet, the first two optionally .gz, .xz or .zst.
        output_prefix: path of the corpus without suffixes; replaced if it exists. With a validation
            split two are written, `<prefix>_train` and `<prefix>_valid`. Lines that hold no usable
            document are listed in `<prefix>.rejected.jsonl`.
        tokenizer_path: a SentencePiece model file.
        workers: processes that tokenize; the corpus does not depend on it.
        text_field: of JSON objects and of Parquet rows.
        append_eos: end every document with EOS.
        valid_fraction: share of documents held out, 0 to below 1; rounded up to at least one.
        shuffle: False keeps the documents in their order.
        seed: of the shuffle and of the split, 0 to 2^64 - 1.
        num_extra_ids: sentinels on top of the tokenizer's vocabulary.

    Returns:
        the report, which is also printed.

    Raises:
        UserError: if inputs are missing or damaged or hold no usable document.
    """
    _check_numbers(valid_fraction, seed)
    check_inputs(inputs, (text_field,))
    tokenizer = Tokenizer(tokenizer_path, num_extra_ids)
    encoder = Encoder(tokenizer, (text_field,), append_eos)
    started = time.monotonic()
    with explained(output_prefix), Spool(
        companion(output_prefix, ".spool"), inputs, encoder.settings,
        token_dtype(tokenizer.vocab_size),
    ) as spool:  # fmt: skip
        _tokenize(inputs, encoder, spool, workers)
        report = PreprocessReport(inputs=spool.counts, rejections=spool.rejections())
        check_usable(report, fields=f"'{text_field}'")
        report.prefixes = _write(
            spool, output_prefix, tokenizer, valid_fraction, seed if shuffle else None
        )
        rejected = companion(output_prefix, ".rejected.jsonl")
        report.rejected_file = rejected if spool.publish_rejections(rejected) else None
    report.seconds = time.monotonic() - started
    info(str(report))
    return report


def _tokenize(inputs: Sequence[Path], encoder: Encoder, spool: Spool, workers: int) -> None:
    with closing(encode_files(inputs, encoder, workers=workers, begin=spool.begin)) as blocks:
        for encoded in blocks:
            spool.add(encoded)
    spool.finish()


def check_usable(report: PreprocessReport, what: str = "document", fields: str = "'text'") -> None:
    """Refuse inputs that gave nothing.

    Raises:
        UserError: saying what was found instead.
    """
    if report.documents == 0:
        raise UserError(
            f"the inputs hold no usable {what} ({report.rejections.summary()}). Give JSONL or "
            f"Parquet with the text under {fields}"
            + (", or plain text." if what == "document" else ".")
        )


@contextmanager
def explained(output_prefix: Path) -> Iterator[None]:
    """Errors of writing in words for the user."""
    try:
        yield
    except OSError as error:
        remedy = "Choose an output prefix in a folder you may write to."
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            remedy = "About twice its size is needed there while it is made."
        raise UserError(
            f"cannot write the corpus '{output_prefix}': {error.strerror}. {remedy}"
        ) from error


def _check_numbers(valid_fraction: float, seed: int) -> None:
    if not 0.0 <= valid_fraction < 1.0:
        raise UserError(f"valid_fraction is {valid_fraction}; it must lie in [0, 1).")
    if not 0 <= seed < 1 << 64:
        raise UserError(f"the shuffle seed is {seed}; it must lie in [0, 2^64).")


def _write(
    spool: Spool, output_prefix: Path, tokenizer: Tokenizer, valid_fraction: float, seed: int | None
) -> list[Path]:
    """Write the corpora, which appear together; their prefixes."""
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
    with progress("writing", spool.num_tokens) as advance, ExitStack() as all_or_none:
        for prefix, start, stop in parts:
            writer = IndexedWriter(prefix, spool.dtype, tokenizer=tokenizer.info)
            all_or_none.enter_context(writer)
            for tokens in spool.documents(_order(start, stop, documents, seed)):
                tokens.write_to(writer)
                advance(len(tokens.ids))
            writer.finish()
    return [prefix for prefix, _, _ in parts]


def _order(start: int, stop: int, documents: int, seed: int | None) -> Iterator[NDArray[np.int64]]:
    """The documents at places [start, stop) of the corpus, in pieces."""
    for chunk in range(start, stop, _ORDER_CHUNK):
        places = np.arange(chunk, min(chunk + _ORDER_CHUNK, stop))
        if seed is None:
            yield places
        else:
            yield native.permute(places, size=documents, seed=seed, epoch=0)
