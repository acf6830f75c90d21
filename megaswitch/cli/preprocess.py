"""`megaswitch preprocess`."""

from __future__ import annotations

import json
import os
from pathlib import Path

import click

from megaswitch.cli.common import PATH, echo


@click.command()
@click.argument("inputs", nargs=-1, required=True, type=PATH)
@click.option("--output", required=True, type=PATH, help="Prefix of the files to write.")
@click.option("--tokenizer", "model", required=True, type=PATH, help="SentencePiece model.")
@click.option("--workers", default=os.cpu_count() or 1, show_default="all cores", help="Processes.")
@click.option("--text-field", default="text", show_default=True, help="Of JSON lines and Parquet.")
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
@click.option("--json", "as_json", is_flag=True, help="Report as JSON, with counts per input.")
def preprocess(
    inputs: tuple[Path, ...],
    output: Path,
    model: Path,
    workers: int,
    text_field: str,
    valid_fraction: float,
    seed: int,
    pairs: bool,
    task: str | None,
    as_json: bool,
) -> None:
    """Turn text into the `.bin` and `.idx` files that training reads.

    INPUTS are JSON lines (field "text") or plain text, plain, .gz, .xz or .zst, or Parquet. The
    format is Megatron's. The same command after a kill goes on where it was.

    Example: megaswitch preprocess corpus.jsonl.gz --tokenizer spm.model --output data/corpus
    """
    from megaswitch.data.preprocess import preprocess as run
    from megaswitch.data.task_pairs import preprocess_task
    from megaswitch.data.tasks import find_task
    from megaswitch.data.text_to_text import preprocess_pairs

    if (pairs or task) and (valid_fraction or seed or text_field != "text"):
        raise click.UsageError("pairs keep their order and their fields; leave out the others")
    if task:
        report = preprocess_task(list(inputs), output, model, find_task(task), workers=workers)
    elif pairs:
        report = preprocess_pairs(list(inputs), output, model, workers=workers)
    else:
        report = run(
            list(inputs),
            output,
            model,
            workers=workers,
            text_field=text_field,
            valid_fraction=valid_fraction,
            seed=seed,
        )
    if as_json:
        echo(json.dumps(report.as_json(), indent=1))
