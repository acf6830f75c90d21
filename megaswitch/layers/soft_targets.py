"""Cross-entropy against a teacher's distribution over the vocabulary (paper §4.2).

Both models' logits are divided by a temperature T first. Source: Hinton et al. 2015, and Mesh-TF's
`StudentTeacher`. Under tensor parallelism each rank has a run of the vocabulary's rows, of both
models, and a few numbers per target are all that ranks tell each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megaswitch.layers.norm import at_least_fp32
from megaswitch.layers.vocab import rows_in_cache
from megaswitch.parallel.collectives import all_gather
from megaswitch.parallel.tensor_parallel import ALONE, TensorParallel


@dataclass(frozen=True)
class TopK:
    """A teacher's likeliest tokens at each target, and what it leaves to all others.

    Attributes:
        tokens: [B, L, k] int64, of the whole vocabulary, different within a target.
        probabilities: [B, L, k], softmax(logits / T) of these.
        rest: [B, L], the probability of all other tokens together.
    """

    tokens: Tensor
    probabilities: Tensor
    rest: Tensor

    def to(self, device: torch.device) -> TopK:
        """The same on another device."""
        return TopK(*(t.to(device) for t in (self.tokens, self.probabilities, self.rest)))


@dataclass(frozen=True)
class SoftLosses:
    """Sums over the counted targets, in nats.

    Attributes:
        cross_entropy: scalar, of the student against the teacher; its least value is `entropy`.
        entropy: scalar, of the teacher, without gradient.
    """

    cross_entropy: Tensor
    entropy: Tensor


def soft_losses(
    logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor,
    *,
    temperature: float,
    tp: TensorParallel = ALONE,
) -> SoftLosses:
    """Sum -Σ q log p over the targets where `mask` [B, L] is True.

    Args:
        logits: of the student [B, L, V], or [B, L, n] of this rank's rows of the vocabulary.
        teacher_logits: likewise; they get no gradient.
        mask: [B, L] bool.
        temperature: T.
        tp: who has the other rows.
    """
    flat = logits.flatten(0, -2), teacher_logits.detach().flatten(0, -2)
    losses, entropies = _SoftScores.apply(*flat, 1.0 / temperature, tp)
    counted = mask.flatten()
    return SoftLosses((losses * counted).sum(), (entropies * counted).sum())


def top_k_losses(
    logits: Tensor,
    teacher: TopK,
    mask: Tensor,
    *,
    temperature: float,
    vocab_size: int,
    tp: TensorParallel = ALONE,
) -> SoftLosses:
    """`soft_losses` where only a teacher's likeliest tokens are known.

    All other tokens count as one outcome, whose probabilities are the teacher's `rest` and the
    student's sum over them: -Σ_k q_k log p_k - q_rest log p_rest. It is least where the student
    agrees with all that is known, and never more than the full loss; among the rest the student
    stays as it is. With k = V it is the full loss.

    Args:
        logits: of the student [B, L, V], or [B, L, n] of this rank's rows of the vocabulary.
        teacher: of the same targets.
        mask: [B, L] bool.
        temperature: T, which the teacher's probabilities were taken at.
        vocab_size: V.
        tp: who has the other rows.
    """
    first = tp.part(vocab_size).start
    tokens, probabilities = teacher.tokens.flatten(0, -2), teacher.probabilities.flatten(0, -2)
    rest = teacher.rest.flatten()
    losses = _TopKScores.apply(
        logits.flatten(0, -2), tokens - first, probabilities, rest, 1.0 / temperature, tp
    )
    entropies = torch.special.entr(probabilities).sum(-1) + torch.special.entr(rest)
    counted = mask.flatten()
    return SoftLosses((losses * counted).sum(), (entropies * counted).sum())


def top_k(
    logits: Tensor, k: int, *, temperature: float, vocab_size: int, tp: TensorParallel = ALONE
) -> TopK:
    """The k likeliest tokens of logits [B, L, V], or [B, L, n] of this rank's rows; no gradient."""
    scaled = at_least_fp32(logits.detach()) / temperature
    best, columns = scaled.topk(min(k, scaled.shape[-1]), -1)
    tokens = columns + tp.part(vocab_size).start
    log_z = scaled.logsumexp(-1)
    if tp.size > 1:
        missing = k - best.shape[-1]
        best = torch.nn.functional.pad(best, (0, missing), value=-torch.inf)
        tokens = torch.nn.functional.pad(tokens, (0, missing))
        log_z = all_gather(log_z, tp.axis).logsumexp(0)
        candidates = all_gather(best, tp.axis).movedim(0, -2).flatten(-2)
        best, chosen = candidates.topk(k, -1)
        tokens = all_gather(tokens, tp.axis).movedim(0, -2).flatten(-2).gather(-1, chosen)
    probabilities = (best - log_z[..., None]).exp()
    rest = (1.0 - probabilities.sum(-1)).clamp(min=0.0)
    return TopK(tokens, probabilities, torch.zeros_like(rest) if k == vocab_size else rest)


