"""The training loop. `Trainer.build` shows the whole house on one screen."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from megaswitch.checkpoint.manager import (
    CheckpointManager,
    TrainState,
    checkpoints,
)
from megaswitch.config import RunConfig, to_toml
from megaswitch.data.samples import BatchStream, Samples, Segment
from megaswitch.data.span_corruption import Seq2SeqBatch
from megaswitch.files import write_durably
from megaswitch.layers.noise import Noise
from megaswitch.layers.vocab import TokenLosses
from megaswitch.log import ConfigError, UserError, info
from megaswitch.model.count import count
from megaswitch.model.switch_transformer import SwitchOutput
from megaswitch.optim.build import build_optimizer, clip_gradients, set_learning_rate
from megaswitch.optim.schedule import learning_rate
from megaswitch.parallel.mesh import Mesh
from megaswitch.parallel.regions import named, region
from megaswitch.parallel.watchdog import Watchdog
from megaswitch.rules_parallel import check_sequence_parallel
from megaswitch.train.corpora import batch_size, build_loader, build_validation, micro_batches
from megaswitch.train.display import Display
from megaswitch.train.distill import Distillation, copy_weights
from megaswitch.train.exam import Exam
from megaswitch.train.metrics import LossMeter, MetricLog, RouterMeter, SourceMeter, peak_flops
from megaswitch.train.objectives import PRECISIONS, BatchSize, MicroBatch
from megaswitch.train.parts import Parts, build_parts
from megaswitch.train.resume import check_resume, check_same_view
from megaswitch.train.runner import Runner
from megaswitch.train.start import take_weights
from megaswitch.train.task_data import prepare_tasks
from megaswitch.train.validation import Validation, validate


@dataclass
class Trainer:
    """Everything a run consists of. Build it with `Trainer.build`."""

    config: RunConfig
    mesh: Mesh
    parts: Parts
    runner: Runner
    optimizer: torch.optim.Optimizer
    loader: Samples
    batches: BatchStream
    sources: SourceMeter
    validation: list[Validation]
    checkpoints: CheckpointManager
    log: MetricLog | None
    state: TrainState
    exam: Exam
    distillation: Distillation | None = None
    failure: Exception | None = None  # of this rank alone; the next step tells the others

    @classmethod
    def build(cls, config: RunConfig, mesh: Mesh) -> Trainer:
        """Data, model, optimizer and, where the run folder has one, its newest checkpoint."""
        run_dir = Path(config.train.run_dir)
        prepared = prepare_tasks(config, mesh)
        with mesh.together():
            loader = build_loader(prepared, "train")
            validation = build_validation(prepared)
        lengths = (loader.encoder_length, loader.decoder_length)
        # Known only now, if the configuration leaves it to the span shape.
        if problems := list(check_sequence_parallel(config, "decoder", loader.decoder_length)):
            raise ConfigError(problems)
        with mesh.together():
            parts = build_parts(config, mesh, lengths=lengths)
        optimizer = build_optimizer(parts.parameters(), config.optim)
        manager = CheckpointManager(
            run_dir,
            keep=config.checkpoint.keep,
            mesh=mesh,
            tokenizer=Path(config.data.tokenizer) if config.data.tokenizer else None,
            background=config.checkpoint.background,
            timeout=config.parallel.timeout,
        )
        distillation = Distillation.build(config, mesh, loader)
        state = _first_state(config, mesh, parts, optimizer, manager, loader, distillation)
        with mesh.together():
            loader.go_on([Segment(start, tuple(q)) for start, *q in state.mixture], state.samples)
            state = replace(state, mixture=[[s.start, *s.quotas] for s in loader.segments])
            if distillation and distillation.cache:
                distillation.cache.check_samples(config, state.mixture)
            batches = loader.stream(
                micro_batches(config, mesh, state.samples),
                threads=config.data.loader_threads,
                ahead=config.data.prefetch_batches,
                pin=mesh.device.type == "cuda",
            )
            log = MetricLog(run_dir, state.step + 1) if mesh.rank == 0 else None
            if log:
                write_durably(run_dir / "config.toml", to_toml(config))
        exam = Exam.of(config, mesh, parts, state.step)
        parts.train()
        return cls(
            config=config,
            mesh=mesh,
            parts=parts,
            runner=Runner(config, mesh, parts),
            optimizer=optimizer,
            loader=loader,
            batches=batches,
            sources=SourceMeter(loader.source_names, mesh.device),
            validation=validation,
            checkpoints=manager,
            log=log,
            state=state,
            distillation=distillation,
            exam=exam,
        )

    def fit(
        self, watchdog: Watchdog | None = None, profile: Callable[[], object] = lambda: None
    ) -> bool:
        """Train to `train.steps`, or until SIGINT or SIGTERM; a checkpoint is written either way.

        Args:
            watchdog: is told where the run is.
            profile: is called after every step.

        Returns:
            True if the run is complete.

        Raises:
            UserError: the loss or the gradient is not finite, or a checkpoint cannot be written.
        """
        train = self.config.train
        if self.state.step >= train.steps:
            info(f"nothing to do: the run is at step {self.state.step} of {train.steps}")
        losses = LossMeter(self.mesh.device)
        router = RouterMeter(self.config.model, self.mesh.device)
        display = Display(self.config, self.mesh, count(self.config.model).total_parameters)
        flops = self._training_flops_per_sequence()
        clock, since = time.perf_counter(), self.state
        with self._closing(), _Interrupt() as interrupt, display:
            while self.state.step < train.steps:
                step = self.state.step + 1
                if watchdog:
                    watchdog.at(step, "a training step")
                logged = step % train.log_interval == 0 or step == train.steps
                rate = learning_rate(self.state.step, self.config.optim, train.steps)
                norm, stop = self._step(rate, losses, router if logged else None, interrupt.asked)
                profile()
                if logged:
                    elapsed = time.perf_counter() - clock
                    metrics = losses.summary(self.mesh) | router.summary(self.mesh)
                    metrics |= self.sources.summary(self.mesh)
                    if self.distillation:
                        metrics |= self.distillation.summary(self.mesh)
                    metrics |= {"learning_rate": rate, "grad_norm": norm}
                    metrics |= self._speed(self.state.samples - since.samples, elapsed, flops)
                    if self.log:
                        metrics |= self.loader.counters(self.state.samples)
                    self._write(step, metrics)
                    display.step(step, metrics)
                    clock, since = time.perf_counter(), self.state
                pause = time.perf_counter()
                if watchdog:
                    watchdog.at(step, "validation or a checkpoint", limited=False)
                best = False
                if self.validation and (step % train.valid_interval == 0 or step == train.steps):
                    best = self._validate(step, display)
                every = self.config.checkpoint.interval
                if stop or best or step == train.steps or (every and step % every == 0):
                    display.note(self._save(wait=stop or step == train.steps, best=best))
                clock += time.perf_counter() - pause  # neither is training time
                if stop:
                    break
        for line in self.exam.report():
            info(line)
        with self.mesh.together():
            if self.failure:
                raise self.failure
        return self.state.step >= train.steps

    @contextmanager
    def _closing(self) -> Iterator[None]:
        """End the loader's threads and the log, and with it the run folder's lock, in any case."""
        try:
            yield
        finally:
            self.batches.close()
            if self.log:
                self.log.close()

    def _step(
        self, rate: float, losses: LossMeter, router: RouterMeter | None, stop: bool
    ) -> tuple[float, bool]:
        """One optimizer step; returns the gradient norm and whether any rank wants to stop."""
        size = batch_size(self.config, self.state.samples)
        share = size // self.mesh.dp.size
        batches = self._batches(share // self.config.train.micro_batch_size)
        # One small sum tells every rank the global counts, whether one was asked to stop, and
        # whether one has failed where the others cannot see it.
        tokens = sum(int(batch.decoder_mask.sum()) for batch in batches)
        reads_first = self.mesh.axis("pp").rank == self.mesh.axis("tp").rank == 0
        flags = [tokens * reads_first, int(stop), int(self.failure is not None)]
        with region("waiting for ranks"):
            counts = self.mesh.sum_all_(torch.tensor(flags, device=self.mesh.device))
            tokens, stops, failures = counts.tolist()
        if failures:
            with self.mesh.together():
                if self.failure:
                    raise self.failure
        whole = BatchSize(rows=size, tokens=tokens)
        heard = self.state.step >= self.config.distill.start_step
        teacher = self.runner.distillation = self.distillation if heard else None
        micro = [
            MicroBatch.of(
                b, self.mesh.device, self._noise(b), teacher.known(b) if teacher else None
            )
            for b in batches
        ]

        def record(output: SwitchOutput, sums: TokenLosses | None, one: MicroBatch) -> None:
            losses.add(sums, output.aux_loss.detach(), one.rows)
            self.sources.add(sums, one.batch)
            if router:
                router.add(output.routing, one.inputs)

        loss = self.runner.backward(micro, whole, record)
        self.parts.gradients.finish()
        self.parts.backend.finish_step()
        limit = self.config.optim.clip_grad_norm
        with region("optimizer"):
            norm = clip_gradients(self.parts.parameters(), limit, self.mesh).item()
        total = self.mesh.sum_(loss).item()
        if not math.isfinite(total) or not math.isfinite(norm):
            raise UserError(self._diverged(total, norm))
        set_learning_rate(self.optimizer, rate)
        with region("optimizer"):
            self.optimizer.step()
        self.parts.gradients.clear()
        self.state = replace(
            self.state, step=self.state.step + 1, samples=self.state.samples + size
        )
        return norm, bool(stops)

    def _noise(self, batch: Seq2SeqBatch) -> Noise:
        samples = batch.sample_index.to(self.mesh.device)
        return Noise(self.config.train.seed, self.state.step, samples)

    @named("data")
    def _batches(self, number: int) -> list[Seq2SeqBatch]:
        """The next micro-batches; a failure is kept for `_step`."""
        try:
            return [next(self.batches) for _ in range(number)]
        except UserError as error:
            self.failure = error
            return []

    def _validate(self, step: int, display: Display) -> bool:
        """Measure on held-out data; whether this is the best so far, and to be kept."""
        metrics = validate(self.runner, self.validation) | self.exam.figures()
        self._write(step, {f"valid/{key}": value for key, value in metrics.items()})
        display.validation(step, metrics)
        return self.exam.record(step, metrics) and self.config.checkpoint.keep_best

    def _write(self, step: int, metrics: dict[str, Any]) -> None:
        """Log on rank 0; a failure is kept for `_step`."""
        try:
            if self.log:
                self.log.write(step, metrics)
        except OSError as error:
            self.failure = UserError(
                f"metrics cannot be written to {self.config.train.run_dir}: {error.strerror}; free "
                "space there and start the same command again"
            )

    def _save(self, *, wait: bool, best: bool = False) -> str:
        """Save; in the background, unless it is to be waited for. Says what happened."""
        path = self.checkpoints.save(
            self.config,
            self.state,
            self.parts.weights,
            self.optimizer,
            others=self.parts.remembered(),
            best=best,
        )
        if wait:
            self.checkpoints.wait()
        elif self.config.checkpoint.background:
            return f"saving {path}"
        return f"saved {path}"

    def _training_flops_per_sequence(self) -> int:
        """Forward and backward; recomputed activations do not count as useful work."""
        sizes = count(
            self.config.model,
            encoder_length=self.loader.encoder_length,
            decoder_length=self.loader.decoder_length,
        )
        return 3 * sizes.forward_flops_per_sequence

    def _speed(self, sequences: int, seconds: float, flops: int) -> dict[str, float]:
        tokens = sequences * (self.loader.encoder_length + self.loader.decoder_length)
        speed = {
            "tokens_per_second": tokens / seconds,
            "tflops_per_second": sequences * flops / seconds / 1e12,
        }
        peak = peak_flops(self.mesh.device, PRECISIONS[self.config.train.precision])
        if peak:
            speed["mfu"] = sequences * flops / seconds / (peak * self.mesh.size)
        return speed

    def _diverged(self, loss: float, norm: float) -> str:
        found = checkpoints(self.checkpoints.folder)
        where = f"the newest checkpoint, {found[-1]}, is from before" if found else "none was saved"
        return (
            f"the loss is {loss:.4g} and the gradient norm {norm:.4g} at step "
            f"{self.state.step + 1}; both must be finite. The weights were not updated; {where}. "
            "Try a lower optim.learning_rate, a longer warm-up, optim.clip_grad_norm=1.0, or "
            "train.precision='fp32'"
        )


def _first_state(
    config: RunConfig,
    mesh: Mesh,
    parts: Parts,
    optimizer: torch.optim.Optimizer,
    manager: CheckpointManager,
    loader: Samples,
    distillation: Distillation | None,
) -> TrainState:
    """Fill weights and optimizer: from the run's newest checkpoint, from another run, or anew."""
    newest = next(reversed(checkpoints(manager.folder)), None)
    teacher = distillation.fingerprint if distillation else ""
    with mesh.together():
        check_same_view(mesh, config, loader, newest)
        if newest:
            check_resume(newest, config, loader, teacher)
    if newest:
        info(f"resuming from {newest}")
        return manager.restore(newest, parts.weights, optimizer, others=parts.remembered())
    parts.initialize(config.train.seed)
    if config.train.init_from:
        take_weights(Path(config.train.init_from), config, parts, mesh)
    if distillation and config.distill.copy_weights:
        copy_weights(config, mesh, parts.weights)
    return TrainState(step=0, samples=0, fingerprint=loader.fingerprint, teacher=teacher)


class _Interrupt:
    """Turns the first SIGINT or SIGTERM into a request; one after `grace` seconds acts as usual.

    The grace is for torchrun, which sends its workers the Ctrl-C that they got already.
    """

    asked = False
    grace = 5.0

    def __enter__(self) -> _Interrupt:
        self._before = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if not self.asked:
            self.asked, self._since = True, time.monotonic()
        elif time.monotonic() - self._since > self.grace:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
