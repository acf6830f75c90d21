"""The training loop. `Trainer.build` shows the whole house on one screen."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from megaswitch.checkpoint.manager import CheckpointManager, TrainState, checkpoints
from megaswitch.config import RunConfig, to_toml
from megaswitch.data.samples import BatchStream, Samples, Segment
from megaswitch.data.span_corruption import Seq2SeqBatch
from megaswitch.events import write_event
from megaswitch.files import write_durably
from megaswitch.layers.noise import Noise
from megaswitch.log import ConfigError, UserError
from megaswitch.model.count import count
from megaswitch.optim.build import build_optimizer, clip_gradients, set_learning_rate
from megaswitch.parallel.mesh import Mesh
from megaswitch.parallel.regions import named, region
from megaswitch.parallel.watchdog import Watchdog
from megaswitch.rules_parallel import check_sequence_parallel
from megaswitch.train.corpora import batch_size, build_loader, build_validation, micro_batches
from megaswitch.train.distill import Distillation
from megaswitch.train.exam import Exam
from megaswitch.train.judge import Judge, Verdict
from megaswitch.train.loop import Loop
from megaswitch.train.meters import Meters
from megaswitch.train.metric_log import MetricLog
from megaswitch.train.metrics import LayerLoad, peak_flops
from megaswitch.train.objectives import PRECISIONS, BatchSize, MicroBatch
from megaswitch.train.parts import Parts, build_parts
from megaswitch.train.resume import first_state
from megaswitch.train.runner import Runner
from megaswitch.train.task_data import prepare_tasks
from megaswitch.train.validation import Validation, validate


@dataclass(frozen=True)
class Step:
    """What became of a step.

    Attributes:
        norm: of the gradient, before clipping.
        stop: whether any rank was asked to stop.
        verdict: on its loss and gradient.
        why: in words, if it is not "good".
    """

    norm: float
    stop: bool
    verdict: Verdict
    why: str


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
    validation: list[Validation]
    checkpoints: CheckpointManager
    log: MetricLog | None
    state: TrainState
    exam: Exam
    judge: Judge
    distillation: Distillation | None = None
    failure: Exception | None = None  # of this rank alone; the next step tells the others
    data_seconds: float = 0.0  # that this rank has waited for data

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
            keep_every=config.checkpoint.keep_every,
            mesh=mesh,
            tokenizer=Path(config.data.tokenizer) if config.data.tokenizer else None,
            background=config.checkpoint.background,
            timeout=config.parallel.timeout,
        )
        distillation = Distillation.build(config, mesh, loader)
        state = first_state(config, mesh, parts, optimizer, manager, loader, distillation)
        with mesh.together():
            loader.go_on([Segment(start, tuple(q)) for start, *q in state.mixture], state.samples)
            state = replace(state, mixture=[[s.start, *s.quotas] for s in loader.segments])
            if distillation and distillation.cache:
                distillation.cache.check_samples(config, state.mixture)
            batches = _stream(config, mesh, loader, state.samples)
            log = MetricLog(run_dir, state.step + 1, config) if mesh.rank == 0 else None
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
            validation=validation,
            checkpoints=manager,
            log=log,
            state=state,
            distillation=distillation,
            exam=exam,
            judge=Judge(config.fault),
        )

    def fit(
        self, watchdog: Watchdog | None = None, profile: Callable[[], object] = lambda: None
    ) -> bool:
        """Train to `train.steps` or until a signal asks to stop; either way a checkpoint is saved.

        Args:
            watchdog: is told where the run is.
            profile: is called after every step.

        Returns:
            True if the run is complete.

        Raises:
            UserError: a step is bad or replicas differ, and `fault` allows no more of that; or a
                checkpoint cannot be written.
        """
        return Loop(self, watchdog, profile).run()

    @contextmanager
    def closing(self) -> Iterator[None]:
        """End the loader's threads and the log, and with it the run folder's lock, in any case."""
        try:
            yield
        finally:
            self.batches.close()
            if self.log:
                self.log.close()

    def step(self, rate: float, meters: Meters, stop: bool) -> Step:
        """One optimizer step, unless it is bad: then the weights stay, and the meters forget it.

        Args:
            rate: learning rate.
            meters: count it.
            stop: whether this rank was asked to stop.
        """
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
            self.raise_failure()
        whole = BatchSize(rows=size, tokens=tokens)
        heard = self.state.step >= self.config.distill.start_step
        teacher = self.runner.distillation = self.distillation if heard else None
        micro = [
            MicroBatch.of(
                b, self.mesh.device, self._noise(b), teacher.known(b) if teacher else None
            )
            for b in batches
        ]
        loss = self.runner.backward(micro, whole, meters.record)
        self.parts.gradients.finish()
        limit = self.config.optim.clip_grad_norm
        with region("optimizer"):
            norm = clip_gradients(self.parts.parameters(), limit, self.mesh).item()
        total = self.mesh.sum_(loss).item()
        before, verdict = self.state, self.judge.verdict(self.state, total, norm)
        good = verdict in ("good", "spike")
        if good:
            set_learning_rate(self.optimizer, rate)
            with region("optimizer"):
                self.optimizer.step()
        else:
            meters.take_back()
        self.parts.backend.finish_step(keep=good)
        self.parts.gradients.clear()
        self.state = self.judge.after(before, size, total, good=good)
        why = "" if verdict == "good" else self.judge.why(before, total, norm)
        return Step(norm, bool(stops), verdict, why)

    def raise_failure(self) -> None:
        """Raise, on all ranks, what one of them kept for this moment."""
        with self.mesh.together():
            if self.failure:
                raise self.failure

    def _noise(self, batch: Seq2SeqBatch) -> Noise:
        samples = batch.sample_index.to(self.mesh.device)
        return Noise(self.config.train.seed, self.state.step, samples)

    @named("data")
    def _batches(self, number: int) -> list[Seq2SeqBatch]:
        """The next micro-batches; a failure is kept for `step`."""
        began = time.perf_counter()
        try:
            return [next(self.batches) for _ in range(number)]
        except UserError as error:
            self.failure = error
            return []
        finally:
            self.data_seconds += time.perf_counter() - began

    def validate(self) -> tuple[dict[str, float], bool]:
        """Figures of held-out data, and whether they are the best so far, and to be kept."""
        metrics = validate(self.runner, self.validation) | self.exam.figures()
        step = self.state.step
        self.write({f"valid/{key}": value for key, value in metrics.items()})
        return metrics, self.exam.record(step, metrics) and self.config.checkpoint.keep_best

    def write(self, metrics: dict[str, Any], loads: Mapping[str, LayerLoad] | None = None) -> None:
        """Log on rank 0; a failure is kept for `step`."""
        try:
            if self.log:
                self.log.write(self.state.step, metrics)
                self.log.experts.write(self.state.step, loads or {})
        except OSError as error:
            self.failure = UserError(
                f"metrics cannot be written to {self.config.train.run_dir}: {error.strerror}; free "
                "space there and start the same command again"
            )

    def event(self, kind: str, **details: Any) -> None:
        """Record on rank 0 what happened."""
        if self.mesh.rank == 0:
            write_event(Path(self.config.train.run_dir), kind, self.state.step, **details)

    def save(self, *, wait: bool, best: bool = False) -> str:
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

    def go_back(self, why: str, *, pass_over: bool) -> str:
        """To the newest intact checkpoint. Says what happened.

        Args:
            why: in words.
            pass_over: the data since then, which stays unlearned; otherwise it comes again.

        Raises:
            UserError: on every rank, if there is no checkpoint, or no more rewinds are allowed.
        """
        before = self.state
        allowed = before.rewinds < self.config.fault.rewinds
        path = self.checkpoints.newest_intact() if allowed else None
        if path is None:
            raise UserError(self._hopeless(why, pass_over))
        restored = self.checkpoints.restore(
            path,
            self.parts.weights,
            self.optimizer,
            others=self.parts.remembered(),
            verified=True,
        )
        samples = before.samples if pass_over else restored.samples
        self.state = replace(
            restored,
            samples=samples,
            mixture=before.mixture,
            row=0,
            rewinds=before.rewinds + 1,
            left_out=restored.left_out + samples - restored.samples,
        )
        self.batches.close()
        self.batches = _stream(self.config, self.mesh, self.loader, samples)
        if self.log:
            self.log.cut(self.state.step + 1)
        self.exam = Exam.of(self.config, self.mesh, self.parts, self.state.step)
        self.event("rewound", why=why, from_step=before.step, samples=samples,
                   left_out=self.state.left_out)  # fmt: skip
        data = (
            f"passing over {samples - restored.samples:,} samples since then"
            if pass_over
            else "over the same data"
        )
        return (
            f"{why}: going back to {path}, {data} (rewind {self.state.rewinds} of at most "
            f"{self.config.fault.rewinds})"
        )

    def speed(self, sequences: int, seconds: float) -> dict[str, float]:
        """Of `sequences` trained on in so many seconds by all ranks."""
        tokens = sequences * (self.loader.encoder_length + self.loader.decoder_length)
        flops = self._flops_per_sequence * sequences / seconds
        speed = {
            "tokens_per_second": tokens / seconds,
            "tflops_per_second": flops / 1e12,
        }
        peak = peak_flops(self.mesh.device, PRECISIONS[self.config.train.precision])
        if peak:
            speed["mfu"] = flops / (peak * self.mesh.size)
        return speed

    @cached_property
    def _flops_per_sequence(self) -> int:
        """Forward and backward; recomputed activations do not count as useful work."""
        lengths = self.loader.encoder_length, self.loader.decoder_length
        sizes = count(self.config.model, encoder_length=lengths[0], decoder_length=lengths[1])
        return 3 * sizes.forward_flops_per_sequence

    def _hopeless(self, why: str, bad_step: bool) -> str:
        found = checkpoints(self.checkpoints.folder)
        where = f"the newest checkpoint, {found[-1]}, is from before" if found else "none was saved"
        if not bad_step:
            return (
                f"{why}: memory or a chip altered it. Nothing was saved since; {where}. Keep the "
                "node of the odd rank out, and start the same command again; with fault.rewinds "
                "the run goes back by itself"
            )
        return (
            f"{why}. The weights were not updated; {where}. Try a lower optim.learning_rate, a "
            "longer warm-up, optim.clip_grad_norm=1.0, or train.precision='fp32'; or let the run "
            "leave bad steps out (fault.skip) and go back (fault.rewinds)"
        )


def _stream(config: RunConfig, mesh: Mesh, loader: Samples, samples: int) -> BatchStream:
    """This rank's micro-batches after so many samples."""
    return loader.stream(
        micro_batches(config, mesh, samples),
        threads=config.data.loader_threads,
        ahead=config.data.prefetch_batches,
        pin=mesh.device.type == "cuda",
    )
