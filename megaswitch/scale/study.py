"""Studies: a base configuration, axes of changes to it, and the runs that these make.

A study is a TOML file:

    title = "Loss against number of experts"
    base = "base.toml"                  # what all runs share, beside this file
    runs = "runs/studies/experts"       # their folders; this is the default, by the file's name

    [set]                               # changes for all runs
    train.steps = 400

    [axes.experts]                      # keys of one axis go together, value by value
    model.moe.num_experts = [2, 4, 8]

    [axes.seed]                         # axes are crossed
    train.seed = [1, 2, 3]

    [axes.model.dense]                  # or an axis has cases, each with its own changes
    model.preset = "t5-tiny"
    [axes.model.switch]
    model.preset = "switch-tiny"

`[[before]]` names commands of MegaSwitch that must have made something before the runs start, and
`[report]` what is told of them. `{runs}` and `{here}` in a text are the folders of the runs and of
the file; `{steps}` in a command is the steps of the runs, `{steps:08}` as checkpoints are named.
"""

from __future__ import annotations

import itertools
import json
import re
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked

from megaswitch.config import RunConfig, known_keys, load_config
from megaswitch.log import ConfigError, UserError
from megaswitch.schema_keys import STRICT


@checked(frozen=True, kw_only=True, config=STRICT)
class Before:
    """A command that is needed first."""

    run: list[str] = Field(description="words of a megaswitch command")
    makes: str = Field(description="file that is there when it is done; then it is not run")


@checked(frozen=True, kw_only=True, config=STRICT)
class ReportConfig:
    """What a report tells."""

    measures: list[str] = Field(
        default_factory=lambda: ["valid/loss", "valid/content_loss", "loss"],
        min_length=1,
        description="metrics; the first is drawn and fitted",
    )
    spread: str = Field(default="seed", description="axis over which mean and spread are taken")
    fit: str | None = Field(default=None, description="axis of numbers to fit a power law over")
    baseline: dict[str, str] = Field(
        default_factory=dict,
        description="cases by axis; the first measure of others is told minus theirs, run by run",
    )


@checked(frozen=True, kw_only=True, config=STRICT)
class StudyFile:
    """A study as written."""

    title: str
    question: str = ""
    base: str | None = None
    runs: str | None = None
    ranks: int = Field(default=1, gt=0, description="processes of each run")
    set: dict[str, Any] = Field(default_factory=dict)
    axes: dict[str, dict[str, Any]] = Field(default_factory=dict)
    before: list[Before] = Field(default_factory=list)
    report: ReportConfig = Field(default_factory=ReportConfig)


@dataclass(frozen=True)
class Job:
    """One run of a study.

    Attributes:
        index: from 0.
        labels: its case on each axis.
        folder: of the run.
        overrides: what it changes in the base, as on a command line.
        config: resolved.
    """

    index: int
    labels: dict[str, str]
    folder: Path
    overrides: tuple[str, ...]
    config: RunConfig

    @property
    def name(self) -> str:
        """Of its folder."""
        return self.folder.name


@dataclass(frozen=True)
class Study:
    """A study with all its runs.

    Attributes:
        path: of the file.
        file: as written, places filled in.
        runs: folder of all runs.
        base: configuration that they change, or None.
        jobs: in the order of the axes, the last one varying fastest.
    """

    path: Path
    file: StudyFile
    runs: Path
    base: Path | None
    jobs: tuple[Job, ...]


def load_study(path: Path, overrides: Sequence[str] = (), *, runs: Path | None = None) -> Study:
    """Read a study and expand it.

    Args:
        path: of the TOML file.
        overrides: `--section.key=value` for all runs; they win over the file, but for its axes.
        runs: folder of the runs, instead of the file's.

    Raises:
        UserError: the file is missing or not TOML.
        ConfigError: with all problems of the study and of all its runs.
    """
    table = _read(path)
    file = _checked(table)
    folder = runs or Path(file.runs or f"runs/studies/{_default_name(path)}")
    file = _checked(_fill(table, {"{runs}": str(folder), "{here}": str(path.parent)}))
    base = None if file.base is None else path.parent / file.base
    problems: list[str] = []
    cases = {name: _cases(name, axis, problems) for name, axis in file.axes.items()}
    problems += _check_report(file.report, cases)
    common = list(_overrides(file.set))
    varied = {key for axis in cases.values() for case in axis.values() for key in case}
    for text in overrides:
        if (key := text.removeprefix("--").partition("=")[0]) in varied:
            problems.append(f"{key} is varied by an axis; change the study, or leave {text} out")
    jobs, seen = [], Counter[str]()
    of_runs: dict[str, list[str]] = {}
    for index, combination in enumerate(_combinations(cases)):
        labels = {axis: label for axis, (label, _) in combination.items()}
        name = _name(labels)
        seen[name] += 1
        own = [word for _, case in combination.values() for word in _overrides(case)]
        words = (*common, *overrides, *own, f"--train.run_dir={folder / name}")
        try:
            config = load_config(base, words, world_size=file.ranks)
            jobs.append(Job(index, labels, folder / name, words, config))
        except ConfigError as error:
            for problem in error.problems:
                of_runs.setdefault(problem, []).append(name)
    problems += [f"{_some(names)}: {problem}" for problem, names in of_runs.items()]
    problems += [f"several runs are named {name}; rename cases" for name in seen if seen[name] > 1]
    if problems:
        raise ConfigError(problems)
    return Study(path, _with_steps(file, jobs), folder, base, tuple(jobs))


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"study {path} does not exist; see examples/studies for some") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"study {path} cannot be read: {error}") from error


