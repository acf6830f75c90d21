"""Work divided among tensor-parallel ranks: each has a slice of every matrix.

Between the matrices, activations are whole on every rank ([B, L, d]) or, under sequence
parallelism, each rank has a run of the B·L tokens ([B·L/tp, d]). Which of the two a tensor is, its
number of dimensions tells. The model calls `enter` before the first matrix of a pair, whose outputs
are sliced, and `leave` behind the second, whose inputs are: that is all the communication there is.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from megaswitch.parallel.collectives import (
    parts_to_terms,
    parts_to_whole,
    swap_parts,
    terms_to_parts,
    terms_to_whole,
    whole_to_parts,
    whole_to_terms,
)
from megaswitch.parallel.mesh import Axis


@dataclass(frozen=True)
class TensorParallel:
    """The tensor-parallel ranks, as layers see them.

    Attributes:
        axis: the ranks.
        sequence: whether training slices tokens between the matrices.
    """

    axis: Axis = field(default_factory=lambda: Axis("tp"))
    sequence: bool = False

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.axis.size

    def part(self, size: int) -> range:
        """This rank's run of `size` things; runs are even but for the last ones."""
        length = -(-size // self.axis.size)
        start = min(self.axis.rank * length, size)
        return range(start, min(start + length, size))

    def tokens(self, x: Tensor, tokens: int) -> slice:
        """Which of all `tokens` the activations `x` are of."""
        if x.ndim == 3:
            return slice(0, tokens)
        part = self.part(tokens)
        return slice(part.start, part.stop)

    def enter(self, x: Tensor, shape: torch.Size) -> Tensor:
        """Activations for the first matrix of a pair: [B, L, d] of all tokens.

        Args:
            x: [B, L, d], or [B·L/tp, d].
            shape: (B, L).
        """
        if self.size == 1:
            return x
        x = _as_computed(x)
        if x.ndim == 3:
            return whole_to_terms(x, self.axis)
        return parts_to_terms(x, self.axis).view(*shape, -1)

    def leave(self, y: Tensor, *, parts: bool) -> Tensor:
        """The sum of all ranks' results y [B, L, d] of the second matrix.

        Args:
            y: this rank's term.
            parts: whether activations are [B·L/tp, d] here.
        """
        if self.size == 1:
            return y
        if not parts:
            return terms_to_whole(y, self.axis)
        return terms_to_parts(y.flatten(0, 1), self.axis)

    def slice_features(self, x: Tensor) -> Tensor:
        """From activations to all tokens with this rank's features: [B·L, d/tp]."""
        x = _as_computed(x)
        if x.ndim == 3:
            return whole_to_parts(x.flatten(0, 1), self.axis, 1)
        return swap_parts(x, self.axis, split=1, join=0)

    def join_features(self, y: Tensor, *, parts: bool) -> Tensor:
        """The inverse of `slice_features`: [B·L, d], or [B·L/tp, d] if `parts`."""
        if not parts:
            return parts_to_whole(y, self.axis, 1)
        return swap_parts(y, self.axis, split=0, join=1)

    def for_features(self, x: Tensor, *, parts: bool) -> Tensor:
        """Of all tokens, for work in which each rank has some of a token's features.

        Args:
            x: of all tokens; or [B·L/tp, …] of this rank's, if `parts`.
        """
        return parts_to_terms(x, self.axis) if parts else whole_to_terms(x, self.axis)

    def gather_features(self, x: Tensor) -> Tensor:
        """From rows [N, d/tp] to all features, for the first matrix of experts."""
        return parts_to_terms(x, self.axis, 1)

    def scatter_features(self, y: Tensor) -> Tensor:
        """The sum of all ranks' results y [N, d], sliced: [N, d/tp]."""
        return terms_to_parts(y, self.axis, 1)

    def all_tokens(self, x: Tensor) -> Tensor:
        """What was found out about this rank's tokens [B·L/tp], of all; without gradient.

        x of other shapes is of all tokens already.
        """
        return parts_to_whole(x.detach(), self.axis, 0) if x.ndim == 1 else x

    def sum_terms(self, x: Tensor) -> Tensor:
        """Sum, and let every rank go on with the same."""
        return terms_to_whole(x, self.axis)


ALONE = TensorParallel()


def _as_computed(x: Tensor) -> Tensor:
    """`x` in autocast's dtype: the matrices will round it anyway, and so it travels smaller."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x
