"""`megaswitch convert`: models made from other models."""

from __future__ import annotations

import click

from megaswitch.cli.upcycle import prune, upcycle


@click.group()
def convert() -> None:
    """Make a model of another one."""


convert.add_command(upcycle)
convert.add_command(prune)
