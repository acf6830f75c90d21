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
from megaswitch.layers.vocab import TokenLosses, token_losses
from megaswitch.model.switch_transformer import SwitchOutput, SwitchTransformer

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


def forward(
    model: SwitchTransformer,
    batch: Seq2SeqBatch,
    device: torch.device,
    precision: torch.dtype,
    noise: Noise | None = None,
) -> tuple[SwitchOutput, Seq2SeqBatch, dict[str, Tensor | None]]:
    """Run a batch that lies on the CPU.

    Returns:
        The output, the batch on `device`, and the stacks' masks as the model got them: None where
        nothing is padded, which spares attention a mask. Asked on the CPU, where it costs nothing.
    """
    padded = {
        "encoder": not bool(batch.encoder_mask.all()),
        "decoder": not bool(batch.decoder_mask.all()),
    }
    batch = batch.to(device)
    masks = {
        "encoder": batch.encoder_mask if padded["encoder"] else None,
        "decoder": batch.decoder_mask if padded["decoder"] else None,
    }
    with torch.autocast(device.type, precision, enabled=precision != torch.float32):
        output = model(
            batch.encoder_tokens,
            batch.decoder_tokens,
            encoder_mask=masks["encoder"],
            decoder_mask=masks["decoder"],
            noise=noise,
        )
    return output, batch, masks


def training_loss(
    output: SwitchOutput, targets: Tensor, mask: Tensor, whole: BatchSize, config: RunConfig
) -> tuple[Tensor, TokenLosses]:
    """This micro-batch's share of the training loss.

    Args:
        output: of the model.
        targets: [B, Ld] int64.
        mask: [B, Ld] bool, True on the targets that count.
        whole: the global batch.
        config: weights of the terms.

    Returns:
        The scalar to call `backward` on, and the sums it came from.
    """
    sums = token_losses(output.logits, targets, mask)
    tokens = sums.cross_entropy + config.train.logits_z_loss * sums.log_z_squared
    loss = tokens / whole.tokens
    moe = config.model.moe
    if moe.num_experts:
        router = moe.aux_loss_weight * output.aux_loss + moe.z_loss_weight * output.z_loss
        # A mean over this micro-batch's groups; whole groups make its weight its share of rows.
        loss = loss + router * (len(targets) / whole.rows)
    return loss, sums
