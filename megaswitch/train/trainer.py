"""The training loop. `Trainer.build` shows the whole house on one screen."""

from __future__ import annotations

import math
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from megaswitch.checkpoint.manager import (
    CheckpointManager,
    TrainState,
    checkpoints,
    read_config,
    write_durably,
)
from megaswitch.config import RunConfig, differences, to_toml
from megaswitch.data.loader import SpanCorruptionLoader
from megaswitch.data.span_corruption import Seq2SeqBatch
from megaswitch.data.tokenizer import Tokenizer
from megaswitch.layers.noise import Noise
from megaswitch.log import UserError, info
from megaswitch.model.count import count
from megaswitch.model.switch_transformer import SwitchTransformer
from megaswitch.optim.build import build_optimizer, clip_gradients, set_learning_rate
from megaswitch.optim.schedule import learning_rate
from megaswitch.parallel.data_parallel import sum_gradients
from megaswitch.parallel.mesh import Mesh
from megaswitch.train.display import Display
from megaswitch.train.evaluate import Validation
from megaswitch.train.metrics import LossMeter, MetricLog, RouterMeter, peak_flops
from megaswitch.train.objectives import BatchSize, forward, training_loss

_PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Keys that a run may change when it goes on; the rest of the configuration is its identity.
_MAY_CHANGE = ("train.steps", "train.run_dir", "train.device", "train.micro_batch_size",
               "train.activation_checkpointing", "train.log_interval", "train.valid_interval",
               "train.valid_samples", "checkpoint.", "data.train", "data.valid",
               "data.tokenizer")  # fmt: skip


@dataclass
class Trainer:
    """Everything a run consists of. Build it with `Trainer.build`."""

    config: RunConfig
    mesh: Mesh
    model: SwitchTransformer
    optimizer: torch.optim.Optimizer
    loader: SpanCorruptionLoader
    validation: Validation | None
    checkpoints: CheckpointManager
    log: MetricLog | None
    state: TrainState

    @classmethod
    def build(cls, config: RunConfig, mesh: Mesh) -> Trainer:
        """Data, model, optimizer and, where the run folder has one, its newest checkpoint."""
        loader = build_loader(config, "train")
        with torch.device(mesh.device):
            model = SwitchTransformer(config.model)
        model.set_activation_checkpointing(config.train.activation_checkpointing)
        optimizer = build_optimizer(model.parameters(), config.optim)
        run_dir = Path(config.train.run_dir)
        manager = CheckpointManager(
            run_dir,
            keep=config.checkpoint.keep,
            mesh=mesh,
            tokenizer=check_tokenizer(config, loader),
        )
        found = checkpoints(manager.folder)
        if found:
            check_resume(found[-1], config)
            state = manager.restore(found[-1], model, optimizer)
            if state.fingerprint != loader.fingerprint:
                raise UserError(
                    f"{found[-1]} was trained on other data (fingerprint {state.fingerprint}) than "
                    f"data.train={config.data.train!r} ({loader.fingerprint}); give the same data "
                    "or another train.run_dir"
                )
            info(f"resuming from {found[-1]}")
        else:
            model.initialize(config.train.seed)
            state = TrainState(step=0, samples=0, fingerprint=loader.fingerprint)
        log = None
        if mesh.rank == 0:
            log = MetricLog(run_dir, state.step + 1)
            write_durably(run_dir / "config.toml", to_toml(config))
        return cls(
            config=config,
            mesh=mesh,
            model=model.train(),
            optimizer=optimizer,
            loader=loader,
            validation=build_validation(config),
            checkpoints=manager,
            log=log,
            state=state,
        )

    def fit(self) -> bool:
        """Train to `train.steps`, or until SIGINT or SIGTERM; a checkpoint is written either way.

        Returns:
            True if the run is complete.

        Raises:
            UserError: the loss or the gradient is not finite, or a checkpoint cannot be written.
        """
        train = self.config.train
        losses = LossMeter(self.mesh.device)
        router = RouterMeter(self.config.model.moe.num_experts, self.mesh.device)
        display = Display(self.config, self.mesh, count(self.config.model).total_parameters)
        flops = self._training_flops_per_sequence()
        saved = self.state.step
        clock, since = time.perf_counter(), self.state
        with _Interrupt() as interrupt, display:
            while self.state.step < train.steps:
                step = self.state.step + 1
                logged = step % train.log_interval == 0 or step == train.steps
                rate = learning_rate(self.state.step, self.config.optim, train.steps)
                norm, stop = self._step(rate, losses, router if logged else None, interrupt.asked)
                if logged:
                    elapsed = time.perf_counter() - clock
                    metrics = losses.summary(self.mesh) | router.summary(self.mesh)
                    metrics |= {"learning_rate": rate, "grad_norm": norm}
                    metrics |= self._speed(self.state.samples - since.samples, elapsed, flops)
                    self._record(step, metrics, display)
                if self.validation and (step % train.valid_interval == 0 or step == train.steps):
                    self._validate(step, display)
                every = self.config.checkpoint.interval
                if stop or step == train.steps or (every and step % every == 0):
                    path = self._save()
                    saved = step
                    display.note(f"saved {path}")
                if logged:  # validating and saving are not training time
                    clock, since = time.perf_counter(), self.state
                if stop:
                    break
        assert saved == self.state.step
        if self.log:
            self.log.close()
        return self.state.step >= train.steps

    def _step(
        self, rate: float, losses: LossMeter, router: RouterMeter | None, stop: bool
    ) -> tuple[float, bool]:
        """One optimizer step; returns the gradient norm and whether any rank wants to stop."""
        size = batch_size(self.config, self.state.samples)
        share = size // self.mesh.size
        start = self.state.samples + self.mesh.rank * share
        micro = self.config.train.micro_batch_size
        batches = [
            self.loader.batch(range(first, first + micro))
            for first in range(start, start + share, micro)
        ]
        # One small sum tells every rank the global counts, and whether one was asked to stop.
        counts = torch.tensor(
            [sum(int(b.decoder_mask.sum()) for b in batches), int(stop)], device=self.mesh.device
        )
        tokens, stops = self.mesh.sum_(counts).tolist()
        whole = BatchSize(rows=size, tokens=tokens)
        loss = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        for batch in batches:
            loss += self._backward(batch, whole, losses, router)
        sum_gradients(self.model.parameters(), self.mesh)
        norm = clip_gradients(self.model.parameters(), self.config.optim.clip_grad_norm).item()
        total = self.mesh.sum_(loss).item()
        if not math.isfinite(total) or not math.isfinite(norm):
            raise UserError(self._diverged(total, norm))
        set_learning_rate(self.optimizer, rate)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.state = TrainState(
            self.state.step + 1, self.state.samples + size, self.state.fingerprint
        )
        return norm, bool(stops)

    def _backward(
        self, batch: Seq2SeqBatch, whole: BatchSize, losses: LossMeter, router: RouterMeter | None
    ) -> Tensor:
        """Forward and backward of one micro-batch; returns its share of the loss."""
        precision = _PRECISIONS[self.config.train.precision]
        samples = batch.sample_index.to(self.mesh.device)
        noise = Noise(self.config.train.seed, self.state.step, samples)
        output, batch, masks = forward(self.model, batch, self.mesh.device, precision, noise)
        loss, sums = training_loss(
            output, batch.decoder_targets, batch.decoder_mask, whole, self.config
        )
        loss.backward()
        losses.add(sums, output)
        if router:
            router.add(output.routing, masks)
        return loss.detach().double()

    def _validate(self, step: int, display: Display) -> None:
        assert self.validation
        precision = _PRECISIONS[self.config.train.precision]
        metrics = self.validation.run(self.model, self.mesh, precision)
        if self.log:
            self.log.write(step, {f"valid/{key}": value for key, value in metrics.items()})
        display.validation(step, metrics)

    def _record(self, step: int, metrics: dict[str, Any], display: Display) -> None:
        if self.log:
            self.log.write(step, metrics)
        display.step(step, metrics)

    def _save(self) -> Path:
        return self.checkpoints.save(self.config, self.state, self.model, self.optimizer)

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
        peak = peak_flops(self.mesh.device)
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


