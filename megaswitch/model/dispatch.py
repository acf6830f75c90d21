"""Bringing tokens together by expert, and back.

Rows are sorted by expert: first what is kept, the rest behind. Where each token has one expert that
is a permutation of tokens; else of pairs of token and expert. Shapes are static and nothing is read
by the host.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megaswitch.layers.triton_kernels import permute_rows, restore_times_gate, sort_by_expert


def _inverse(order: Tensor) -> Tensor:
    """The inverse of a permutation [N] int64."""
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    return inverse


def _segment_starts(sorted_keys: Tensor, num_keys: int) -> Tensor:
    """[num_keys] where each key's run starts in `sorted_keys`."""
    keys = torch.arange(num_keys, device=sorted_keys.device)
    return torch.searchsorted(sorted_keys, keys)


def queue_positions(expert: Tensor, candidates: Tensor, num_experts: int) -> Tensor:
    """Each token's place, from 0, among the candidates of its group and expert, in token order.

    Args:
        expert: [G, S] int64.
        candidates: [G, S] bool; the place of a token that is none means nothing.

    Returns:
        [G, S] int64.
    """
    num_groups = len(expert)
    group = torch.arange(num_groups, device=expert.device)[:, None]
    # Non-candidates go to a queue of their own, so that they take nobody's place.
    num_queues = num_groups * num_experts
    queue = torch.where(candidates, group * num_experts + expert, num_queues).flatten()
    sorted_queue, order = torch.sort(queue, stable=True)
    starts = _segment_starts(sorted_queue, num_queues + 1)
    ranks = torch.arange(len(queue), device=queue.device) - starts[sorted_queue]
    return ranks[_inverse(order)].view(expert.shape)


@dataclass(frozen=True)
class Dispatch:
    """A permutation of N tokens, or of pairs of a token and an expert, sorted by expert.

    Attributes:
        order: [R] int64, the token or pair at each sorted row; R = N for tokens.
        inverse: [N] int64, the sorted row of each token or pair.
        ends: [E] int32, rows of experts 0 … e; rows past ends[-1] were dropped.
        token: [R] int64, the token of each row where rows are of pairs, else None.
        fused: whether Triton's kernels sort and move rows.
    """

    order: Tensor
    inverse: Tensor
    ends: Tensor
    token: Tensor | None = None
    fused: bool = False

    @classmethod
    def by_expert(
        cls, expert: Tensor, kept: Tensor, num_experts: int, *, fused: bool = False
    ) -> Dispatch:
        """Sort tokens by `expert` (any shape, int64) where `kept` (bool) holds."""
        key = torch.where(kept, expert, num_experts).flatten()
        if fused:
            return cls(*sort_by_expert(key, num_experts), fused=True)
        sorted_key, order = torch.sort(key, stable=True)
        ends = _segment_starts(sorted_key, num_experts + 1)[1:]
        return cls(order=order, inverse=_inverse(order), ends=ends.int())

    def of_pairs(self, token: Tensor, most: int | None) -> Dispatch:
        """The same of pairs.

        Args:
            token: [N] int64, of each pair.
            most: rows that can be kept at all, if that is known; others need not be moved.
        """
        order = self.order[:most]
        return replace(self, order=order, token=token[order])

    def counts(self) -> Tensor:
        """[E] int64, rows of each expert."""
        ends = self.ends.long()
        return torch.diff(ends, prepend=ends.new_zeros(1))

    def gather(self, x: Tensor) -> Tensor:
        """Token rows x [N, d] in expert order."""
        if self.token is not None:
            return x.index_select(0, self.token)
        if self.fused:
            return permute_rows(x, self.order, self.inverse)
        return _Permute.apply(x, self.order, self.inverse)

    def restore(self, y: Tensor) -> Tensor:
        """Rows y [N, d] in expert order back in token order."""
        assert self.token is None, "a token may have several rows; combine them"
        return _Permute.apply(y, self.inverse, self.order)

    def restore_times(self, y: Tensor, weight: Tensor) -> Tensor:
        """Rows y [N, d] back in token order, times weight [N] of tokens, by one kernel."""
        assert self.token is None
        assert self.fused
        return restore_times_gate(y, weight, self.order, self.inverse)

    def combine(self, y: Tensor, weight: Tensor, tokens: int) -> Tensor:
        """Each token's sum of its rows times their weights: [tokens, d].

        The sum of two is the same in any order; of more, on CUDA, it may round differently in every
        run.

        Args:
            y: [R, d] in expert order.
            weight: of each token or pair, in their order.
            tokens: how many there are.
        """
        if self.token is None:
            return self.restore(y) * weight[:, None]
        rows = y * weight[self.order, None]
        return rows.new_zeros(tokens, rows.shape[1]).index_add(0, self.token, rows)


class _Permute(torch.autograd.Function):
    """x[order], whose backward gathers by the inverse where autograd would scatter-add."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None
