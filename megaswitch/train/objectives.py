"""What is minimised: token cross-entropy and the router's auxiliary losses, as global means.

Every term is divided by a count over the *global* batch, so gradients add up over micro-batches and
ranks with no further factor.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megaswitch.config import RunConfig
from megaswitch.data.span_corruption import Seq2SeqBatch
from megaswitch.layers.noise import Noise
from megaswitch.layers.soft_targets import SoftLosses, TopK
from megaswitch.layers.vocab import TokenLosses, token_losses
from megaswitch.model.switch_transformer import Inputs, SwitchOutput, SwitchTransformer
from megaswitch.parallel.tensor_parallel import ALONE, TensorParallel

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class BatchSize:
    """Counts over the global batch.

    Attributes:
        rows: sequences.
        tokens: target tokens that count.
    """

    rows: int
    tokens: int


@dataclass(frozen=True)
class MicroBatch:
    """Rows of one forward pass, on the device.

    Attributes:
        batch: its tensors.
        inputs: what every layer knows of it. Masks are None where nothing is padded, which spares
            attention a mask.
        teacher: what was kept of a teacher's probabilities of its targets, or None.
    """

    batch: Seq2SeqBatch
    inputs: Inputs
    teacher: TopK | None = None

    @classmethod
    def of(
        cls,
        batch: Seq2SeqBatch,
        device: torch.device,
        noise: Noise | None,
        teacher: TopK | None = None,
    ) -> MicroBatch:
        """From a batch that lies on the CPU, where asking about padding costs nothing."""
        padded = [not bool(mask.all()) for mask in (batch.encoder_mask, batch.decoder_mask)]
        batch = batch.to(device)
        inputs = Inputs(
            batch.encoder_tokens.shape,
            batch.decoder_tokens.shape,
            batch.encoder_mask if padded[0] else None,
            batch.decoder_mask if padded[1] else None,
            noise,
            batch.encoder_segments,
            batch.decoder_segments,
        )
        return cls(batch, inputs, None if teacher is None else teacher.to(device))

    @property
    def rows(self) -> int:
        """Sequences."""
        return len(self.batch.encoder_tokens)


def forward(model: SwitchTransformer, micro: MicroBatch, precision: torch.dtype) -> SwitchOutput:
    """Run the whole model over a micro-batch."""
    batch, inputs = micro.batch, micro.inputs
    with torch.autocast(
        batch.encoder_tokens.device.type, precision, enabled=precision != torch.float32
    ):
        output: SwitchOutput = model(
            batch.encoder_tokens,
            batch.decoder_tokens,
            encoder_mask=inputs.encoder_mask,
            decoder_mask=inputs.decoder_mask,
            encoder_segments=inputs.encoder_segments,
            decoder_segments=inputs.decoder_segments,
            noise=inputs.noise,
        )
    return output


def training_loss(
    output: SwitchOutput,
    batch: Seq2SeqBatch,
    whole: BatchSize,
    config: RunConfig,
    tp: TensorParallel = ALONE,
    soft: SoftLosses | None = None,
) -> tuple[Tensor | None, TokenLosses | None]:
    """This micro-batch's share of the training loss, as far as these layers add to it.

    Args:
        output: of the model, or of some layers, without logits.
        batch: with the targets.
        whole: the global batch.
        config: weights of the terms.
        tp: who has the logits of other rows of the vocabulary.
        soft: the loss against a teacher, which then takes its part (Mesh-TF's `StudentTeacher`).

    Returns:
        The scalar to call `backward` on, and the token sums that it came from; None for what these
        layers have not.
    """
    loss = sums = None
    logits = output.logits if output.lazy_logits is None else output.lazy_logits
    if logits is not None:
        sums = token_losses(
            logits,
            batch.decoder_targets,
            batch.decoder_mask,
            tp=tp,
            vocab_size=config.model.vocab_size,
        )
        tokens = sums.cross_entropy
        if soft is not None:
            distill = config.distill
            weight = distill.soft_weight
            # T² makes up for the gradient's 1/T² (Hinton et al. 2015, §2.1).
            tokens = (1 - weight) * tokens + weight * distill.temperature**2 * soft.cross_entropy
        tokens = tokens + config.train.logits_z_loss * sums.log_z_squared
        loss = tokens / whole.tokens
    moe = config.model.moe
    if output.routing:
        router = moe.aux_loss_weight * output.aux_loss + moe.z_loss_weight * output.z_loss
        # A mean over this micro-batch's groups; whole groups make its weight its share of rows.
        router = router * (len(batch.decoder_targets) / whole.rows)
        loss = router if loss is None else loss + router
    return loss, sums