def _checked(table: Mapping[str, Any]) -> StudyFile:
    """By way of JSON, as configurations are: strict types, yet tables where dataclasses belong."""
    try:
        return TypeAdapter(StudyFile).validate_json(json.dumps(table, default=str))
    except ValidationError as error:
        known = ", ".join(field.name for field in fields(StudyFile))
        problems = []
        for detail in error.errors():
            key = ".".join(str(part) for part in detail["loc"])
            if detail["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
                problems.append(f"{key} is not a known key of a study; known are {known}")
            else:
                problems.append(f"{key} is wrong: {detail['msg']}")
        raise ConfigError(problems) from None


def _default_name(path: Path) -> str:
    """Of the file or, if it has the usual one, of its folder."""
    return path.resolve().parent.name if path.stem == "study" else path.stem


def _with_steps(file: StudyFile, jobs: Sequence[Job]) -> StudyFile:
    """The file with the steps of its runs in what they need first."""
    steps = max(job.config.train.steps for job in jobs)
    places = {"{steps}": str(steps), "{steps:08}": f"{steps:08}"}
    before = [Before(**_fill(vars(one), places)) for one in file.before]
    return replace(file, before=before)


def _check_report(report: ReportConfig, cases: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Problems with the names of axes and cases."""
    axes = ", ".join(cases)
    if report.fit is not None and report.fit not in cases:
        yield f"report.fit={report.fit!r} is no axis; use one of {axes}"
    for axis, label in report.baseline.items():
        if axis not in cases or axis == report.spread:
            yield f"report.baseline.{axis} is no axis to compare along; use one of {axes}"
        elif label not in cases[axis]:
            known = ", ".join(cases[axis])
            yield f"report.baseline.{axis}={label!r} is no case of it; use one of {known}"


def _fill(value: Any, places: Mapping[str, str]) -> Any:
    """The same with folders in the place of `{runs}` and `{here}`."""
    if isinstance(value, str):
        for place, folder in places.items():
            value = value.replace(place, folder)
    elif isinstance(value, list):
        value = [_fill(item, places) for item in value]
    elif isinstance(value, dict):
        value = {key: _fill(item, places) for key, item in value.items()}
    return value


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys; tables may be nested or have dots in their keys, and some are values."""
    for key, value in table.items():
        if isinstance(value, Mapping) and f"{prefix}{key}" not in known_keys():
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _cases(name: str, axis: Mapping[str, Any], problems: list[str]) -> dict[str, dict[str, Any]]:
    """Changes by label."""
    sections = {field.name for field in fields(RunConfig)}
    if {key.partition(".")[0] for key in axis} <= sections:
        lists = dict(_flat(axis))
        lengths = {len(values) if isinstance(values, list) else -1 for values in lists.values()}
        if len(lengths) != 1 or lengths & {-1, 0}:
            problems.append(
                f"axes.{name} must give each of its keys a list, all equally long, as they go "
                "together; or give it cases with names"
            )
            return {}
        rows = zip(*lists.values(), strict=True)
        cases = [(str(row[0]), dict(zip(lists, row, strict=True))) for row in rows]
        for label, count in Counter(label for label, _ in cases).items():
            if count > 1:
                problems.append(
                    f"axes.{name} has the value {label!r} {count} times; its first key names the "
                    "cases, so give another key first, or cases with names"
                )
        return dict(cases)
    wrong = [case for case, changes in axis.items() if not isinstance(changes, Mapping)]
    if mixed := wrong or sorted(set(axis) & sections):
        problems.append(
            f"axes.{name} mixes cases and keys ({', '.join(mixed)}); a case is a table of changes "
            f"and must not be named like a section of the configuration"
        )
        return {}
    return {case: dict(_flat(changes)) for case, changes in axis.items()}


def _combinations(
    cases: Mapping[str, Mapping[str, dict[str, Any]]],
) -> Iterator[dict[str, tuple[str, dict[str, Any]]]]:
    for row in itertools.product(*(axis.items() for axis in cases.values())):
        yield dict(zip(cases, row, strict=True))


def _name(labels: Mapping[str, str]) -> str:
    """A folder's name: readable, and without what shells or file systems dislike."""
    parts = (f"{axis}={label}" for axis, label in labels.items())
    return ",".join(re.sub(r"[^\w.=+-]+", "-", part) for part in parts) or "run"


def _some(names: Sequence[str]) -> str:
    """A few of the runs that have a problem."""
    if len(names) == 1:
        return f"run {names[0]}"
    return f"{len(names)} runs ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"


def _overrides(table: Mapping[str, Any]) -> Iterator[str]:
    for key, value in _flat(table):
        yield f"--{key}={toml_value(value)}"


def toml_value(value: Any) -> str:
    """As it stands behind `--key=`; strings without quotes where they cannot be misread."""
    if isinstance(value, str):
        try:
            tomllib.loads(f"value = {value}")
        except tomllib.TOMLDecodeError:
            return value
    if isinstance(value, Mapping):
        entries = (f"{json.dumps(key)} = {json.dumps(entry)}" for key, entry in value.items())
        return f"{{ {', '.join(entries)} }}"
    return json.dumps(value)
