"""`megaswitch merge`."""

from __future__ import annotations

from pathlib import Path

import click

from megaswitch.cli.common import PATH


@click.command()
@click.argument("checkpoint", type=PATH)
@click.option("--output", required=True, type=PATH, help="Folder of the merged run; must be new.")
def merge(checkpoint: Path, output: Path) -> None:
    """Add a model's low-rank adapters to the weights that they adapt.

    CHECKPOINT is a checkpoint or a run folder, whose newest is taken. The result is a plain model
    with the same outputs, which every command takes. It needs memory for one copy of the model.

    Example: megaswitch merge runs/tuned --output runs/merged
    """
    from megaswitch.log import info
    from megaswitch.train.merge import merge_checkpoint

    info(f"merged into {merge_checkpoint(checkpoint, output)}")
