"""`megaswitch train`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from megaswitch.cli.common import PATH, stdout
from megaswitch.cli.completion import FREE_FORM, OverridesCommand, complete_override


def _print_keys(context: click.Context, option: click.Parameter, asked: bool) -> None:
    if not asked or context.resilient_parsing:
        return
    from rich.table import Table

    from megaswitch.config import describe_keys

    table = Table("key", "default", "meaning", box=None)
    for row in describe_keys():
        table.add_row(*row)
    stdout().print(table)
    context.exit()


@click.command(cls=OverridesCommand, context_settings=FREE_FORM)
@click.option("--keys", is_flag=True, is_eager=True, expose_value=False, callback=_print_keys,
              help="List every configuration key and exit.")  # fmt: skip
@click.option(
    "--profile",
    is_flag=True,
    help="Profile three of the first steps: a table of where a step goes, and a trace.",
)
@click.argument("config", type=PATH)
@click.argument("overrides", nargs=-1, type=click.UNPROCESSED, shell_complete=complete_override)
def train(profile: bool, config: Path, overrides: tuple[str, ...]) -> None:
    """Train the model of a TOML file, or go on where its run stopped.

    OVERRIDES are --section.key=value and win over the file. The newest checkpoint in train.run_dir,
    if there is one, is resumed. Ctrl-C saves a checkpoint and stops.

    \b
    Examples:
      megaswitch train examples/demo.toml --train.steps=100
      megaswitch train --profile run.toml
      torchrun --nproc-per-node 2 -m megaswitch train examples/demo.toml
      srun --nodes 2 --ntasks-per-node 8 megaswitch train run.toml
    """
    from megaswitch.config import load_config
    from megaswitch.parallel.launcher import world_size

    resolved = load_config(config, overrides, world_size=world_size())
    from megaswitch.train.launch import launch

    if not launch(resolved, profile=profile):
        sys.exit(130)
