"""A checkpoint on tasks: what `megaswitch evaluate --task` does."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaswitch.checkpoint.manager import find_checkpoint
from megaswitch.config import RunConfig
from megaswitch.data.tasks import builtin_tasks, find_task
from megaswitch.log import UserError, info
from megaswitch.parallel.mesh import Mesh
from megaswitch.parallel.watchdog import Watchdog
from megaswitch.train.answers import Answer, Answerer
from megaswitch.train.display import SampleProgress
from megaswitch.train.objectives import PRECISIONS
from megaswitch.train.task_data import TaskSet, read_examples, task_files
from megaswitch.train.task_metrics import check_metrics, task_figures
from megaswitch.train.text import checkpoint_tokenizer
from megaswitch.train.trained import Measuring, check_same, load_trained


@dataclass(frozen=True, kw_only=True)
class TaskRequest(Measuring):
    """What to score.

    Attributes:
        tasks: each as NAME=FILES or TASK.toml=FILES.
        output: folder for predictions; None: not written.
    """

    tasks: Sequence[str]
    output: Path | None = None

    def plan(self, world_size: int) -> TaskPlan:
        """What that comes to on so many ranks. Needs no process group.

        Raises:
            UserError: naming all that is wrong.
        """
        if self.output and self.output.exists() and not self.output.is_dir():
            raise UserError(f"--output {self.output} is a file; give a folder for predictions")
        checkpoint, config = self.find(world_size)
        known = config.data.tasks or {}
        sets, problems = [], []
        for argument in self.tasks:
            try:
                sets.append(_task_set(argument, known, self.samples))
            except UserError as error:
                problems.append(str(error))
        names = [one.name for one in sets]
        if len(set(names)) < len(names):
            problems.append(f"a task is given twice among {', '.join(names)}; give each once")
        if problems:
            raise UserError("\n".join(problems))
        return TaskPlan(self, checkpoint, config, sets)


@dataclass(frozen=True)
class TaskPlan:
    """A request that can be met.

    Attributes:
        request: as it was.
        checkpoint: to score.
        config: its configuration, with the layout.
        sets: the examples.
    """

    request: TaskRequest
    checkpoint: Path
    config: RunConfig
    sets: Sequence[TaskSet]


@dataclass(frozen=True)
class TaskResult:
    """What a task came to.

    Attributes:
        name: of the task.
        examples: scored.
        figures: in percent, `score` among them.
    """

    name: str
    examples: int
    figures: Mapping[str, float]


def _task_set(argument: str, known: Mapping[str, str], samples: int | None) -> TaskSet:
    definition, equals, value = argument.partition("=")
    if not equals or not definition or not value:
        raise UserError(f"--task {argument} must be NAME=FILES, or TASK.toml=FILES")
    name = Path(definition).stem
    where = known.get(definition, definition)
    if definition in known and where not in builtin_tasks() and not Path(where).is_file():
        raise UserError(
            f"the run's task {definition!r} was defined in '{where}', which is not there; give "
            "the file itself: --task PATH.toml=FILES"
        )
    task = find_task(where)
    check_metrics(name, task)
    return read_examples(name, task, task_files(value), samples)


def evaluate_tasks(
    plan: TaskPlan, mesh: Mesh, watchdog: Watchdog | None = None
) -> list[TaskResult]:
    """Score a checkpoint on tasks, spread over the ranks, whose number changes no figure.

    Args:
        plan: from `TaskRequest.plan`.
        mesh: the ranks, laid out as planned.
        watchdog: is told of every round.

    Raises:
        UserError: on every rank, saying what is wrong with the checkpoint or the files.
    """
    request, config = plan.request, plan.config
    with mesh.together():
        tokenizer = checkpoint_tokenizer(find_checkpoint(plan.checkpoint), None)
    check_same("examples", [_digest(one) for one in plan.sets], mesh)
    parts, _ = load_trained(plan.checkpoint, config, mesh)
    answerer = Answerer(
        model=parts.models[0],
        mesh=mesh,
        tokenizer=tokenizer,
        encoder_length=config.data.encoder_length,
        decoder_length=config.data.decoder_length or config.data.encoder_length,
        precision=PRECISIONS[config.train.precision],
        batch_size=request.batch_size or config.train.micro_batch_size,
    )
    results = []
    with SampleProgress(sum(len(one.examples) for one in plan.sets), mesh) as progress:

        def advance(examples: int) -> None:
            progress.advance(-(-examples // mesh.dp.size))
            if watchdog:
                watchdog.at(0, "evaluation")

        for one in plan.sets:
            answers = answerer.answers(one.task, one.examples, advance)
            figures = task_figures(one.task, [a.prediction for a in answers], one.examples)
            results.append(TaskResult(one.name, len(one.examples), figures))
            with mesh.together():
                if request.output and mesh.rank == 0:
                    _write(request.output / f"{one.name}.jsonl", one, answers)
    return results


def _digest(one: TaskSet) -> str:
    """Equal where the examples are."""
    digest = hashlib.sha256()
    for e in one.examples:
        digest.update(json.dumps([e.inputs, e.references, e.choices, e.label, e.group]).encode())
    return digest.hexdigest()


def _write(path: Path, one: TaskSet, answers: Iterable[Answer]) -> None:
    """One line for each example; the file appears when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".partial")
    with aside.open("w", encoding="utf-8") as file:
        for example, answer in zip(one.examples, answers, strict=True):
            line: dict[str, Any] = {
                "inputs": example.inputs,
                "target": example.targets,
                "prediction": answer.prediction,
                "score": answer.score,
            }
            if len(example.references) > 1:
                line["references"] = example.references
            if answer.scores:
                line["scores"] = dict(zip(example.choices, answer.scores, strict=True))
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    os.replace(aside, path)
    info(f"wrote {len(one.examples):,} predictions to {path}")
