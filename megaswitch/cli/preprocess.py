"""`megaswitch preprocess`."""

from __future__ import annotations

import os
from pathlib import Path

import click

from megaswitch.cli.common import PATH


@click.command()
@click.argument("inputs", nargs=-1, required=True, type=PATH)
@click.option("--output", required=True, type=PATH, help="Prefix of the files to write.")
@click.option("--tokenizer", "model", required=True, type=PATH, help="SentencePiece model.")
@click.option("--workers", default=os.cpu_count() or 1, show_default="all cores")
@click.option(
    "--valid-fraction",
    default=0.0,
    show_default=True,
    help="Share of documents held out; writes PREFIX_train and PREFIX_valid.",
)
@click.option("--seed", default=0, show_default=True, help="Of the document shuffle.")
@click.option(
    "--pairs",
    is_flag=True,
    help='Fields "inputs" and "targets" instead of "text"; writes PREFIX_inputs and '
    "PREFIX_targets, for data.objective=text-to-text.",
)
@click.option("--task", metavar="NAME", help="Pairs of a task's files: a public task or a TOML "
              "file; see megaswitch finetune.")  # fmt: skip
def preprocess(
    inputs: tuple[Path, ...],
    output: Path,
    model: Path,
    workers: int,
    valid_fraction: float,
    seed: int,
    pairs: bool,
    task: str | None,
) -> None:
    """Turn text into the `.bin` and `.idx` files that training reads.

    INPUTS are JSON lines (field "text") or plain text, plain, .gz or .zst. The format is
    Megatron's.

    Example: megaswitch preprocess corpus.jsonl.gz --tokenizer spm.model --output data/corpus
    """
    from megaswitch.data.preprocess import preprocess as run
    from megaswitch.data.tasks import find_task
    from megaswitch.data.text_to_text import preprocess_pairs, preprocess_task

    if pairs or task:
        if valid_fraction or seed:
            raise click.UsageError("--pairs keeps all pairs in their order; leave out the others")
        if task:
            preprocess_task(list(inputs), output, model, find_task(task), workers=workers)
            return
        preprocess_pairs(list(inputs), output, model, workers=workers)
        return
    run(
        list(inputs),
        output,
        model,
        workers=workers,
        valid_fraction=valid_fraction,
        seed=seed,
    )
