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
from torch.utils._pytree import register_pytree_node

from megaswitch.layers.compiled import region_to_compile
from megaswitch.layers.kernels import as_autocast, kernels_of
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
class LazyLogits:
    """Logits that a loss makes itself, of some tokens at a time: for large vocabularies.

    Attributes:
        hidden: [B, L, d_model], scaled.
        table: [V, d_model], or this rank's rows; both in the type to multiply in.
        rows: tokens at a time.
    """

    hidden: Tensor
    table: Tensor
    rows: int

    @classmethod
    def of(cls, hidden: Tensor, head: Embedding | Head, rows: int) -> LazyLogits:
        """Like `tied_logits`, or like the head's own."""
        if isinstance(head, Embedding):
            hidden = hidden * head.weight.shape[1] ** -0.5
        hidden, table = as_autocast(hidden, local(head.weight))
        return cls(hidden, table, rows)


# FSDP2 finds the tensors of an output only if it is a pytree.
register_pytree_node(
    LazyLogits,
    lambda lazy: ([lazy.hidden, lazy.table], lazy.rows),
    lambda tensors, rows: LazyLogits(*tensors, rows),  # type: ignore[call-arg]
)


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
    logits: Tensor | LazyLogits,
    targets: Tensor,
    mask: Tensor,
    *,
    tp: TensorParallel = ALONE,
    vocab_size: int | None = None,
) -> TokenLosses:
    """Sum the loss of logits against targets [B, L] where `mask` [B, L] is True.

    Args:
        logits: [B, L, V], or [B, L, n] of this rank's rows of the vocabulary; or what they are
            made of.
        targets: [B, L] int64.
        mask: [B, L] bool.
        tp: who has the other rows.
        vocab_size: V; needed if there are others.
    """
    first = tp.part(vocab_size).start if vocab_size else 0
    if isinstance(logits, LazyLogits):
        hidden = logits.hidden.flatten(0, -2)
        scores = _LazyScores.apply(hidden, logits.table, targets.flatten(), first, tp, logits.rows)
    else:
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
        size = rows_in_cache(logits)
        blocks = zip(logits.split(size), targets.split(size), strict=True)
        log_z, chosen, best = _over_vocabulary([_scores_of(*b, first) for b in blocks], tp)
        ctx.save_for_backward(logits, targets, log_z)
        ctx.first = first
        ctx.mark_non_differentiable(best)
        return log_z, chosen, best

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, log_z_grad: Tensor, chosen_grad: Tensor, _: Tensor
    ) -> tuple[Tensor, None, None, None]:
        logits, targets, log_z = ctx.saved_tensors
        grad = torch.empty_like(logits)
        size = rows_in_cache(logits)
        columns = (targets, log_z, log_z_grad, chosen_grad)
        blocks = (t.split(size) for t in (grad, logits, *columns))
        for out, block, target, z, z_grad, chosen in zip(*blocks, strict=True):
            out.copy_(_gradient_of(block, target, z, z_grad, chosen, ctx.first))
        return grad, None, None, None


class _LazyScores(torch.autograd.Function):
    """The same of hidden [N, d] and this rank's rows of the table [n, d].

    Logits exist of some rows at a time, and are made again in the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        table: Tensor,
        targets: Tensor,
        first: int,
        tp: TensorParallel,
        rows: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        blocks = zip(hidden.split(rows), targets.split(rows), strict=True)
        found = [_scores_of(h @ table.t(), target, first) for h, target in blocks]
        log_z, chosen, best = _over_vocabulary(found, tp)
        ctx.save_for_backward(hidden, table, targets, log_z)
        ctx.first, ctx.rows = first, rows
        ctx.mark_non_differentiable(best)
        return log_z, chosen, best

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, log_z_grad: Tensor, chosen_grad: Tensor, _: Tensor
    ) -> tuple[Tensor, Tensor, None, None, None, None]:
        hidden, table, targets, log_z = ctx.saved_tensors
        hidden_grad = torch.empty_like(hidden)
        table_grad = torch.zeros_like(at_least_fp32(table))
        columns = (targets, log_z, log_z_grad, chosen_grad)
        blocks = (t.split(ctx.rows) for t in (hidden_grad, hidden, *columns))
        for out, h, target, z, z_grad, chosen in zip(*blocks, strict=True):
            logits = h @ table.t()
            grad = _gradient_of(logits, target, z, z_grad, chosen, ctx.first).to(logits.dtype)
            torch.mm(grad, table, out=out)
            table_grad += grad.t() @ h
        return hidden_grad, table_grad.to(table.dtype), None, None, None, None


@region_to_compile
def _scores_of(logits: Tensor, targets: Tensor, first: int) -> Tensor:
    """[4, N] in at least fp32, of logits [N, n] of this rank's rows of the vocabulary.

    log Z; the logit of the target, 0 if another rank has it; the largest logit, and its column.
    """
    here, elsewhere = _columns(targets, first, logits.shape[1])
    largest, best = logits.max(-1)
    log_z = torch.logsumexp(at_least_fp32(logits), -1)
    chosen = logits.gather(1, here[:, None])[:, 0].masked_fill(elsewhere, 0.0)
    # Exact: fp32 holds any vocabulary's integers.
    return torch.stack([log_z, *(t.to(log_z.dtype) for t in (chosen, largest, best + first))])


def _columns(targets: Tensor, first: int, size: int) -> tuple[Tensor, Tensor]:
    """Targets counted from this rank's first row, 0 where others have them; and where that is."""
    elsewhere = (targets < first) | (targets >= first + size)
    return (targets - first).masked_fill(elsewhere, 0), elsewhere


def _over_vocabulary(found: list[Tensor], tp: TensorParallel) -> tuple[Tensor, Tensor, Tensor]:
    """Put ranks' runs of the vocabulary together, by one collective of four numbers a row.

    Args:
        found: of `_scores_of`, of runs of rows.
        tp: the ranks.

    Returns:
        log Z, the target's logit and the largest logit's column, [N] each.
    """
    mine = torch.cat(found, 1)
    if tp.size == 1:
        return mine[0], mine[1], mine[3].long()
    log_zs, chosens, largests, bests = all_gather(mine, tp.axis).unbind(1)
    winner = largests.argmax(0, keepdim=True)  # the first of equals, as argmax over all would give
    column = bests.gather(0, winner)[0].long()
    return torch.logsumexp(log_zs, 0), chosens.sum(0), column


@region_to_compile
def _gradient_of(
    logits: Tensor,
    targets: Tensor,
    log_z: Tensor,
    log_z_grad: Tensor,
    chosen_grad: Tensor,
    first: int,
) -> Tensor:
    """Gradient of logits [N, n], in at least fp32, from those of log Z and the target's logit."""
    here, elsewhere = _columns(targets, first, logits.shape[1])
    softmax = (at_least_fp32(logits) - log_z[:, None]).exp_()
    softmax.mul_(log_z_grad[:, None])
    return softmax.scatter_add_(1, here[:, None], chosen_grad.masked_fill(elsewhere, 0.0)[:, None])


def rows_in_cache(logits: Tensor) -> int:
    """How many rows to take at a time, as fp32: on a CPU about a megabyte, elsewhere 256."""
    fit = (1 << (18 if kernels_of(logits) == "cpu" else 26)) // logits.shape[1]
    return max(1, fit)