def batch_size(config: RunConfig, samples: int) -> int:
    """Sequences of the step that begins after `samples` sequences were consumed."""
    train = config.train
    if train.rampup_batch_size is None:
        return train.batch_size
    assert train.rampup_increment
    assert train.rampup_samples
    increments = (train.batch_size - train.rampup_batch_size) // train.rampup_increment
    done = min(increments, samples * increments // train.rampup_samples)
    return train.rampup_batch_size + done * train.rampup_increment


def build_loader(config: RunConfig, split: str) -> SpanCorruptionLoader:
    """The loader of `data.train` (shuffled) or `data.valid` (in order)."""
    prefix = getattr(config.data, split)
    if prefix is None:
        raise UserError(
            f"data.{split} is not set; it must name the .bin/.idx pair that `megaswitch "
            f"preprocess` wrote, without suffix: --data.{split}=PREFIX"
        )
    return SpanCorruptionLoader(
        prefix,
        seed=config.train.seed,
        vocab_size=config.model.vocab_size,
        encoder_length=config.data.encoder_length,
        decoder_length=config.data.decoder_length,
        noise_density=config.data.noise_density,
        mean_span_length=config.data.mean_span_length,
        shuffle=split == "train",
    )


def build_validation(config: RunConfig) -> Validation | None:
    """Validation on `data.valid`, or None without it."""
    if config.data.valid is None:
        return None
    loader = build_loader(config, "valid")
    return Validation(
        loader,
        samples=config.train.valid_samples,
        micro_batch_size=config.train.micro_batch_size,
    )


def check_tokenizer(config: RunConfig, loader: SpanCorruptionLoader) -> Path | None:
    """The tokenizer that checkpoints take along, if `data.tokenizer` names one.

    Raises:
        UserError: it is not the one that the training data was made with.
    """
    if config.data.tokenizer is None:
        return None
    tokenizer = Tokenizer(config.data.tokenizer)
    meta = loader.store.meta
    if meta is not None and meta.tokenizer_sha256 != tokenizer.sha256:
        raise UserError(
            f"data.tokenizer={config.data.tokenizer!r} is not the tokenizer that data.train="
            f"{config.data.train!r} was made with (their SHA-256 differ); give that one, or "
            "preprocess the text again"
        )
    return Path(config.data.tokenizer)


def check_resume(path: Path, config: RunConfig) -> None:
    """Refuse to go on from `path` under a configuration that would make it another run."""
    changed = [
        line
        for key, line in differences(read_config(path), config)
        if not key.startswith(_MAY_CHANGE)
    ]
    if changed:
        raise UserError(
            f"{path} was written under another configuration: {'; '.join(changed)}. Use the same "
            "values, or another train.run_dir for a new run"
        )
