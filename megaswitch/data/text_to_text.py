"""Pairs of texts, for fine-tuning: from JSON lines to two corpora side by side."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from megaswitch.data.indexed import IndexedWriter, companion, token_dtype
from megaswitch.data.preprocess import PreprocessReport
from megaswitch.data.tasks import Task
from megaswitch.data.text_files import Rejection, check_inputs, is_json_lines, read_lines
from megaswitch.data.tokenizer import SENTINEL, Tokenizer
from megaswitch.log import UserError, info

FIELDS = ("inputs", "targets")
_BATCH = 1 << 12  # pairs tokenized at a time


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
        inputs: JSON lines with strings under "inputs" and "targets", plain, .gz or .zst.
        output_prefix: path of the corpora; replaced if they exist.
        tokenizer_path: a SentencePiece model file.
        workers: threads that tokenize.
        num_extra_ids: sentinels on top of the tokenizer's vocabulary.

    Returns:
        the report, which is also printed; `documents` counts pairs.

    Raises:
        UserError: if files are missing, damaged, of another kind or without a usable pair.
    """
    check_inputs(inputs)
    if other := [f"'{path}'" for path in inputs if not is_json_lines(path)]:
        raise UserError(
            f"{', '.join(other)}: pairs are read from JSON lines (.jsonl, .ndjson, .json, plain, "
            ".gz or .zst) with strings under 'inputs' and 'targets'."
        )
    report = PreprocessReport()
    what = "Give JSON lines with strings under 'inputs' and 'targets'."
    tokenizer = Tokenizer(tokenizer_path, num_extra_ids)
    return _write_pairs(_pairs(inputs, report), report, output_prefix, tokenizer, workers, what)


def preprocess_task(
    inputs: Sequence[Path],
    output_prefix: Path,
    tokenizer_path: Path,
    task: Task,
    *,
    workers: int = 1,
    num_extra_ids: int = 100,
) -> PreprocessReport:
    """`preprocess_pairs` of a task's files: the texts that its templates make of their records.

    Args:
        inputs: see `read_records`.
        output_prefix: as there, and so the others.
        tokenizer_path: a SentencePiece model file.
        task: what records mean.
        workers: threads that tokenize.
        num_extra_ids: sentinels on top of the tokenizer's vocabulary.

    Raises:
        UserError: if files are missing or damaged or without a usable example.
    """
    check_inputs(inputs)
    report = PreprocessReport()
    report.input_bytes = sum(path.stat().st_size for path in inputs)
    what = "Give the files that the task is for, or the task of the files."
    tokenizer = Tokenizer(tokenizer_path, num_extra_ids)
    pairs = _task_pairs(inputs, task, report)
    return _write_pairs(pairs, report, output_prefix, tokenizer, workers, what)


def _task_pairs(inputs: Sequence[Path], task: Task, report: PreprocessReport) -> Iterator[_Pair]:
    for path in inputs:
        for example in task.examples(path, report.rejections, training=True):
            yield path, example.line, [example.inputs, example.targets or ""]


def _write_pairs(
    pairs: Iterator[_Pair],
    report: PreprocessReport,
    output_prefix: Path,
    tokenizer: Tokenizer,
    workers: int,
    what: str,
) -> PreprocessReport:
    """Write the corpora; `what` says what to give if there is no pair."""
    started = time.monotonic()
    report.prefixes = [companion(output_prefix, f"_{field}") for field in FIELDS]
    dtype = token_dtype(tokenizer.vocab_size)
    writers = [IndexedWriter(prefix, dtype, tokenizer=tokenizer.info) for prefix in report.prefixes]
    try:
        with writers[0], writers[1]:
            while batch := list(islice(pairs, _BATCH)):
                _write(batch, writers, tokenizer, report, workers)
            if writers[0].num_documents == 0:
                raise UserError(
                    f"the inputs hold no usable pair ({report.rejections.summary()}). {what}"
                )
    except OSError as error:
        raise UserError(f"cannot write the corpus '{output_prefix}': {error.strerror}.") from error
    report.documents = writers[0].num_documents
    report.tokens = sum(writer.num_tokens for writer in writers)
    report.seconds = time.monotonic() - started
    info(str(report))
    return report


_Pair = tuple[Path, int, list[str]]  # file, line, both texts


def _write(
    batch: Sequence[_Pair],
    writers: Sequence[IndexedWriter],
    tokenizer: Tokenizer,
    report: PreprocessReport,
    workers: int,
) -> None:
    texts = [text for _, _, pair in batch for text in pair]
    ids = tokenizer.encode_batch(texts, threads=workers)
    for place, text in enumerate(texts):
        if SENTINEL.search(text):
            ids[place] = tokenizer.encode(text)
    for number, (path, line, pair) in enumerate(batch):
        both = ids[2 * number : 2 * number + 2]
        if empty := [field for field, found in zip(FIELDS, both, strict=True) if not found]:
            report.rejections(Rejection(path, line, f"no tokens under '{empty[0]}'"))
            continue
        for writer, tokens in zip(writers, both, strict=True):
            writer.add_document(tokens)
        report.characters += sum(map(len, pair))


def _pairs(inputs: Sequence[Path], report: PreprocessReport) -> Iterator[_Pair]:
    for path in inputs:

        def advance(count: int) -> None:
            report.input_bytes += count

        for number, line in enumerate(read_lines(path, advance), start=1):
            if line is not None and not line.strip():
                continue
            try:
                yield path, number, _pair_of(line)
            except (ValueError, RecursionError) as error:
                report.rejections(Rejection(path, number, str(error)))


def _pair_of(line: bytes | None) -> list[str]:
    """Both texts of a line of JSON; ValueError says what is wrong with it."""
    if line is None:
        raise ValueError("the line is too long")
    record = json.loads(line.decode("utf-8"))
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    texts: list[str] = []
    for field in FIELDS:
        if not isinstance(text := record.get(field), str):
            raise ValueError(f"no string under '{field}'")
        text.encode("utf-8")  # half a surrogate pair is a ValueError too
        texts.append(text)
    return texts