class _SoftScores(torch.autograd.Function):
    """Cross-entropy and the teacher's entropy of each row [N] of two models' logits [N, V].

    As in `vocab.py`, a few rows at a time go through the cache, and the gradient is the only other
    thing of the logits' size.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, teacher: Tensor, inverse: float, tp: TensorParallel
    ) -> tuple[Tensor, Tensor]:
        parts = []
        for student, other in _blocks(logits, teacher):
            s, t = at_least_fp32(student) * inverse, at_least_fp32(other) * inverse
            own_z = t.logsumexp(-1)
            q = (t - own_z[:, None]).exp_()
            dots = (q * s).sum(-1), (q * t).sum(-1)
            parts.append(torch.stack([s.logsumexp(-1), own_z, *dots]))
        log_z, teacher_z, cross, own = torch.cat(parts, 1)
        if tp.size > 1:
            mine = torch.stack([log_z, teacher_z, cross, own])
            log_zs, teacher_zs, crosses, owns = all_gather(mine, tp.axis).unbind(1)
            log_z, teacher_z = log_zs.logsumexp(0), teacher_zs.logsumexp(0)
            share = (teacher_zs - teacher_z).exp()  # of the teacher's probability, by rank
            cross, own = (share * crosses).sum(0), (share * owns).sum(0)
        ctx.save_for_backward(logits, teacher, log_z, teacher_z)
        ctx.inverse = inverse
        entropy = teacher_z - own
        ctx.mark_non_differentiable(entropy)
        return log_z - cross, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
        logits, teacher, log_z, teacher_z = ctx.saved_tensors
        grad = torch.empty_like(logits)
        columns = (c[:, None] for c in (log_z, teacher_z, upstream * ctx.inverse))
        for out, student, other, z, own_z, scale in _blocks(grad, logits, teacher, *columns):
            p = (at_least_fp32(student) * ctx.inverse - z).exp_()
            q = (at_least_fp32(other) * ctx.inverse - own_z).exp_()
            out.copy_(p.sub_(q).mul_(scale))
        return grad, None, None, None


class _TopKScores(torch.autograd.Function):
    """Likewise where the teacher's k likeliest tokens [N, k] and the rest [N] are known.

    Tokens are counted from this rank's first row of the vocabulary.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        tokens: Tensor,
        probabilities: Tensor,
        rest: Tensor,
        inverse: float,
        tp: TensorParallel,
    ) -> Tensor:
        parts = []
        for block, known, q in _blocks(logits, tokens, probabilities):
            s = at_least_fp32(block) * inverse
            inside, column = _inside(known, s.shape[1])
            dot = (s.gather(1, column) * q * inside).sum(-1)
            others = s.masked_fill(_named(inside, known, s.shape[1]), -torch.inf)
            parts.append(torch.stack([s.logsumexp(-1), others.logsumexp(-1), dot]))
        log_z, log_rest, dot = torch.cat(parts, 1)
        if tp.size > 1:
            mine = torch.stack([log_z, log_rest, dot])
            log_zs, log_rests, dots = all_gather(mine, tp.axis).unbind(1)
            log_z, log_rest, dot = log_zs.logsumexp(0), log_rests.logsumexp(0), dots.sum(0)
        ctx.save_for_backward(logits, tokens, probabilities, rest, log_z, log_rest)
        ctx.inverse = inverse
        left = torch.where(rest > 0, rest * log_rest, 0.0)  # nothing may be left: 0 · -∞
        total = probabilities.sum(-1) + rest  # 1, but for the rounding of what was stored
        return total * log_z - dot - left

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        logits, tokens, probabilities, rest, log_z, log_rest = ctx.saved_tensors
        grad = torch.empty_like(logits)
        total = probabilities.sum(-1) + rest
        columns = (c[:, None] for c in (rest, log_z, log_rest, total, upstream * ctx.inverse))
        rows = _blocks(grad, logits, tokens, probabilities, *columns)
        for out, block, known, q, left, z, rest_z, whole, scale in rows:
            s = at_least_fp32(block) * ctx.inverse
            inside, column = _inside(known, s.shape[1])
            named = _named(inside, known, s.shape[1])
            wanted = torch.where(left > 0, left * (s - rest_z).exp(), 0.0).masked_fill_(named, 0.0)
            wanted.scatter_add_(1, column, (q * inside).to(wanted.dtype))
            out.copy_((s - z).exp_().mul_(whole).sub_(wanted).mul_(scale))
        return grad, None, None, None, None, None


def _inside(tokens: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Which tokens [N, k] are of this rank's columns, and their columns; 0 for the others."""
    inside = (tokens >= 0) & (tokens < columns)
    return inside, tokens.masked_fill(~inside, 0)


def _named(inside: Tensor, tokens: Tensor, columns: int) -> Tensor:
    """[N, V] bool: columns that are among the tokens [N, k]."""
    spare = tokens.masked_fill(~inside, columns)  # a column more, for those of other ranks
    marks = torch.zeros(len(tokens), columns + 1, dtype=torch.bool, device=tokens.device)
    return marks.scatter_(1, spare, True)[:, :columns]


def _blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """A few rows of all tensors at a time, as fit into a CPU's cache; the first is of logits."""
    rows = rows_in_cache(tensors[0])
    return zip(*(tensor.split(rows) for tensor in tensors), strict=True)
