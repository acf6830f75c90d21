"""Pairs of texts, for fine-tuning: from JSON lines or Parquet to two corpora side by side."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import IO

from megaswitch.data.blocks import check_inputs, is_json_lines, is_parquet
from megaswitch.data.encode_files import encode_files
from megaswitch.data.encoding import Encoder
from megaswitch.data.indexed import IndexedWriter, companion, token_dtype
from megaswitch.data.preprocess import PreprocessReport, check_usable, explained
from megaswitch.data.spool import InputCounts
from megaswitch.data.tokenizer import Tokenizer
from megaswitch.log import UserError, info

FIELDS = ("inputs", "targets")


def preprocess_pairs(
    inputs: Sequence[Path],
    output_prefix: Path,
    tokenizer_path: Path,
    *,
    workers: int = 1,
    num_extra_ids: int = 100,
) -> PreprocessReport:
    """Write `<prefix>_inputs` and `<prefix>_targets`, whose documents k belong together.

    Texts are stored whole and without EOS: what is too long is cut, and EOS written, when a sample
    is made, so that one corpus serves all row lengths. `<extra_id_n>` is that sentinel. Pairs keep
    their order; training shuffles the rows.

    Args:
        inputs: JSON lines (optionally .gz, .xz or .zst) or Parquet, with strings under "inputs" and
            "targets".
        output_prefix: path of the corpora; replaced if they exist. Lines that hold no pair are
            listed in `<prefix>.rejected.jsonl`.
        tokenizer_path: a SentencePiece model file.
        workers: processes that tokenize.
        num_extra_ids: sentinels on top of the tokenizer's vocabulary.

    Returns:
        the report, which is also printed; `documents` counts pairs.

    Raises:
        UserError: if files are missing, damaged, of another kind or without a usable pair.
    """
    check_inputs(inputs, FIELDS)
    _check_formats(inputs)
    started = time.monotonic()
    tokenizer = Tokenizer(tokenizer_path, num_extra_ids)
    report = write_pairs(inputs, output_prefix, tokenizer, workers=workers)
    report.seconds = time.monotonic() - started
    info(str(report))
    return report


def write_pairs(
    inputs: Sequence[Path], output_prefix: Path, tokenizer: Tokenizer, *, workers: int
) -> PreprocessReport:
    """The work of `preprocess_pairs` on files that are checked."""
    encoder = Encoder(tokenizer, FIELDS, append_eos=False, sentinels=True)
    report = PreprocessReport(
        prefixes=[companion(output_prefix, f"_{field}") for field in FIELDS],
        inputs=[InputCounts(str(path), path.stat().st_size) for path in inputs],
    )
    dtype = token_dtype(tokenizer.vocab_size)
    writers = [IndexedWriter(prefix, dtype, tokenizer=tokenizer.info) for prefix in report.prefixes]
    rejected_path = companion(output_prefix, ".rejected.jsonl")
    with (
        explained(output_prefix),
        writers[0],
        writers[1],
        _rejected_lines(rejected_path) as rejected,
        closing(encode_files(inputs, encoder, workers=workers)) as blocks,
    ):
        for encoded in blocks:
            for writer, column in zip(writers, encoded.columns, strict=True):
                column.write_to(writer)
            report.inputs[encoded.source].add(encoded)
            report.rejections.extend(encoded.rejections)
            rejected.write(encoded.rejected)
        check_usable(report, "pair", "'inputs' and 'targets'")
    if report.rejections.count:
        report.rejected_file = rejected_path
    return report


def _check_formats(inputs: Sequence[Path]) -> None:
    if other := [f"'{path}'" for path in inputs if not (is_json_lines(path) or is_parquet(path))]:
        raise UserError(
            f"{', '.join(other)}: pairs are read from JSON lines (.jsonl, .ndjson, .json, plain, "
            ".gz, .xz or .zst) or Parquet with strings under 'inputs' and 'targets'."
        )


@contextmanager
def _rejected_lines(path: Path) -> Iterator[IO[bytes]]:
    """A list that appears at `path` when the block ends well, unless it is empty."""
    aside = companion(path, ".partial")
    try:
        with aside.open("wb") as file:
            yield file
        if aside.stat().st_size:
            aside.replace(path)
        else:
            path.unlink(missing_ok=True)
    finally:
        aside.unlink(missing_ok=True)
