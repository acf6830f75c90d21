"""How well a run does its tasks as it goes on, and when it did best.

The record of a run is its metrics file, so a run that goes on knows what came before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

from megaswitch.config import RunConfig
from megaswitch.metrics_file import read_metrics
from megaswitch.parallel.mesh import Mesh
from megaswitch.train.answers import Answerer
from megaswitch.train.objectives import PRECISIONS
from megaswitch.train.parts import Parts
from megaswitch.train.task_data import TaskSet, held_out, load_tokenizer
from megaswitch.train.task_metrics import task_figures

_TASK = "task/"
SCORE = "score"


@dataclass
class Exam:
    """The held-out examples of a run's tasks, and its best figures.

    Attributes:
        tasks: to be scored; there may be none.
        parts: this rank's model.
        answerer: which answers; None without tasks.
        best: by name of the figure, the best value and its step.
    """

    tasks: Sequence[TaskSet]
    parts: Parts
    answerer: Answerer | None
    best: dict[str, tuple[float, int]] = field(default_factory=dict)

    @classmethod
    def of(cls, config: RunConfig, mesh: Mesh, parts: Parts, step: int) -> Exam:
        """The exam of a run that goes on after `step`; ranks build it together."""
        lines = []
        with mesh.together():
            tasks = held_out(config)
            if mesh.rank == 0 and step:
                lines = read_metrics(Path(config.train.run_dir) / "metrics.jsonl")
        answerer = None
        if tasks:
            answerer = Answerer(
                model=parts.models[0],
                mesh=mesh,
                tokenizer=load_tokenizer(config),
                encoder_length=config.data.encoder_length,
                decoder_length=config.data.decoder_length or config.data.encoder_length,
                precision=PRECISIONS[config.train.precision],
                batch_size=config.train.micro_batch_size,
            )
        exam = cls(tasks, parts, answerer)
        for line in mesh.gather(lines)[0]:
            found = {k.removeprefix("valid/"): v for k, v in line.items() if k.startswith("valid/")}
            if line["step"] <= step and found:
                exam.record(line["step"], found)
        return exam

    def figures(self) -> dict[str, float]:
        """Answer all tasks; `task/NAME/FIGURE` of each, and the mean of their scores as `score`."""
        if not self.answerer:
            return {}
        figures: dict[str, float] = {}
        scores = []
        training = self.parts.training
        self.parts.train(False)
        try:
            for one in self.tasks:
                answers = self.answerer.answers(one.task, one.examples)
                texts = [answer.prediction for answer in answers]
                found = task_figures(one.task, texts, one.examples)
                scores.append(found[SCORE])
                figures |= {f"{_TASK}{one.name}/{key}": value for key, value in found.items()}
        finally:
            self.parts.train(training)
        return {**figures, SCORE: fmean(scores)}

    def record(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Remember what is better than before; whether the run as a whole is.

        That is decided by the score of the tasks or, where none are scored, by the loss.
        """
        better = False
        decisive = SCORE if SCORE in metrics else "loss"
        for name, value in metrics.items():
            if name != decisive and not name.startswith(_TASK):
                continue
            known = self.best.get(name)
            if known is None or (value < known[0] if name == "loss" else value > known[0]):
                self.best[name] = (value, step)
                better |= name == decisive
        return better

    def report(self) -> Iterator[str]:
        """Each task's best figures and their steps, for people."""
        for one in self.tasks:
            start = f"{_TASK}{one.name}/"
            found = {k.removeprefix(start): v for k, v in self.best.items() if k.startswith(start)}
            if found:
                listed = ", ".join(f"{k} {v:.2f} (step {at})" for k, (v, at) in found.items())
                yield f"best of {one.name}, on {len(one.examples):,} held-out examples: {listed}"
