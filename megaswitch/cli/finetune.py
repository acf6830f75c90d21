"""`megaswitch finetune`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from megaswitch.cli.common import PATH, echo, stdout
from megaswitch.cli.completion import FREE_FORM, OverridesCommand, complete_override
from megaswitch.log import info


def _print_tasks(context: click.Context, option: click.Parameter, asked: bool) -> None:
    if not asked or context.resilient_parsing:
        return
    from rich.table import Table

    from megaswitch.data.tasks import builtin_tasks

    table = Table("task", "answers", "metrics", "inputs", box=None)
    for name, task in builtin_tasks().items():
        answers = "chosen" if task.ranks else "written"
        table.add_row(name, answers, ", ".join(task.metrics), task.inputs)
    stdout().print(table)
    context.exit()


@click.command(cls=OverridesCommand, context_settings=FREE_FORM)
@click.option("--tasks", is_flag=True, is_eager=True, expose_value=False, callback=_print_tasks,
              help="List the public tasks and exit.")  # fmt: skip
@click.option("--from", "source", metavar="RUN", help="Run or checkpoint to start from, as "
              "train.init_from.")  # fmt: skip
@click.option("--show", is_flag=True, help="Print the resolved configuration and exit.")
@click.argument("config", nargs=-1, type=click.UNPROCESSED, shell_complete=complete_override)
def finetune(config: tuple[str, ...], source: str | None, show: bool) -> None:
    """Train a pre-trained model on tasks, or go on where its run stopped.

    CONFIG is a TOML file and OVERRIDES --section.key=value that win over it; either is enough.
    Each entry NAME of data.train is a file, or a pattern of files, of the task NAME: JSON lines,
    TSV or CSV as published, or pairs with fields "inputs" and "targets". data.tasks.NAME names
    another public task, or a TOML file of your own. Model and tokenizer are those of --from, and
    all else is the paper's unless you say otherwise: see --show.

    \b
    Examples:
      megaswitch finetune --from runs/base-8 --data.train.sst2=SST-2/train.tsv
      megaswitch finetune examples/finetune/glue.toml --from runs/base-8 --train.steps=2000
      torchrun --nproc-per-node 8 --no-python megaswitch finetune glue.toml --parallel.ep=8
    """
    files, overrides = [w for w in config if w[:2] != "--"], [w for w in config if w[:2] == "--"]
    if len(files) > 1:
        raise click.UsageError(f"one CONFIG is read, and {len(files)} were given: {files}")
    if source:
        overrides.append(f"--train.init_from={source}")
    from megaswitch.config import to_toml
    from megaswitch.parallel.launcher import world_size
    from megaswitch.train.finetune import finetune_config, headline

    path = PATH.convert(files[0], None, None) if files else None
    assert path is None or isinstance(path, Path)
    resolved = finetune_config(path, overrides, world_size=world_size())
    if show:
        echo(to_toml(resolved))
        return
    info(headline(resolved))
    from megaswitch.train.launch import launch

    if not launch(resolved):
        sys.exit(130)
