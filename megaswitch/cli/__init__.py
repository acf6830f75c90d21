"""The command line. Bodies import what they need, so `--help` answers at once."""

from __future__ import annotations

import os
import sys

import click

from megaswitch import __version__
from megaswitch.cli.common import explain
from megaswitch.cli.completion import completion
from megaswitch.cli.convert import convert
from megaswitch.cli.data import data
from megaswitch.cli.distill import distill
from megaswitch.cli.doctor import doctor
from megaswitch.cli.evaluate import evaluate
from megaswitch.cli.finetune import finetune
from megaswitch.cli.generate import generate
from megaswitch.cli.inspect import inspect_command
from megaswitch.cli.merge import merge
from megaswitch.cli.plan import plan
from megaswitch.cli.preprocess import preprocess
from megaswitch.cli.presets import presets
from megaswitch.cli.report import report
from megaswitch.cli.reshard import reshard
from megaswitch.cli.simulate import simulate
from megaswitch.cli.study import study
from megaswitch.cli.tokenizer import tokenizer
from megaswitch.cli.train import train
from megaswitch.cli.watch import watch
from megaswitch.log import UserError, is_rank_zero


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def cli() -> None:
    """Train Switch Transformers, from a laptop to trillion-parameter clusters."""


for command in (presets, tokenizer, preprocess, data, train, finetune, distill, merge):
    cli.add_command(command)
for command in (evaluate, generate, study, plan, simulate, convert, reshard):
    cli.add_command(command)
for command in (inspect_command, watch, report, doctor, completion):
    cli.add_command(command)


def main() -> None:
    """Entry point: mistakes that the user can mend end with a paragraph and exit code 2."""
    try:
        sys.exit(cli.main(standalone_mode=False) or 0)
    except click.ClickException as error:
        if is_rank_zero():
            error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        if is_rank_zero():
            print("interrupted", file=sys.stderr)
        sys.exit(130)
    except (UserError, OSError, ImportError) as error:
        prefix = "error" if is_rank_zero() else f"error on rank {os.environ['RANK']}"
        print(f"{prefix}: {explain(error)}", file=sys.stderr)
        sys.exit(2)
