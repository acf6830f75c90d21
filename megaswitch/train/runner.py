"""Runs this rank's part of the model over micro-batches, with or without a pipeline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megaswitch.config import RunConfig
from megaswitch.layers.vocab import TokenLosses
from megaswitch.model.stages import Stage, StageModule
from megaswitch.model.switch_transformer import (
    Activations,
    RouterLosses,
    SwitchOutput,
    SwitchTransformer,
)
from megaswitch.parallel.mesh import Mesh
from megaswitch.parallel.pipeline import Pipeline, attach
from megaswitch.parallel.tensor_parallel import TensorParallel
from megaswitch.train.objectives import PRECISIONS, BatchSize, MicroBatch, forward, training_loss
from megaswitch.train.parts import Parts

if TYPE_CHECKING:
    from megaswitch.train.distill import Distillation

# Called with the output of each micro-batch (of some layers, in a pipeline) and its token sums.
Record = Callable[[SwitchOutput, TokenLosses | None, MicroBatch], None]


class Runner:
    """Forward and backward passes of a run.

    Args:
        config: the run.
        mesh: the ranks.
        parts: this rank's layers.
        precision: of forward passes; None: the run's.
    """

    def __init__(
        self, config: RunConfig, mesh: Mesh, parts: Parts, precision: torch.dtype | None = None
    ) -> None:
        self.config, self.mesh, self.parts = config, mesh, parts
        self.precision = precision or PRECISIONS[config.train.precision]
        self.tp = TensorParallel(mesh.axis("tp"), config.parallel.sequence_parallel)
        self.micro: Sequence[MicroBatch] = ()
        self.whole = BatchSize(1, 1)
        self.record: Record = nothing
        self.distillation: Distillation | None = None  # while a teacher is heard
        self.attached = torch.zeros(())  # auxiliary losses of stages before the last
        self._pipeline: Pipeline | None = None

    @property
    def has_pipeline(self) -> bool:
        """Whether the layers lie on several ranks."""
        return self.mesh.axis("pp").size > 1

    def backward(self, micro: Sequence[MicroBatch], whole: BatchSize, record: Record) -> Tensor:
        """Forward and backward over this rank's micro-batches of a step.

        Gradients are left as the backward pass left them: see `GradientSums.finish`.

        Returns:
            Their share of the training loss, scalar fp64; in a pipeline, this rank's terms of it.
        """
        self.micro, self.whole, self.record = micro, whole, record
        total = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        if self.has_pipeline:
            self.attached = total
            last = self.pipeline_for(micro[0]).train(len(micro))
            return total if last is None else total + last
        overlap = self.config.parallel.overlap_gradients
        for number, one in enumerate(micro):
            with self.parts.backend.forward_pass():
                output = forward(self.parts.models[0], one, self.precision)
            loss, sums = self._loss(output, one)
            assert loss is not None
            if overlap and number == len(micro) - 1:
                self.parts.gradients.during_backward()
            loss.backward()
            record(output, sums, one)
            total += loss.detach()
        return total

    @torch.no_grad()
    def evaluate(self, micro: MicroBatch, record: Record) -> None:
        """Forward over one micro-batch, the layers in evaluation mode."""
        self.micro, self.record = (micro,), record
        if not self.has_pipeline:
            with self.parts.backend.forward_pass():
                output = forward(self.parts.models[0], micro, self.precision)
            record(output, None, micro)
            return
        self.pipeline_for(micro).forward(0, self._carry(micro, parts=False))

    def pipeline_for(self, micro: MicroBatch) -> Pipeline:
        """The pipeline, made at its first use: its buffers have a micro-batch's shapes."""
        if self._pipeline is None:
            for module in self.parts.modules.values():
                module.body = self._run_stage
            self._pipeline = Pipeline(
                self.parts.modules,
                len(self.parts.stages),
                self.mesh.axis("pp"),
                self.mesh.device,
                self.config.parallel.schedule,
                self._carry(micro, parts=self.tp.sequence and self.tp.size > 1),
                {stage: later.take for stage, later in self.parts.later.items()},
            )
        return self._pipeline

    def _carry(self, micro: MicroBatch, *, parts: bool) -> tuple[Tensor, ...]:
        """Meta tensors like the activations between two stages."""
        width = self.config.model.d_model
        shapes = (micro.inputs.encoder_shape, micro.inputs.decoder_shape)
        return tuple(
            torch.empty(
                (s.numel() // self.tp.size, width) if parts else (*s, width),
                device="meta",
                requires_grad=True,
            )
            for s in shapes
        )

    def _run_stage(self, module: StageModule, inputs: tuple[Tensor, ...], number: int) -> Any:
        """From the activations of the stage before to the next one's, or the loss."""
        micro, model, stage = self.micro[number], module.model, module.stage
        with self.parts.backend.forward_pass():
            x, output = self._run_layers(model, stage, inputs, micro)
        received = (None, None) if stage.first else inputs
        if not torch.is_grad_enabled():
            self.record(output, None, micro)
            return x
        loss, sums = self._loss(output, micro)
        self.record(output, sums, micro)
        if stage.last:
            assert loss is not None
            return loss[None]
        # What passes through unchanged becomes a tensor of its own; an auxiliary loss rides on
        # the stream that this stage worked on last.
        outputs = [new.clone() if new is old else new for new, old in zip(x, received, strict=True)]
        if loss is not None:
            self.attached += loss.detach()
            working = 1 if model.decoder.layers else 0
            outputs[working] = attach(outputs[working], loss)
        return tuple(outputs)

    def _loss(
        self, output: SwitchOutput, micro: MicroBatch
    ) -> tuple[Tensor | None, TokenLosses | None]:
        soft = None
        if self.distillation and output.logits is not None:
            soft = self.distillation.losses(output.logits, micro)
        return training_loss(output, micro.batch, self.whole, self.config, self.tp, soft)

    def _run_layers(
        self,
        model: SwitchTransformer,
        stage: Stage,
        inputs: tuple[Tensor, ...],
        micro: MicroBatch,
    ) -> tuple[Activations, SwitchOutput]:
        batch, losses = micro.batch, RouterLosses()
        kind = batch.encoder_tokens.device.type
        with torch.autocast(kind, self.precision, enabled=self.precision != torch.float32):
            if stage.first:
                tokens = (batch.encoder_tokens, batch.decoder_tokens)
                x = model.embed(*tokens, micro.inputs.noise)
            else:
                x = Activations(*inputs)
            x = model.advance(x, micro.inputs, losses)
            shape = micro.inputs.decoder_shape
            hidden = x.decoder if stage.last else None
            return x, model.output(hidden, x.encoder, shape, losses)


def nothing(output: SwitchOutput, sums: TokenLosses | None, micro: MicroBatch) -> None:
    """Record nothing."""
