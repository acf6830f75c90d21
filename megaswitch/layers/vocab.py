"""The two ends of the model: token embedding, output head, and the loss over the vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megaswitch.layers.norm import at_least_fp32
from megaswitch.layers.parameter import Init, parameter


class Embedding(nn.Module):
    """Rows of `weight` [V, d_model], N(0, 1) at the start as in Mesh-TF."""

    def __init__(self, vocab_size: int, d_model: int) -> None:
        super().__init__()
        self.weight = parameter((vocab_size, d_model), ("tp", None), Init("normal", 1.0))

    def forward(self, tokens: Tensor) -> Tensor:
        """Look up tokens [B, L] int64, giving [B, L, d_model]."""
        return F.embedding(tokens, self.weight)


# Rows up to which a CPU multiplies table · hiddenᵀ faster than hidden · tableᵀ (measured with MKL:
# ×1.7 for 8 rows, ×1.3 for 32). Decoding has so few.
_FEW_ROWS = 32


def _scores(hidden: Tensor, table: Tensor) -> Tensor:
    """hidden [..., d_model] against every row of `table` [V, d_model]: [..., V]."""
    few = hidden.numel() <= _FEW_ROWS * hidden.shape[-1]
    if few and hidden.device.type == "cpu" and not torch.is_grad_enabled():
        return (table @ hidden.flatten(0, -2).t()).t().unflatten(0, hidden.shape[:-1])
    return F.linear(hidden, table)


class Head(nn.Module):
    """Logits of an untied model: `weight` [V, d_model]."""

    def __init__(self, vocab_size: int, d_model: int, init: Init) -> None:
        super().__init__()
        self.weight = parameter((vocab_size, d_model), ("tp", None), init)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map hidden [B, L, d_model] to logits [B, L, V]."""
        return _scores(hidden, self.weight)


def tied_logits(hidden: Tensor, embedding: Embedding) -> Tensor:
    """Logits through the embedding's table, times d_model^-½ since its entries have unit size."""
    return _scores(hidden * embedding.weight.shape[1] ** -0.5, embedding.weight)


@dataclass(frozen=True)
class TokenLosses:
    """Sums over the counted target tokens.

    Attributes:
        cross_entropy: scalar, nats.
        log_z_squared: scalar, Σ log²Z of the softmax (T5's logit z-loss before its weight).
        tokens: scalar int64, how many were counted.
        correct: scalar int64, how many had the largest logit.
    """

    cross_entropy: Tensor
    log_z_squared: Tensor
    tokens: Tensor
    correct: Tensor


def token_losses(logits: Tensor, targets: Tensor, mask: Tensor) -> TokenLosses:
    """Sum the loss of logits [B, L, V] against targets [B, L] where `mask` [B, L] is True."""
    scores = _TargetScores.apply(logits.flatten(0, -2), targets.flatten())
    log_z, chosen = (score.view(targets.shape) for score in scores)
    return TokenLosses(
        cross_entropy=((log_z - chosen) * mask).sum(),
        log_z_squared=(log_z.square() * mask).sum(),
        tokens=mask.sum(),
        correct=((logits.detach().argmax(-1) == targets) & mask).sum(),
    )


class _TargetScores(torch.autograd.Function):
    """log Z of each row of logits [N, V], and the logit of its target [N]; both in at least fp32.

    Step by step under autograd, this would copy the logits half a dozen times. Here a few rows at a
    time go through the cache, and the gradient is the only other thing of their size.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        blocks = logits.split(_rows_in_cache(logits))
        log_z = torch.cat([torch.logsumexp(at_least_fp32(block), -1) for block in blocks])
        ctx.save_for_backward(logits, targets, log_z)
        return log_z, at_least_fp32(logits.gather(1, targets[:, None])[:, 0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, log_z_grad: Tensor, chosen_grad: Tensor) -> tuple[Tensor, None]:
        logits, targets, log_z = ctx.saved_tensors
        grad = torch.empty_like(logits)
        columns = (targets, log_z, log_z_grad, chosen_grad)
        blocks = (
            t.split(_rows_in_cache(logits)) for t in (grad, logits, *(c[:, None] for c in columns))
        )
        for out, block, target, z, z_grad, chosen in zip(*blocks, strict=True):
            softmax = (at_least_fp32(block) - z).exp_()
            softmax.mul_(z_grad).scatter_add_(1, target, chosen)
            out.copy_(softmax)
        return grad, None


def _rows_in_cache(logits: Tensor) -> int:
    """How many rows to take at a time: on a CPU about a megabyte of fp32, elsewhere all."""
    fit = (1 << 18) // logits.shape[1] if logits.device.type == "cpu" else len(logits)
    return max(1, fit)
