"""`megaswitch plan`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from megaswitch.cli.common import PATH, echo, stdout
from megaswitch.cli.completion import FREE_FORM, OverridesCommand, complete_override

if TYPE_CHECKING:
    from megaswitch.config import RunConfig
    from megaswitch.scale.plan import Plan

_PROCESSES = 8  # at most; each holds 350 MB


@click.command(cls=OverridesCommand, context_settings=FREE_FORM)
@click.option("--world", type=click.IntRange(1), required=True, help="Ranks, one to a GPU.")
@click.option("--hardware", default="h100", show_default=True, metavar="NAME|FILE",
              help="a100, b200, h100, h200, or a TOML file like theirs.")  # fmt: skip
@click.option("--tokens", type=click.FloatRange(min=0, min_open=True),
              help="Tokens to train on. Default: those of train.steps.")  # fmt: skip
@click.option("--routing", default="uniform", show_default=True, metavar="MODEL",
              help="uniform, zipf:EXPONENT, or a JSON list of tokens by expert.")  # fmt: skip
@click.option("--output", type=PATH,
              help="Write the best there: run.toml, and run.sbatch for SLURM.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Machine-readable, bytes and seconds.")
@click.argument("model", metavar="PRESET|CONFIG")
@click.argument("overrides", nargs=-1, type=click.UNPROCESSED, shell_complete=complete_override)
def plan(
    world: int,
    hardware: str,
    tokens: float | None,
    routing: str,
    output: Path | None,
    as_json: bool,
    model: str,
    overrides: tuple[str, ...],
) -> None:
    """Search the fastest layouts of a run that fit its GPUs; where none does, say what would.

    Memory comes from a rehearsal of the model's blocks, time from figures of the hardware. What
    changes results (model, batch, precision, optimizer) is taken as it is given. A preset is
    planned in bf16 with batches of 2048 sequences, as the paper's.

    \b
    Examples:
      megaswitch plan switch-base-128 --world 64 --hardware h100
      megaswitch plan run.toml --world 1024 --output plans/run --tokens 576e9
    """
    from megaswitch.scale.hardware import load_hardware
    from megaswitch.scale.plan import as_table, search, tokens_of_run

    machine = load_hardware(hardware)
    config = _config(model, overrides)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    found = search(config, world, machine, routing=routing, processes=min(cores, _PROCESSES))
    tokens = tokens or tokens_of_run(config)
    table = as_table(found, tokens)
    if output and found.best:
        _write(found, output)
    if as_json:
        echo(json.dumps(table, indent=2))
    else:
        _print(table)


def _config(model: str, overrides: tuple[str, ...]) -> RunConfig:
    """The run, whatever its own layout."""
    from megaswitch.config import load_config
    from megaswitch.presets import PRESETS
    from megaswitch.scale.plan import preset_run

    return preset_run(model, overrides) if model in PRESETS else load_config(Path(model), overrides)


def _write(found: Plan, folder: Path) -> None:
    from megaswitch.scale.planned import planned_toml, sbatch

    folder.mkdir(parents=True, exist_ok=True)
    best = found.best[0]
    text = planned_toml(best, found.hardware)
    (folder / "run.toml").write_text(text, encoding="utf-8")
    job = sbatch(best, found.hardware, str(folder / "run.toml"))
    (folder / "run.sbatch").write_text(job, encoding="utf-8")


def _print(table: dict[str, Any]) -> None:
    from rich.table import Table

    for title, part, unit, scale in (
        ("Memory of the fullest GPU, GB", "memory", "{:.1f}", 1e-9),
        ("A step, seconds", "seconds", "{:.3f}", 1.0),
    ):
        if not table["best"]:
            break
        columns = [name.replace("_", " ") for name in table["best"][0][part]]
        rich = Table("", *columns, box=None)
        for number, row in enumerate(table["best"], 1):
            rich.add_row(str(number), *(unit.format(v * scale) for v in row[part].values()))
        stdout().print(f"\n{title}:")
        stdout().print(rich)
    if table["best"]:
        names = ("pp", "edp", "ep", "tp", "zero", "micro_batch_size", "schedule")
        rich = Table("", *(n.replace("_", " ") for n in names), "recompute", "tokens/s", "MFU",
                     "days", "with failures", "dollars", box=None)  # fmt: skip
        for number, row in enumerate(table["best"], 1):
            figures = (f"{row['tokens_per_second']:,.0f}", f"{row['mfu']:.1%}",
                       f"{row['days']:.2f}", f"{row['days_with_failures']:.2f}",
                       f"{row['dollars']:,.0f}")  # fmt: skip
            again = "yes" if row["activation_checkpointing"] else "no"
            schedule = row["schedule"] if row["pp"] > 1 else "–"
            shown = [str(row[n]) for n in names[:-1]]
            rich.add_row(str(number), *shown, schedule, again, *figures)
        hardware, tokens = table["hardware"]["name"], table["tokens"]
        stdout().print(f"\n{table['world']} × {hardware}, {tokens:.3g} tokens:")
        stdout().print(rich)
    echo("\nNot taken:")
    for reason, number in table["rejected"].items():
        echo(f"  {number:>6} layouts: {reason}")
    if not table["best"]:
        echo("\nNothing fits. What would, the smallest change first:")
        for remedy in table["remedies"]:
            echo(f"  {remedy}")
