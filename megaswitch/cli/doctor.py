"""`megaswitch doctor`."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

import click

from megaswitch.log import UserError, console

if TYPE_CHECKING:
    from megaswitch.cli.doctor_checks import Finding


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Machine-readable report.")
def doctor(as_json: bool) -> None:
    """Say whether MegaSwitch can train here, and what is missing.

    Looks at versions, hardware, the compiled core, optional packages and the launcher's
    environment, then trains one step and lets two processes talk. Ends with code 0 if all that
    training needs is there, else with 2 and every problem with its remedy.

    Example: megaswitch doctor --json > report.json
    """
    from megaswitch.cli.doctor_checks import check_everything

    with console().status("checking; the self-tests take some seconds"):
        findings = list(check_everything())
    if as_json:
        _print_json(findings)
    else:
        _print(findings)
    problems = ["; ".join(filter(None, (f.problem, f.remedy))) for f in findings if f.problem]
    if problems:
        count = "1 problem keeps" if len(problems) == 1 else f"{len(problems)} problems keep"
        raise UserError(
            f"{count} MegaSwitch from training here:\n" + "\n".join(f"  - {p}" for p in problems)
        )


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
