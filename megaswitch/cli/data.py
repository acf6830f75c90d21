"""`megaswitch data`."""

from __future__ import annotations

from pathlib import Path

import click

from megaswitch.cli.common import PATH
from megaswitch.log import UserError


@click.group()
def data() -> None:
    """Join and cut token files."""


@data.command()
@click.argument("inputs", nargs=-1, required=True, type=PATH)
@click.option("--output", required=True, type=PATH, help="Prefix of the files to write.")
def merge(inputs: tuple[Path, ...], output: Path) -> None:
    """Join token files into one corpus, in the order given.

    INPUTS are prefixes, or their .idx files. All must be of one tokenizer. Ids of different types
    are widened.

    Example: megaswitch data merge shards/*.idx --output data/corpus
    """
    from megaswitch.data.merge import merge as run

    run([_prefix(path) for path in inputs], output)


@data.command()
@click.argument("prefix", type=PATH)
@click.option("--output", required=True, type=PATH, help="Prefix of the files to write.")
@click.option("--parts", type=int, help="Write so many, of about equally many tokens.")
@click.option("--documents", type=int, help="Documents of each part; the last may have fewer.")
@click.option("--share", multiple=True, help="NAME=SHARE of the tokens; one for each part.")
def split(
    prefix: Path, output: Path, parts: int | None, documents: int | None, share: tuple[str, ...]
) -> None:
    """Cut a corpus into parts between documents, in its order.

    The parts are OUTPUT_00, OUTPUT_01 and so on, or OUTPUT_NAME by shares. `megaswitch preprocess`
    has shuffled the documents, so any part of its corpora is a fair sample.

    \b
    Examples:
      megaswitch data split data/corpus --output shards/corpus --parts 8
      megaswitch data split data/corpus --output data/corpus --share train=0.99 --share valid=0.01
    """
    from megaswitch.data.merge import parse_shares
    from megaswitch.data.merge import split as run

    if sum((parts is not None, documents is not None, bool(share))) != 1:
        raise UserError("say how to cut with exactly one of --parts, --documents and --share.")
    shares = parse_shares(share) if share else None
    run(_prefix(prefix), output, parts=parts, documents=documents, shares=shares)


def _prefix(path: Path) -> Path:
    """The prefix, where one of its files is named."""
    return path.with_suffix("") if path.suffix in (".idx", ".bin") else path
