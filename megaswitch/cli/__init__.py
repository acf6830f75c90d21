"""The command line. Bodies import what they need, so `--help` answers at once."""

from __future__ import annotations

import os
import sys

import click

from megaswitch import __version__
from megaswitch.cli.preprocess import preprocess
from megaswitch.cli.presets import presets
from megaswitch.cli.tokenizer import tokenizer
from megaswitch.cli.train import train
from megaswitch.log import UserError


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def cli() -> None:
    """Train Switch Transformers, from a laptop to trillion-parameter clusters."""


for command in (presets, tokenizer, preprocess, train):
    cli.add_command(command)


def main() -> None:
    """Entry point: mistakes that the user can mend end with a paragraph and exit code 2."""
    try:
        cli()
    except (UserError, OSError, ImportError) as error:
        rank = os.environ.get("RANK", "0")
        prefix = "error" if rank == "0" else f"error on rank {rank}"
        print(f"{prefix}: {error}", file=sys.stderr)
        sys.exit(2)
