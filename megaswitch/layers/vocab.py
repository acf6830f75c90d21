"""The two ends of the model: token embedding, output head, and the loss over the vocabulary.

Under tensor parallelism each rank has a run of the vocabulary's rows, and no rank ever holds all
logits of a token in training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megaswitch.layers.kernels import kernels_of
from megaswitch.layers.norm import at_least_fp32
from megaswitch.layers.parameter import Init, local, parameter
from megaswitch.parallel.collectives import all_gather
from megaswitch.parallel.regions import named
from megaswitch.parallel.tensor_parallel import ALONE, TensorParallel


class Embedding(nn.Module):
    """Rows of `weight` [V, d_model], N(0, 1) at the start as in Mesh-TF."""

    tp: TensorParallel = ALONE

    def __init__(self, vocab_size: int, d_model: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.weight = parameter((vocab_size, d_model), ("tp", None), Init("normal", 1.0))

    @named("vocabulary")
    def forward(self, tokens: Tensor) -> Tensor:
        """Look up tokens [B, L] int64: [B, L, d_model], or [B·L/tp, d_model] of this rank."""
        table = local(self.weight)
        if self.tp.size == 1:
            return F.embedding(tokens, table)
        rows = self.tp.part(self.vocab_size)
        elsewhere = (tokens < rows.start) | (tokens >= rows.stop)
        x = F.embedding((tokens - rows.start).masked_fill(elsewhere, 0), table)
        x = x.masked_fill(elsewhere[..., None], 0.0)
        return self.tp.leave(x, parts=self.tp.sequence and self.training)


# Rows up to which a CPU multiplies table · hiddenᵀ faster than hidden · tableᵀ (measured with MKL:
# ×1.7 for 8 rows, ×1.3 for 32). Decoding has so few.
_FEW_ROWS = 32


def _scores(hidden: Tensor, table: Tensor) -> Tensor:
    """hidden [..., d_model] against every row of `table` [V, d_model]: [..., V]."""
    table = local(table)
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
        """Map hidden [B, L, d_model] to logits [B, L, V], or of this rank's rows."""
        return _scores(hidden, self.weight)


def tied_logits(hidden: Tensor, embedding: Embedding) -> Tensor:
    """Logits through the embedding's table, times d_model^-½ since its entries have unit size."""
    return _scores(hidden * embedding.weight.shape[1] ** -0.5, embedding.weight)


