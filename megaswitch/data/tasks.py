"""Tasks: how records of a file become pairs of texts, and how answers to them are scored.

A task is data, not code: the public ones are in `tasks.toml`, and a user's own is a TOML file with
the same keys. Templates hold `{field}`, and `{field.inside}` for what is nested; nothing in them is
executed.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import pydantic
from pydantic import Field, TypeAdapter, ValidationError

from megaswitch.data.records import Record, read_records
from megaswitch.data.task_records import READERS
from megaswitch.data.text_files import Rejection, RejectionLog
from megaswitch.log import UserError
from megaswitch.schema_keys import STRICT

_FIELD = re.compile(r"\{([^{}]+)\}")


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class Task:
    """The keys of a task's TOML file.

    Attributes:
        inputs: template of what the encoder reads.
        targets: template of what is to be answered; of a field with a list, its first entry. Unset:
            the label's text.
        labels: the answers there are, in the order of the classes that records count from 0.
        choices: the answers of each record by itself: templates, or a field that holds a list.
        label: field with the class: its number, a boolean, or its text; -1, empty or absent where
            it is not known.
        label_values: what values of that field mean, where they are none of these.
        aliases: other names that a field may have.
        columns: names of a table's columns, for files without a header.
        records: one of `READERS`, for data sets that are more than rows of fields.
        answers: field with a list of right answers, of which one is enough.
        every_answer: train on each of these, not the first alone.
        train_if: field that must be true of the records that are trained on.
        group: template of what answers are scored together by.
        metrics: names of `train.task_metrics.METRICS`.
        score: figures, out of those of the metrics, whose mean is the task's score; unset: all.
        decoding: "rank" scores each label or choice with the model and takes the likeliest;
            "generate" lets it write. Unset: rank where there are labels or choices.
        beams: of generation.
        max_tokens: most tokens that are written; unset: as many as a target may have in training.
    """

    inputs: str
    targets: str | None = None
    labels: list[str] = Field(default_factory=list)
    choices: list[str] | str | None = None
    label: str = "label"
    label_values: dict[str, str] = Field(default_factory=dict)
    aliases: dict[str, list[str]] = Field(default_factory=dict)
    columns: list[str] = Field(default_factory=list)
    records: str | None = None
    answers: str | None = None
    every_answer: bool = False
    train_if: str | None = None
    group: str | None = None
    metrics: list[str] = Field(min_length=1)
    score: list[str] = Field(default_factory=list)
    decoding: Literal["rank", "generate"] | None = None
    beams: int = Field(default=1, ge=1, le=64)
    max_tokens: int | None = Field(default=None, ge=1, le=1 << 16)

    @property
    def ranks(self) -> bool:
        """Whether answers are chosen, not written."""
        return (self.decoding or ("rank" if self._has_classes else "generate")) == "rank"

    @property
    def _has_classes(self) -> bool:
        return bool(self.labels or self.choices)

    def problems(self) -> Iterator[str]:
        """What keys say against each other."""
        if self.labels and self.choices:
            yield "labels and choices are both set; keep the one that the answers come from"
        if self.targets is None and not self._has_classes:
            yield "targets is not set, and neither labels nor choices say what is answered; set one"
        if self.targets is not None and self.choices:
            yield "targets would be ignored because choices gives the answers; remove one"
        if self.decoding == "rank" and not self._has_classes:
            yield "decoding='rank' needs labels or choices to rank; use 'generate'"
        if self.records is not None and self.records not in READERS:
            yield f"records={self.records!r} is unknown; use {', '.join(READERS)}"
        if self.every_answer and not self.answers:
            yield "every_answer=true needs answers, the field that holds them"
        if len(set(self.labels)) < len(self.labels):
            yield f"labels={self.labels} has one twice; answers could not be told apart"

    def fields(self) -> set[str]:
        """Names of the fields that are read, with their aliases."""
        templates = [self.inputs, self.targets or "", self.group or ""]
        templates += [self.choices or ""] if not isinstance(self.choices, list) else self.choices
        names = {self.label} | {n for t in templates for n in _FIELD.findall(t)}
        return names | {alias for name in names for alias in self.aliases.get(name, ())}

    def examples(
        self, path: Path, rejections: RejectionLog, *, training: bool = False
    ) -> Iterator[Example]:
        """The examples of a file.

        Args:
            path: see `read_records`.
            rejections: records that lack something are counted there and passed over.
            training: leave out what is not trained on, and expand `every_answer`.

        Raises:
            UserError: the file cannot be read.
        """
        reader = READERS[self.records] if self.records else lambda record: iter([record])
        for line, record in read_records(path, columns=self.columns, fields=self.fields()):
            try:
                found = [self._example(row, path, line) for row in reader(record)]
            except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
                why = f"no {error}" if isinstance(error, KeyError) else str(error)
                rejections(Rejection(path, line, why))
                continue
            for example in found:
                yield from self._for_training(example) if training else [example]

    def _for_training(self, example: Example) -> Iterator[Example]:
        if example.targets is None or (self.train_if and not example.label):
            return
        if not self.every_answer:
            yield example
            return
        for answer in example.references:
            yield dataclasses.replace(example, targets=answer)

    def _example(self, row: Record, path: Path, line: int) -> Example:
        choices = self._choices(row)
        label = self._label(row, choices)
        answers: list[str] = []
        if self.answers:
            found = self._value(row, self.answers)
            answers = [_text(a) for a in (found if isinstance(found, list) else [found])]
        targets: str | None
        if self.targets is not None:
            targets = self._target(row)
            if self.labels and targets in self.labels:
                label = self.labels.index(targets)
        else:
            targets = None if label is None else choices[label]
        return Example(
            inputs=self._render(self.inputs, row),
            targets=targets,
            references=tuple(answers) or (() if targets is None else (targets,)),
            choices=choices,
            label=label,
            group=self._render(self.group, row) if self.group else None,
            path=path,
            line=line,
        )

    def _target(self, row: Record) -> str | None:
        whole = _FIELD.fullmatch(self.targets or "")
        if whole is None:
            return self._render(self.targets or "", row)
        value = self._value(row, whole[1])
        if isinstance(value, list):
            value = value[0] if value else None
        return None if value is None else _text(value)

    def _choices(self, row: Record) -> tuple[str, ...]:
        if isinstance(self.choices, str):
            return tuple(_text(value) for value in self._value(row, self.choices))
        return tuple(self._render(template, row) for template in self.choices or self.labels)

    def _label(self, row: Record, choices: tuple[str, ...]) -> int | None:
        try:
            value = self._value(row, self.label)
        except KeyError:
            return None
        text = self.label_values.get(_text(value), _text(value)).strip()
        if isinstance(value, bool):
            return int(value)
        if value is None or text in ("", "-", "-1"):
            return None
        if self.labels and text in self.labels:
            return self.labels.index(text)
        if not choices:  # the field says something else, or whether the answer is right
            return int(text) if text.isdecimal() else {"true": 1, "false": 0}.get(text.lower())
        place = int(text) if text.isdecimal() else len(choices)
        if place >= len(choices):
            raise ValueError(f"{self.label}={value!r} is none of {', '.join(choices)}")
        return place

    def _render(self, template: str, row: Record) -> str:
        return _FIELD.sub(lambda match: _text(self._value(row, match[1])), template)

    def _value(self, row: Record, name: str) -> Any:
        for candidate in (name, *self.aliases.get(name, ())):
            if candidate in row:
                return row[candidate]
            value: Any = row
            for part in candidate.split("."):
                value = value.get(part, _ABSENT) if isinstance(value, dict) else _ABSENT
            if value is not _ABSENT:
                return value
        raise KeyError(f"field {name!r} among {', '.join(map(str, row))}")


_ABSENT = object()


def _text(value: Any) -> str:
    """A value as it stands in a text: lists joined by commas, nothing for None."""
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    return "" if value is None else str(value)


@dataclass(frozen=True)
class Example:
    """One example of a task.

    Attributes:
        inputs: what the encoder reads.
        targets: the answer; None where it is not known.
        references: all right answers.
        choices: the answers to choose from, if there are such.
        label: which of them is right, or the value of the task's label field; None: not known.
        group: what it is scored together with.
        path: its file.
        line: of the file, from 1.
    """

    inputs: str
    targets: str | None
    references: tuple[str, ...]
    choices: tuple[str, ...]
    label: int | None
    group: str | None
    path: Path
    line: int


@cache
def builtin_tasks() -> Mapping[str, Task]:
    """The public tasks by name."""
    text = files("megaswitch.data").joinpath("tasks.toml").read_text(encoding="utf-8")
    return {name: _parsed(table, name) for name, table in tomllib.loads(text).items()}


def find_task(definition: str) -> Task:
    """The task of that name, or of that TOML file.

    Raises:
        UserError: there is none, or its keys are wrong; all at once.
    """
    known = builtin_tasks()
    if definition in known:
        return known[definition]
    path = Path(definition)
    if path.suffix != ".toml":
        near = difflib.get_close_matches(definition, known, n=1)
        hint = f"did you mean {near[0]}?" if near else "`megaswitch finetune --tasks` lists them"
        raise UserError(f"there is no task {definition!r}; {hint} Or give a TOML file of your own")
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"task file '{definition}' cannot be read: {error}") from error
    return _parsed(table, definition)


def _parsed(table: Mapping[str, Any], name: str) -> Task:
    known = [field.name for field in dataclasses.fields(Task)]
    problems = []
    for key in table.keys() - set(known):
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        problems.append(f"{key} is not a key" + (f"; did you mean {near[0]}?" if near else ""))
    try:
        # By way of JSON: strict types, and yet a table where a dataclass belongs.
        text = json.dumps({k: v for k, v in table.items() if k in known}, default=str)
        task = TypeAdapter(Task).validate_json(text)
        problems += task.problems()
    except ValidationError as error:
        problems += [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
    if problems:
        raise UserError(f"task {name!r} is wrong: {'; '.join(problems)}")
    return task
