"""`megaswitch study`: many runs, and what they say together."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from megaswitch.cli.common import PATH, echo, stdout
from megaswitch.cli.completion import FREE_FORM, OverridesCommand, complete_override
from megaswitch.log import UserError, info

if TYPE_CHECKING:
    from megaswitch.scale.speedup import SpeedUp
    from megaswitch.scale.study import Job, Study


@click.group()
def study() -> None:
    """Run many configurations and compare them."""


_RUNS = click.option("--runs", type=PATH, show_default="as the file says",
                     help="Folder of the runs.")  # fmt: skip
_OVERRIDES = click.argument(
    "overrides", nargs=-1, type=click.UNPROCESSED, shell_complete=complete_override
)


@study.command(cls=OverridesCommand, context_settings=FREE_FORM)
@click.argument("file", type=PATH)
@_OVERRIDES
@_RUNS
@click.option("--jobs", type=click.IntRange(min=1), default=1, show_default=True,
              help="Runs at a time, which share the cores.")  # fmt: skip
@click.option("--only", type=click.IntRange(min=0), multiple=True, metavar="I",
              help="Only the run of this number; may be given again.")  # fmt: skip
@click.option("--list", "list_only", is_flag=True, help="Show the runs and exit.")
@click.option("--prepare", "prepare_only", is_flag=True,
              help="Only make what the runs need first.")  # fmt: skip
@click.option("--slurm", type=PATH, metavar="SCRIPT",
              help="Write a job array with a task per run instead, --jobs at a time.")  # fmt: skip
def run(
    file: Path,
    overrides: tuple[str, ...],
    runs: Path | None,
    jobs: int,
    only: tuple[int, ...],
    list_only: bool,
    prepare_only: bool,
    slurm: Path | None,
) -> None:
    """Run all runs of a study that are not finished.

    FILE is a TOML file, such as those under examples/studies. OVERRIDES are --section.key=value and
    hold for all runs. A run that fails is reported and the others go on; one that was stopped goes
    on from its checkpoint. Ctrl-C lets the running ones save and stop.

    \b
    Examples:
      megaswitch study run examples/studies/experts/study.toml --jobs 2
      megaswitch study run examples/studies/experts/study.toml --train.steps=5000
      megaswitch study run examples/studies/experts/study.toml --slurm array.sh --jobs 16
    """
    from megaswitch.scale.run_study import prepare, run_jobs, slurm_script
    from megaswitch.scale.study import load_study

    loaded = load_study(file, overrides, runs=runs)
    if list_only:
        _list(loaded)
        return
    if slurm:
        words = [str(file), *overrides, *(("--runs", str(runs)) if runs else ())]
        slurm.write_text(slurm_script(loaded, words, at_once=jobs), encoding="utf-8")
        echo(f"{slurm}: {len(loaded.jobs)} tasks; give it to sbatch")
        return
    chosen = _chosen(loaded, only)
    prepare(loaded, info)
    if prepare_only:
        return
    outcomes = run_jobs(loaded, chosen, at_once=jobs, say=info)
    failed = [outcome for outcome in outcomes if outcome.status == "failed"]
    if any(outcome.status == "stopped" for outcome in outcomes):
        info("stopped; the same command goes on")
        sys.exit(130)
    if failed:
        told = "\n".join(f"  {one.job.name}: {one.message}" for one in failed)
        raise UserError(
            f"{len(failed)} of {len(chosen)} runs failed:\n{told}\nThe same command tries again"
        )
    info(f"all {len(chosen)} runs are finished; see megaswitch study report {file}")


def _chosen(study: Study, only: tuple[int, ...]) -> list[Job]:
    if wrong := [index for index in only if index >= len(study.jobs)]:
        raise UserError(
            f"--only {wrong[0]} must be less than the {len(study.jobs)} runs of {study.path}; "
            "--list shows them"
        )
    return [job for job in study.jobs if not only or job.index in only]


def _list(study: Study) -> None:
    for job in study.jobs:
        echo(f"{job.index:4}  {job.name}")


@study.command(cls=OverridesCommand, context_settings=FREE_FORM)
@click.argument("file", type=PATH)
@_OVERRIDES
@_RUNS
@click.option("--output", type=PATH, show_default="report/ beside the runs",
              help="Folder of the page and all that it shows.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True,
              help="Machine-readable figures; no folder is written.")  # fmt: skip
def report(
    file: Path, overrides: tuple[str, ...], runs: Path | None, output: Path | None, as_json: bool
) -> None:
    """Compare the runs of a study, finished or not: a table, curves and fits, as one HTML page.

    Numbers are at the end of the runs, as mean ± standard deviation over seeds.

    \b
    Examples:
      megaswitch study report examples/studies/experts/study.toml
      megaswitch study report examples/studies/experts/study.toml --json > experts.json
    """
    from megaswitch.scale import report as reports
    from megaswitch.scale.pictures import write_report
    from megaswitch.scale.study import load_study

    loaded = load_study(file, overrides, runs=runs)
    made = reports.make_report(loaded)
    if as_json:
        echo(json.dumps(reports.as_json(made), indent=2, allow_nan=False))
        return
    echo(reports.markdown(made))
    paths = write_report(made, output or loaded.runs / "report")
    echo("\n".join(str(path) for path in paths))


@study.command()
@click.option("--output", type=PATH, required=True, help="Hardware file to write.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto",
              show_default=True, help="auto: CUDA where there is a GPU.")  # fmt: skip
@click.option("--ranks", type=click.IntRange(min=1), default=2, show_default=True,
              help="Processes that share this machine, one thread or GPU each.")  # fmt: skip
@click.option("--links-of", metavar="NAME|FILE",
              help="Take links from this machine instead of measuring a group.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Machine-readable figures.")
def calibrate(output: Path, device: str, ranks: int, links_of: str | None, as_json: bool) -> None:
    """Measure this machine and write a hardware file for plan and simulate.

    Matrix products, memory, collectives of a small group, the disk that the file lies on, and
    training steps of a few small models, which tell what a step reaches of all that. On CPUs times
    are CPU-seconds of one thread, with all ranks busy at once; steps that ranks make together tell
    what collectives take. Takes some minutes.

    \b
    Examples:
      megaswitch study calibrate --output laptop.toml
      megaswitch plan run.toml --world 2 --hardware laptop.toml
      megaswitch study calibrate --output gpu.toml --device cuda --links-of h100
    """
    import torch

    from megaswitch.scale import calibrate as calibration

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)
    found = calibration.calibrate(device, ranks, output.resolve().parent, links_of)
    output.write_text(calibration.as_toml(found.hardware), encoding="utf-8")
    if as_json:
        echo(json.dumps(calibration.as_table(found), indent=2))
        return
    echo(calibration.as_toml(found.hardware))
    echo("predicted by measured seconds of the training steps that it was fitted to:")
    for name, ratio in found.ratios.items():
        echo(f"  {ratio:5.2f}  {name}")


@study.command()
@click.argument("dense", type=PATH)
@click.argument("sparse", type=PATH)
@click.option("--level", type=click.Choice(["common", "dense", "sparse"]), default="common",
              show_default=True,
              help="Loss to reach: the higher of both models' lowest, or one's.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Machine-readable figures.")
@click.option("--plot", type=PATH, metavar="FILE", help="Draw the histogram (.png, …).")
def speedup(
    dense: Path,
    sparse: Path,
    level: Literal["common", "dense", "sparse"],
    as_json: bool,
    plot: Path | None,
) -> None:
    """Show by source how many times fewer steps a sparse run takes than a dense one.

    DENSE and SPARSE are run folders with the same data.valid; each of its names is a row. Steps are
    read off the validation losses, on the straight line between two of them. Where only one model
    reaches the level the ratio is a bound: ≥ if the dense one does not, ≤ if the sparse one does
    not. This is the paper's figure 8.

    \b
    Examples:
      megaswitch study speedup runs/mt5-base runs/mswitch-base --plot speedup.png
      megaswitch study speedup runs/dense runs/switch --level sparse --json
    """
    from megaswitch.scale import speedup as speedups
    from megaswitch.train.plots import check_plot

    if plot:
        check_plot(plot)
    found = speedups.compare_runs(dense, sparse, level)
    if as_json:
        echo(json.dumps(speedups.as_json(found, level), indent=2, allow_nan=False))
    else:
        _print(found)
    if plot:
        speedups.draw(found, plot, f"{sparse.name} against {dense.name}")


def _print(found: list[SpeedUp]) -> None:
    from rich.table import Table
    from rich.text import Text

    from megaswitch.scale.speedup import Summary

    table = Table(box=None, header_style="bold")
    for title in ("source", "loss", "dense steps", "sparse steps", "speed-up"):
        table.add_column(title, justify="left" if title == "source" else "right", no_wrap=True)
    for one in found:
        both = (one.dense_steps, one.dense_run), (one.sparse_steps, one.sparse_run)
        steps = [f"> {run:,}" if got is None else f"{got:,.0f}" for got, run in both]
        bound = "" if one.bound == "=" else f"{one.bound} "
        table.add_row(Text(one.source), f"{one.level:.4f}", *steps, f"{bound}{one.ratio:.2f}×")
    stdout().print(table)
    summary = Summary.of(found)
    text = f"mean {summary.mean:.2f}×, median {summary.median:.2f}×, "
    text += f"{summary.at_least_four:.0%} at 4× and more, over {summary.sources} sources"
    echo(text + (f"; {summary.bounds} are bounds" if summary.bounds else ""))