def join_logits(logits: Tensor, vocab_size: int, tp: TensorParallel) -> Tensor:
    """All logits [..., V] from those of this rank's rows; for decoding, without gradient."""
    if tp.size == 1:
        return logits
    length = -(-vocab_size // tp.size)  # of all ranks but the last ones
    padded = F.pad(logits, (0, length - logits.shape[-1])).contiguous()
    parts = all_gather(padded, tp.axis)
    return parts.movedim(0, -2).flatten(-2)[..., :vocab_size]


@dataclass(frozen=True)
class TokenLosses:
    """Sums over the counted target tokens.

    Attributes:
        cross_entropy: scalar, nats.
        log_z_squared: scalar, Σ log²Z of the softmax (T5's logit z-loss before its weight).
        tokens: scalar int64, how many were counted.
        correct: scalar int64, how many had the largest logit.
        by_row: [B], the cross-entropy of each row, without gradient.
    """

    cross_entropy: Tensor
    log_z_squared: Tensor
    tokens: Tensor
    correct: Tensor
    by_row: Tensor


@named("vocabulary")
def token_losses(
    logits: Tensor,
    targets: Tensor,
    mask: Tensor,
    *,
    tp: TensorParallel = ALONE,
    vocab_size: int | None = None,
) -> TokenLosses:
    """Sum the loss of logits against targets [B, L] where `mask` [B, L] is True.

    Args:
        logits: [B, L, V], or [B, L, n] of this rank's rows of the vocabulary.
        targets: [B, L] int64.
        mask: [B, L] bool.
        tp: who has the other rows.
        vocab_size: V; needed if there are others.
    """
    first = tp.part(vocab_size).start if vocab_size else 0
    scores = _TargetScores.apply(logits.flatten(0, -2), targets.flatten(), first, tp)
    log_z, chosen, best = (score.view(targets.shape) for score in scores)
    losses = (log_z - chosen) * mask
    return TokenLosses(
        cross_entropy=losses.sum(),
        log_z_squared=(log_z.square() * mask).sum(),
        tokens=mask.sum(),
        correct=((best == targets) & mask).sum(),
        by_row=losses.detach().sum(1),
    )


class _TargetScores(torch.autograd.Function):
    """log Z of each row of logits [N, V], the logit of its target, and its largest's column: [N].

    The first two are in at least fp32. Step by step under autograd, this would copy the logits half
    a dozen times. Here a few rows at a time go through the cache, and the gradient is the only
    other thing of their size.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, first: int, tp: TensorParallel
    ) -> tuple[Tensor, Tensor, Tensor]:
        blocks = logits.split(rows_in_cache(logits))
        log_z = torch.cat([torch.logsumexp(at_least_fp32(block), -1) for block in blocks])
        if tp.size == 1:
            chosen = at_least_fp32(logits.gather(1, targets[:, None])[:, 0])
            best = logits.argmax(-1)
        else:
            log_z, chosen, best = _over_vocabulary(logits, targets - first, first, log_z, tp)
        ctx.save_for_backward(logits, targets, log_z)
        ctx.first, ctx.divided = first, tp.size > 1
        ctx.mark_non_differentiable(best)
        return log_z, chosen, best

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, log_z_grad: Tensor, chosen_grad: Tensor, _: Tensor
    ) -> tuple[Tensor, None, None, None]:
        logits, targets, log_z = ctx.saved_tensors
        if ctx.divided:
            targets = targets - ctx.first
            elsewhere = (targets < 0) | (targets >= logits.shape[1])
            targets = targets.masked_fill(elsewhere, 0)
            chosen_grad = chosen_grad.masked_fill(elsewhere, 0.0)
        grad = torch.empty_like(logits)
        columns = (targets, log_z, log_z_grad, chosen_grad)
        blocks = (
            t.split(rows_in_cache(logits)) for t in (grad, logits, *(c[:, None] for c in columns))
        )
        for out, block, target, z, z_grad, chosen in zip(*blocks, strict=True):
            softmax = (at_least_fp32(block) - z).exp_()
            softmax.mul_(z_grad).scatter_add_(1, target, chosen)
            out.copy_(softmax)
        return grad, None, None, None


def _over_vocabulary(
    logits: Tensor, targets: Tensor, first: int, log_z: Tensor, tp: TensorParallel
) -> tuple[Tensor, Tensor, Tensor]:
    """Put ranks' runs of the vocabulary together, by one collective of four numbers a row.

    Args:
        logits: [N, n] of this rank's rows.
        targets: [N], counted from this rank's first row.
        first: that row.
        log_z: [N] over this rank's rows.
        tp: the ranks.

    Returns:
        log Z, the target's logit and the largest logit's column, [N] each.
    """
    elsewhere = (targets < 0) | (targets >= logits.shape[1])
    chosen = logits.gather(1, targets.masked_fill(elsewhere, 0)[:, None])[:, 0]
    largest, best = logits.max(-1)
    mine = torch.stack(
        [
            log_z,
            chosen.masked_fill(elsewhere, 0.0).to(log_z.dtype),
            largest.to(log_z.dtype),
            (best + first).to(log_z.dtype),  # exact: fp32 holds any vocabulary's integers
        ]
    )
    log_zs, chosens, largests, bests = all_gather(mine, tp.axis).unbind(1)
    winner = largests.argmax(0, keepdim=True)  # the first of equals, as argmax over all would give
    column = bests.gather(0, winner)[0].long()
    return torch.logsumexp(log_zs, 0), chosens.sum(0), column


def rows_in_cache(logits: Tensor) -> int:
    """How many rows to take at a time: on a CPU about a megabyte of fp32, elsewhere all."""
    fit = (1 << 18) // logits.shape[1] if kernels_of(logits) == "cpu" else len(logits)
    return max(1, fit)
