"""A task's files as pairs of texts to train on."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from megaswitch.data.blocks import check_inputs
from megaswitch.data.preprocess import PreprocessReport, explained
from megaswitch.data.tasks import Task
from megaswitch.data.text_files import RejectionLog
from megaswitch.data.text_to_text import FIELDS, write_pairs
from megaswitch.data.tokenizer import Tokenizer
from megaswitch.log import UserError, info


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
        workers: processes that tokenize.
        num_extra_ids: sentinels on top of the tokenizer's vocabulary.

    Raises:
        UserError: if files are missing or damaged or without a usable example.
    """
    check_inputs(inputs)
    started = time.monotonic()
    tokenizer = Tokenizer(tokenizer_path, num_extra_ids)
    rejections = RejectionLog()
    with explained(output_prefix):
        output_prefix.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=output_prefix.parent, ignore_cleanup_errors=True) as folder:
            texts = [Path(folder) / f"{number}.jsonl" for number in range(len(inputs))]
            found = [
                _write_texts(path, text, task, rejections)
                for path, text in zip(inputs, texts, strict=True)
            ]
            if not any(found):
                raise UserError(
                    f"the inputs hold no usable example ({rejections.summary()}). Give the files "
                    "that the task is for, or the task of the files."
                )
            report = write_pairs(texts, output_prefix, tokenizer, workers=workers)
    rejections.extend(report.rejections)
    report.rejections = rejections
    for counts, path in zip(report.inputs, inputs, strict=True):
        counts.path, counts.bytes = str(path), path.stat().st_size
    report.seconds = time.monotonic() - started
    info(str(report))
    return report


def _write_texts(path: Path, text: Path, task: Task, rejections: RejectionLog) -> int:
    """Write the examples of a file as JSON lines; returns how many there are."""
    count = 0
    with text.open("w", encoding="utf-8") as file:
        for example in task.examples(path, rejections, training=True):
            pair = dict(zip(FIELDS, (example.inputs, example.targets or ""), strict=True))
            file.write(json.dumps(pair) + "\n")
            count += 1
    return count
