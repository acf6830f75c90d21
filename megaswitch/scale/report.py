"""What the runs of a study say: a table over seeds, fits, and the numbers for other programs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from megaswitch.log import UserError
from megaswitch.metrics_file import read_metrics
from megaswitch.scale.curves import Curve, Spread, curve, end
from megaswitch.scale.fit import PowerLaw, fit_power_law
from megaswitch.scale.study import Job, Study

# What a table shows beside the measures, where the runs have it, and with how many digits.
_ALSO = {"dropped_fraction": 4, "load_imbalance": 2, "tokens_per_second": 0}
_DIGITS = 3


@dataclass(frozen=True)
class Row:
    """The runs that differ in their seed alone.

    Attributes:
        labels: their case on the other axes.
        jobs: the runs.
        steps: that each has done.
        values: of each metric, one for each run that has it.
        curves: of the first measure.
        ends: of the first measure, by the run's case on the axis of the spread.
    """

    labels: dict[str, str]
    jobs: tuple[Job, ...]
    steps: tuple[int, ...]
    values: dict[str, list[float]] = field(default_factory=dict)
    curves: list[Curve] = field(default_factory=list)
    ends: dict[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Its labels in one line."""
        return ", ".join(self.labels.values()) or "all"

    @property
    def unfinished(self) -> list[Job]:
        """Runs that have not done all their steps."""
        pairs = zip(self.jobs, self.steps, strict=True)
        return [job for job, steps in pairs if steps < job.config.train.steps]


@dataclass(frozen=True)
class Fit:
    """A power law over an axis, for one case of the other axes.

    Attributes:
        labels: that case.
        law: the fit.
        x: of the points, one for each run.
        y: likewise.
    """

    labels: dict[str, str]
    law: PowerLaw
    x: list[float]
    y: list[float]


@dataclass(frozen=True)
class Report:
    """All of it."""

    study: Study
    rows: list[Row]
    fits: list[Fit]
    notes: list[str]

    @property
    def measure(self) -> str:
        """The metric that is drawn and fitted."""
        return self.study.file.report.measures[0]

    @property
    def metrics(self) -> dict[str, int]:
        """The metrics of the table that some run has, with their digits."""
        first, *others = self.study.file.report.measures
        measures = {first: _DIGITS, _difference(self.study): _DIGITS + 1}
        measures |= dict.fromkeys(others, _DIGITS)
        return {
            key: digits
            for key, digits in (measures | _ALSO).items()
            if any(row.values.get(key) for row in self.rows)
        }


def make_report(study: Study) -> Report:
    """Read the metrics of all runs.

    Raises:
        UserError: none of them has any yet, or a fit cannot be made.
    """
    spread = study.file.report.spread
    groups: dict[tuple[tuple[str, str], ...], list[Job]] = {}
    for job in study.jobs:
        rest = tuple((k, v) for k, v in job.labels.items() if k != spread)
        groups.setdefault(rest, []).append(job)
    rows = [_row(dict(labels), jobs, study) for labels, jobs in groups.items()]
    if study.file.report.baseline:
        _compare(study, rows)
    if not any(row.values for row in rows):
        raise UserError(
            f"no run of {study.path} has logged anything in {study.runs} yet; start them with "
            "megaswitch study run"
        )
    late = [job for row in rows for job in row.unfinished]
    notes = [f"{len(late)} of {len(study.jobs)} runs are not finished: "
             f"{'; '.join(job.name for job in late[:10])}{' …' if len(late) > 10 else ''}"
             ] if late else []  # fmt: skip
    fits: list[Fit] = []
    if study.file.report.fit:
        try:
            fits = _fits(study, rows)
        except UserError as error:
            notes.append(f"no fit: {error}")
    return Report(study, rows, fits, notes)


def _row(labels: dict[str, str], jobs: Sequence[Job], study: Study) -> Row:
    values: dict[str, list[float]] = {}
    ends: dict[str, float] = {}
    curves, steps = [], []
    measures = study.file.report.measures
    for job in jobs:
        metrics = read_metrics(job.folder / "metrics.jsonl")
        steps.append(max((m["step"] for m in metrics), default=0))
        for key in (*measures, *_ALSO):
            if points := curve(metrics, key):
                if key == measures[0]:
                    curves.append(points)
                    ends[job.labels.get(study.file.report.spread, "")] = end(points)
                speed = key == "tokens_per_second"  # which does not settle towards the end
                middle = statistics.median([value for _, value in points]) if speed else 0.0
                values.setdefault(key, []).append(middle if speed else end(points))
    return Row(labels, tuple(jobs), tuple(steps), values, curves, ends)


