"""`megaswitch tokenizer`."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import click

from megaswitch.cli.common import PATH
from megaswitch.log import info


@click.group()
def tokenizer() -> None:
    """Make a vocabulary."""


@tokenizer.command("train")
@click.argument("inputs", nargs=-1, required=True, type=PATH)
@click.option("--output", required=True, type=PATH, help="Model file to write.")
@click.option("--vocab-size", default=32_100, show_default=True, help="Ids, with the sentinels.")
@click.option("--text-field", default="text", show_default=True, help="Of JSON lines and Parquet.")
@click.option("--character-coverage", default=0.9995, show_default=True)
@click.option("--threads", default=os.cpu_count() or 1, show_default="all cores")
def tokenizer_train(
    inputs: tuple[Path, ...],
    output: Path,
    vocab_size: int,
    text_field: str,
    character_coverage: float,
    threads: int,
) -> None:
    """Train a SentencePiece unigram model by T5's conventions.

    INPUTS are JSON lines (field "text") or plain text, plain, .gz, .xz or .zst, or Parquet. Pad is
    0, EOS 1, unknown 2, unknown characters fall back to bytes, and 100 sentinels are the top of the
    vocabulary.

    Example: megaswitch tokenizer train corpus.jsonl.zst --output spm.model --vocab-size 32100
    """
    from megaswitch.data.tokenizer import train_tokenizer

    # SentencePiece notices no Ctrl-C for hours, and leaves nothing behind: the signal may kill.
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        train_tokenizer(
            list(inputs),
            output,
            vocab_size=vocab_size,
            character_coverage=character_coverage,
            threads=threads,
            text_field=text_field,
        )
    finally:
        signal.signal(signal.SIGINT, before)
    info(f"wrote {output}")
