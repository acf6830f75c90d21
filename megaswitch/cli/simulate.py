"""`megaswitch simulate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from megaswitch.cli.common import PATH, echo, stdout
from megaswitch.cli.completion import FREE_FORM, OverridesCommand, complete_override

if TYPE_CHECKING:
    from megaswitch.scale.simulate import Simulation


@click.command(cls=OverridesCommand, context_settings=FREE_FORM)
@click.option("--world", type=click.IntRange(1), required=True, help="Ranks of the run.")
@click.option("--rank", "ranks", type=click.IntRange(0), multiple=True,
              help="A rank to rehearse, or several. Default: one of each kind.")  # fmt: skip
@click.option("--device", type=click.Choice(["cuda", "cpu"]),
              show_default="that of --hardware, else cuda",
              help="Whose kernels are rehearsed. None is needed.")  # fmt: skip
@click.option("--hardware", metavar="NAME|FILE",
              help="Tell times, too: of a100, b200, h100, h200 or a TOML file.")  # fmt: skip
@click.option("--routing", default="uniform", show_default=True, metavar="MODEL",
              help="uniform, zipf:EXPONENT, or a JSON list of tokens by expert.")  # fmt: skip
@click.option("--plot", type=PATH, help="Draw the pipeline: .png, or .json for Perfetto.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable, every collective.")
@click.argument("config", type=PATH)
@click.argument("overrides", nargs=-1, type=click.UNPROCESSED, shell_complete=complete_override)
def simulate(
    world: int,
    ranks: tuple[int, ...],
    device: str | None,
    hardware: str | None,
    routing: str,
    plot: Path | None,
    as_json: bool,
    config: Path,
    overrides: tuple[str, ...],
) -> None:
    """Rehearse a training step of any number of ranks on this machine.

    The code of a run builds a rank's part of the model and takes a step with it, on shapes alone:
    no GPU, no data, little memory. Shows the most memory in use by kind, every collective and the
    FLOPs; for all ranks together the parameters and, drawn at random, drops and load of experts.

    \b
    Examples:
      megaswitch simulate run.toml --world 8 --parallel.ep=8
      megaswitch simulate run.toml --world 2048 --rank 0 --routing zipf:0.3 --json
      megaswitch simulate run.toml --world 8 --hardware h100
    """
    from megaswitch.config import load_config
    from megaswitch.log import UserError

    resolved = load_config(config, overrides, world_size=world)
    if wrong := [rank for rank in ranks if rank >= world]:
        raise UserError(f"--rank {wrong[0]} must be less than --world {world}")
    if plot and resolved.parallel.pp == 1:
        raise UserError("--plot draws a pipeline, and parallel.pp=1 makes none; leave it out")
    from megaswitch.scale.hardware import load_hardware
    from megaswitch.scale.simulate import as_table
    from megaswitch.scale.simulate import simulate as run
    from megaswitch.scale.timeline import write_trace

    machine = load_hardware(hardware) if hardware else None
    device = device or (machine.device if machine else "cuda")
    simulation = run(resolved, world, ranks or None, device, routing, machine)
    if plot:
        write_trace(simulation.spans, plot)
    if as_json:
        echo(json.dumps(as_table(simulation), indent=2))
    else:
        _print(simulation)


def _print(simulation: Simulation) -> None:
    from rich.table import Table

    from megaswitch.scale.recorder import KINDS
    from megaswitch.scale.timeline import bubble

    table = Table("rank", "pp", "blocks", *KINDS, "peak GiB", "TFLOP", box=None)
    for step in simulation.steps:
        blocks = f"{step.blocks[0]} … {step.blocks[-1]}"
        sizes = [f"{step.memory[kind] / 2**30:.3f}" for kind in KINDS]
        peak, flops = f"{step.peak / 2**30:.3f}", f"{step.work.flops / 1e12:.3f}"
        table.add_row(str(step.rank), str(step.pipeline_rank), blocks, *sizes, peak, flops)
    stdout().print(table)
    step = simulation.steps[0]
    if step.collectives:
        table = Table("collective", "axis", "calls", "MiB each", "MiB in all", box=None)
        for kind, calls in sorted(step.collectives.items(), key=lambda x: -x[0].size * x[1]):
            each, total = f"{kind.size / 2**20:.3f}", f"{kind.size * calls / 2**20:,.1f}"
            table.add_row(kind.operation, kind.axis, str(calls), each, total)
        stdout().print(f"\nWhat rank {step.rank} tells others in a step "
                       f"of {step.micro_batches} micro-batches:")  # fmt: skip
        stdout().print(table)
    for one, seconds in zip(simulation.steps, simulation.seconds, strict=False):
        parts = ", ".join(f"{name} {took:.3g}" for name, took in seconds.items())
        echo(f"\nrank {one.rank}, seconds if nothing hides and nobody waits: {parts}")
    for stack, load in simulation.loads.items():
        echo(
            f"\n{stack}: {load.dropped:.2%} of tokens dropped, busiest expert "
            f"×{load.busiest_expert:.2f}, busiest rank ×{load.busiest_rank:.2f} of an even share"
        )
    if simulation.spans:
        echo(f"\npipeline: ranks wait {bubble(simulation.spans):.1%} of the time")
    if simulation.total_parameters is not None:
        echo(f"\n{simulation.total_parameters:,} parameters over all ranks")