def _difference(study: Study) -> str:
    """The name of the first measure minus the baseline's."""
    return f"{study.file.report.measures[0]} - {', '.join(study.file.report.baseline.values())}"


def _compare(study: Study, rows: Sequence[Row]) -> None:
    """Give each row its differences from the baseline.

    Run by run: what a seed's order of data and first weights do to both is not in them.
    """
    by_labels = {tuple(row.labels.items()): row for row in rows}
    for row in rows:
        other = by_labels[tuple((row.labels | study.file.report.baseline).items())]
        common = row.ends.keys() & other.ends.keys()
        if row is not other and common:
            found = [row.ends[case] - other.ends[case] for case in row.ends if case in common]
            row.values[_difference(study)] = found


def _fits(study: Study, rows: Sequence[Row]) -> list[Fit]:
    """One for each case of the axes that are neither fitted over nor seeds; unfinished runs out."""
    axis, measure = study.file.report.fit, study.file.report.measures[0]
    assert axis is not None
    groups: dict[tuple[tuple[str, str], ...], tuple[list[float], list[float]]] = {}
    for row in rows:
        if row.unfinished:
            continue
        try:
            x = float(row.labels[axis])
        except ValueError:
            raise UserError(
                f"axis {axis} has the case {row.labels[axis]!r}, and must have numbers to fit over"
            ) from None
        rest = tuple((k, v) for k, v in row.labels.items() if k != axis)
        xs, ys = groups.setdefault(rest, ([], []))
        for y in row.values.get(measure, []):
            xs.append(x)
            ys.append(y)
    if not any(xs for xs, _ in groups.values()):
        raise UserError("no finished run has the first measure")
    return [Fit(dict(rest), fit_power_law(*points), *points) for rest, points in groups.items()]


def table(report: Report) -> list[list[str]]:
    """Head and rows as text: mean ± standard deviation over the runs of a row."""
    spread = report.study.file.report.spread
    axes = [axis for axis in report.study.file.axes if axis != spread]
    lines = [[*axes, "runs", *report.metrics]]
    for row in report.rows:
        done = f"{len(row.jobs) - len(row.unfinished)} of {len(row.jobs)}"
        cells = [
            Spread.of(found).text(digits) if (found := row.values.get(key)) else "–"
            for key, digits in report.metrics.items()
        ]
        lines.append([*(row.labels[axis] for axis in axes), done, *cells])
    return lines


def markdown(report: Report) -> str:
    """The report as text."""
    head, *body = table(report)
    lines = [f"# {report.study.file.title}", ""]
    lines += [report.study.file.question, ""] if report.study.file.question else []
    lines += [_line(head), "|---" * len(head) + "|", *map(_line, body), ""]
    lines += [f"{told(fit, report)}\n" for fit in report.fits]
    lines += [f"Note: {note}\n" for note in report.notes]
    return "\n".join(lines).rstrip() + "\n"


def told(fit: Fit, report: Report) -> str:
    """A fit in words."""
    where = f" ({', '.join(fit.labels.values())})" if fit.labels else ""
    axis = report.study.file.report.fit
    return f"{report.measure}{where} = {fit.law.text}, x = {axis}, {fit.law.points} runs"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def as_json(report: Report) -> dict[str, Any]:
    """Everything for other programs."""
    return {
        "title": report.study.file.title,
        "runs": str(report.study.runs),
        "rows": [
            {
                "labels": row.labels,
                "runs": [job.name for job in row.jobs],
                "steps": list(row.steps),
                "unfinished": [job.name for job in row.unfinished],
                "metrics": {
                    key: {**vars(Spread.of(found)), "values": found}
                    for key, found in row.values.items()
                },
            }
            for row in report.rows
        ],
        "fits": [
            {"labels": fit.labels, "measure": report.measure, "axis": report.study.file.report.fit}
            | vars(fit.law)
            for fit in report.fits
        ],
        "notes": report.notes,
    }
