"""`megaswitch doctor`."""

from __future__ import annotations

import sys
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import click

from megaswitch.cli.common import PATH, echo
from megaswitch.cli.completion import FREE_FORM, OverridesCommand, complete_override
from megaswitch.log import UserError, console, is_rank_zero

if TYPE_CHECKING:
    from megaswitch.cli.doctor_checks import Finding


@click.command(cls=OverridesCommand, context_settings=FREE_FORM)
@click.option("--layout", type=PATH, help="Check this configuration for --ranks; show its layout.")
@click.option("--ranks", type=click.IntRange(1), help="Ranks to lay out; needs no launcher.")
@click.option("--cluster", type=PATH, metavar="FOLDER", help="Compare all ranks of this launch; "
              "FOLDER is where runs will be.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Machine-readable report.")
@click.argument("overrides", nargs=-1, type=click.UNPROCESSED, shell_complete=complete_override)
def doctor(
    layout: Path | None,
    ranks: int | None,
    cluster: Path | None,
    as_json: bool,
    overrides: tuple[str, ...],
) -> None:
    """Say whether MegaSwitch can train here, and what is missing.

    Looks at versions, hardware, the compiled core, optional packages and the launcher's
    environment, then trains one step and lets two processes talk. Ends with code 0 if all that
    training needs is there, else with 2 and every problem with its remedy.

    With --layout it looks at a configuration instead, changed by OVERRIDES as in `megaswitch
    train`: whether it fits so many ranks, and which ranks share what.

    With --cluster all ranks of a launch compare themselves: versions, GPUs, speed, bandwidth,
    clocks, and whether they share FOLDER.

    \b
    Examples:
      megaswitch doctor --json > report.json
      megaswitch doctor --layout run.toml --ranks 64 --parallel.tp=2
      srun --nodes 8 --ntasks-per-node 8 megaswitch doctor --cluster runs
    """
    if layout or ranks:
        if not layout or not ranks:
            raise click.UsageError("--layout and --ranks belong together: give both")
        _show_layout(layout, ranks, overrides, as_json)
        return
    if cluster:
        _compare_ranks(cluster, as_json)
        return
    if overrides:
        raise click.NoSuchOption(overrides[0].partition("=")[0])
    from megaswitch.cli.doctor_checks import check_everything

    with console().status("checking; the self-tests take some seconds"):
        findings = list(check_everything())
    _report(findings, as_json, "keep MegaSwitch from training here")


def _compare_ranks(folder: Path, as_json: bool) -> None:
    from megaswitch.cli.common import joined
    from megaswitch.cli.doctor_cluster import check_cluster
    from megaswitch.config import ParallelConfig

    with joined("auto", ParallelConfig()) as (mesh, watchdog):
        watchdog.at(0, "comparing ranks")
        findings = check_cluster(mesh, folder)
    if is_rank_zero():
        _report(findings, as_json, "stand between these ranks and a long run")
    elif any(finding.problem for finding in findings):
        sys.exit(2)


def _report(findings: list[Finding], as_json: bool, doing: str) -> None:
    if as_json:
        _print_json(findings)
    else:
        _print(findings)
    problems = ["; ".join(filter(None, (f.problem, f.remedy))) for f in findings if f.problem]
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        if len(problems) == 1:
            doing = doing.replace("keep ", "keeps ", 1).replace("stand ", "stands ", 1)
        raise UserError(f"{count} {doing}:\n" + "\n".join(f"  - {p}" for p in problems))


def _show_layout(path: Path, ranks: int, overrides: tuple[str, ...], as_json: bool) -> None:
    from megaswitch.cli.show import print_json
    from megaswitch.config import load_config
    from megaswitch.parallel.table import layout_lines, layout_rows

    config = load_config(path, overrides, world_size=ranks)
    if not as_json:
        echo("\n".join(layout_lines(config, ranks)))
        return
    axes = {
        row.axis: {"size": row.size, "stride": row.stride, "spread": row.spread}
        for row in layout_rows(config, ranks)
    }
    print_json({"ranks": ranks, "axes": axes})


def _print_json(findings: list[Finding]) -> None:
    from megaswitch.cli.show import print_json

    sections = {
        name: {f.name: {"value": f.data, "text": f.value, "remedy": f.remedy} for f in group}
        for name, group in groupby(findings, key=lambda f: f.section)
    }
    problems = [{"problem": f.problem, "remedy": f.remedy} for f in findings if f.problem]
    print_json({"can_train": not problems, "problems": problems, **sections})


def _print(findings: list[Finding]) -> None:
    from megaswitch.cli.show import print_fields

    for section, group in groupby(findings, key=lambda f: f.section):
        fields = []
        for finding in group:
            mark = "✗ " if finding.problem else ""
            hint = f"  ({finding.remedy})" if finding.remedy and not finding.problem else ""
            fields.append((finding.name, f"{mark}{finding.value}{hint}"))
        print_fields(section, fields)
