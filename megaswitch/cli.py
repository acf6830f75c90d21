"""The command line. Bodies import what they need, so `--help` answers at once."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import click

from megaswitch import __version__
from megaswitch.log import UserError, info

_FREE_FORM = {"ignore_unknown_options": True, "allow_extra_args": True}
_EXISTING = click.Path(path_type=Path)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def cli() -> None:
    """Train Switch Transformers, from a laptop to trillion-parameter clusters."""


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Machine-readable list.")
def presets(as_json: bool) -> None:
    """List the named models with their exact sizes.

    Forward FLOPs are of one sequence of 512 input and 114 target tokens.

    Example: megaswitch presets --json
    """
    import dataclasses

    from megaswitch.config import model_config
    from megaswitch.model.count import count
    from megaswitch.presets import PRESETS

    rows: list[dict[str, Any]] = []
    for name in PRESETS:
        config = model_config(name)
        shape = {
            "d_model": config.d_model,
            "d_ff": config.d_ff,
            "num_heads": config.num_heads,
            "num_encoder_layers": config.num_encoder_layers,
            "num_decoder_layers": config.num_decoder_layers,
            "num_experts": config.moe.num_experts,
        }
        rows.append({"name": name} | dataclasses.asdict(count(config)) | shape)
    if as_json:
        click.echo(json.dumps(rows, indent=2))
    else:
        _print_presets(rows)


def _print_presets(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    titles = ["total parameters", "active", "GFLOP/seq", "d_model", "d_ff", "heads", "layers"]
    table = Table("name", *titles, "experts", box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(
            row["name"],
            f"{row['total_parameters']:,}",
            f"{row['active_parameters']:,}",
            f"{row['forward_flops_per_sequence'] / 1e9:,.1f}",
            *(str(row[k]) for k in ("d_model", "d_ff", "num_heads")),
            f"{row['num_encoder_layers']}+{row['num_decoder_layers']}",
            str(row["num_experts"] or "–"),
        )
    Console(width=None if sys.stdout.isatty() else 140).print(table)


@cli.group()
def tokenizer() -> None:
    """Make a vocabulary."""


@tokenizer.command("train")
@click.argument("inputs", nargs=-1, required=True, type=_EXISTING)
@click.option("--output", required=True, type=_EXISTING, help="Model file to write.")
@click.option("--vocab-size", default=32_100, show_default=True, help="Ids, with the sentinels.")
@click.option("--character-coverage", default=0.9995, show_default=True)
@click.option("--threads", default=os.cpu_count() or 1, show_default="all cores")
def tokenizer_train(
    inputs: tuple[Path, ...],
    output: Path,
    vocab_size: int,
    character_coverage: float,
    threads: int,
) -> None:
    """Train a SentencePiece unigram model by T5's conventions.

    INPUTS are JSON lines (field "text") or plain text, plain, .gz or .zst. Pad is 0, EOS 1, unknown
    2, unknown characters fall back to bytes, and 100 sentinels are the top of the vocabulary.

    Example: megaswitch tokenizer train corpus.jsonl.zst --output spm.model --vocab-size 32100
    """
    from megaswitch.data.tokenizer import train_tokenizer

    train_tokenizer(
        list(inputs),
        output,
        vocab_size=vocab_size,
        character_coverage=character_coverage,
        threads=threads,
    )
    info(f"wrote {output}")


@cli.command()
@click.argument("inputs", nargs=-1, required=True, type=_EXISTING)
@click.option("--output", required=True, type=_EXISTING, help="Prefix of the files to write.")
@click.option("--tokenizer", "model", required=True, type=_EXISTING, help="SentencePiece model.")
@click.option("--workers", default=os.cpu_count() or 1, show_default="all cores")
@click.option(
    "--valid-fraction",
    default=0.0,
    show_default=True,
    help="Share of documents held out; writes PREFIX_train and PREFIX_valid.",
)
@click.option("--seed", default=0, show_default=True, help="Of the document shuffle.")
def preprocess(
    inputs: tuple[Path, ...],
    output: Path,
    model: Path,
    workers: int,
    valid_fraction: float,
    seed: int,
) -> None:
    """Turn text into the `.bin` and `.idx` files that training reads.

    INPUTS are JSON lines (field "text") or plain text, plain, .gz or .zst. The format is
    Megatron's.

    Example: megaswitch preprocess corpus.jsonl.gz --tokenizer spm.model --output data/corpus
    """
    from megaswitch.data.preprocess import preprocess as run

    run(
        list(inputs),
        output,
        model,
        workers=workers,
        valid_fraction=valid_fraction,
        seed=seed,
    )


def _print_keys(context: click.Context, option: click.Parameter, asked: bool) -> None:
    if not asked or context.resilient_parsing:
        return
    from rich.console import Console
    from rich.table import Table

    from megaswitch.config import describe_keys

    table = Table("key", "default", "meaning", box=None)
    for row in describe_keys():
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 140, highlight=False).print(table)
    context.exit()


@cli.command(context_settings=_FREE_FORM)
@click.option("--keys", is_flag=True, is_eager=True, expose_value=False, callback=_print_keys,
              help="List every configuration key and exit.")  # fmt: skip
@click.argument("config", type=_EXISTING)
@click.argument("overrides", nargs=-1, type=click.UNPROCESSED)
def train(config: Path, overrides: tuple[str, ...]) -> None:
    """Train the model of a TOML file, or go on where its run stopped.

    OVERRIDES are --section.key=value and win over the file. The newest checkpoint in train.run_dir,
    if there is one, is resumed. Ctrl-C saves a checkpoint and stops.

    \b
    Examples:
      megaswitch train examples/demo.toml --train.steps=100
      torchrun --nproc-per-node 2 -m megaswitch train examples/demo.toml
    """
    from megaswitch.config import load_config
    from megaswitch.parallel.mesh import Mesh, world_size

    resolved = load_config(config, overrides, world_size=world_size())
    from megaswitch.train.trainer import Trainer

    mesh = Mesh.start(resolved.train.device)
    complete = Trainer.build(resolved, mesh).fit()
    mesh.stop()
    if not complete:
        info("stopped; the same command goes on from the checkpoint")
        sys.exit(130)


def main() -> None:
    """Entry point: mistakes that the user can mend end with a paragraph and exit code 2."""
    try:
        cli()
    except (UserError, OSError, ImportError) as error:
        rank = os.environ.get("RANK", "0")
        prefix = "error" if rank == "0" else f"error on rank {rank}"
        print(f"{prefix}: {error}", file=sys.stderr)
        sys.exit(2)
