"""From step to step: what is logged, validated and saved when, and what follows a bad step."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from megaswitch.log import info
from megaswitch.model.count import count
from megaswitch.optim.schedule import learning_rate
from megaswitch.parallel.replicas import Replicas, describe
from megaswitch.parallel.watchdog import Watchdog
from megaswitch.train.display import Display
from megaswitch.train.interrupt import Interrupt
from megaswitch.train.meters import Meters

if TYPE_CHECKING:
    from megaswitch.train.trainer import Step, Trainer


class Loop:
    """Trains until all steps are done or a signal asks to stop.

    Args:
        trainer: of the run.
        watchdog: is told where the run is.
        profile: called after each step.
    """

    def __init__(
        self, trainer: Trainer, watchdog: Watchdog | None, profile: Callable[[], object]
    ) -> None:
        config, mesh = trainer.config, trainer.mesh
        self.trainer, self.watchdog, self.profile = trainer, watchdog, profile
        self.meters = Meters(config, mesh, trainer.loader.source_names, trainer.distillation)
        every = config.fault.replica_interval
        self.replicas = Replicas(trainer.parts.weights, mesh) if every else None
        self.display = Display(config, mesh, count(config.model).total_parameters)
        self.interrupt = Interrupt(config.fault.stop_seconds)
        self.due = False  # a checkpoint
        self._restart_clock()

    def run(self) -> bool:
        """True if the run is complete."""
        trainer, steps = self.trainer, self.trainer.config.train.steps
        if trainer.state.step >= steps:
            info(f"nothing to do: the run is at step {trainer.state.step} of {steps}")
        with trainer.closing(), self.interrupt, self.display:
            while trainer.state.step < steps:
                step = self._step()
                pause = time.perf_counter()
                if self.watchdog:
                    self.watchdog.at(
                        trainer.state.step, "validation or a checkpoint", limited=False
                    )
                clock = self.clock
                self._pause(step)
                if self.clock == clock:  # it has not been set anew
                    self.clock += time.perf_counter() - pause  # that is no training time
                if step.stop:
                    break
        for line in trainer.exam.report():
            info(line)
        trainer.raise_failure()
        return trainer.state.step >= steps

    def _step(self) -> Step:
        """Train one step, and log it if it is due."""
        trainer, train = self.trainer, self.trainer.config.train
        number = trainer.state.step + 1
        if self.watchdog:
            self.watchdog.at(number, "a training step")
        logged = number % train.log_interval == 0 or number == train.steps
        rate = learning_rate(trainer.state.step, trainer.config.optim, train.steps)
        self.meters.begin(routing=logged)
        step = trainer.step(rate, self.meters, self.interrupt.asked)
        self.profile()
        if logged and step.verdict not in ("rewind", "stop"):
            self._log(step, rate)
        return step

    def _pause(self, step: Step) -> None:
        """Between two steps: judge the last one, validate, compare replicas, save."""
        trainer, config = self.trainer, self.trainer.config
        if step.verdict in ("rewind", "stop"):
            self._go_back(step.why, pass_over=True)
            return
        if step.verdict != "good":
            trainer.event(
                "skipped" if step.verdict == "skip" else step.verdict, why=step.why,
                row=trainer.state.row, left_out=trainer.state.left_out,
            )  # fmt: skip
            row = f", left out ({trainer.state.row} of at most {config.fault.skip} in a row)"
            self.display.note(f"warning: {step.why}{row if step.verdict == 'skip' else ''}")
        number = trainer.state.step
        last = step.stop or number == config.train.steps
        best = self._validate()
        every = config.checkpoint.interval
        self.due |= bool(every) and number % (every or 1) == 0
        # A bad step may be the first of those that lead back to the checkpoint before it.
        saves = last or best or (self.due and not trainer.state.row)
        compares = saves or number % (config.fault.replica_interval or 1) == 0
        if self.replicas and compares and (differences := self.replicas.differences()):
            self._go_back(describe(differences), pass_over=False)
            return
        if saves:
            self.display.note(trainer.save(wait=last, best=best))
            self.due = False

    def _validate(self) -> bool:
        """Measure on held-out data if that is due; whether it is the best so far."""
        trainer, train = self.trainer, self.trainer.config.train
        number = trainer.state.step
        if not trainer.validation or (number % train.valid_interval and number != train.steps):
            return False
        metrics, best = trainer.validate()
        self.display.validation(number, metrics)
        return best

    def _go_back(self, why: str, *, pass_over: bool) -> None:
        self.display.note(f"warning: {self.trainer.go_back(why, pass_over=pass_over)}")
        self.meters.clear()
        self.due = False
        self._restart_clock()

    def _log(self, step: Step, rate: float) -> None:
        """Write and show what was counted since the last time."""
        trainer = self.trainer
        elapsed = time.perf_counter() - self.clock
        metrics = self.meters.summary()
        if metrics:  # not every step was left out
            metrics["learning_rate"] = rate
            if step.verdict != "skip":
                metrics["grad_norm"] = step.norm
            metrics |= trainer.speed(trainer.state.samples - self.since, elapsed)
            if trainer.state.bad_steps:
                metrics["skipped_steps"] = trainer.state.bad_steps
            if trainer.log:
                metrics |= trainer.loader.counters(trainer.state.samples)
            trainer.write(metrics, self.meters.loads)
            self.display.step(trainer.state.step, metrics)
        self._restart_clock()

    def _restart_clock(self) -> None:
        self.clock, self.since = time.perf_counter(), self.trainer.state.samples
