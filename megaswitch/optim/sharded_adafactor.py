"""Adafactor's update of parameters that ranks divide among them.

A mean over a divided dimension is the sum over its ranks of local mean × share of the elements, so
blocks may be uneven or empty. Three rounds of sums make the whole step, whatever the number of
parameters:

1. mean squared gradients of rows and columns, and the mean square of W;
2. the mean over all rows;
3. the mean square of U.

In each round every group of ranks that divides some parameter makes one all-reduce.

The price is that gradients are read three times, where the update of a whole parameter that fits
the work memory reads them once: U is measured in the third round and computed again to be applied,
so that it never has to be kept. What is kept between the rounds is as small as the moments of a
factored matrix.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor

from megaswitch.optim.adafactor_math import (
    Buffers,
    Slices,
    apply_update,
    mean_of_rows,
    mean_square,
    remember,
    row_factor_of,
    scratch_like,
)
from megaswitch.optim.piles import Pile
from megaswitch.parallel.mesh import Axis

# A summand, and the axes over whose ranks it is to be summed, in place.
Term = tuple[Tensor, tuple[Axis, ...]]


def update_together(updates: Sequence[ShardedUpdate]) -> None:
    """Update all these parameters; every rank passes its blocks in the same order."""
    sum_terms(chain.from_iterable([update.measure_gradient() for update in updates]))
    sum_terms(chain.from_iterable([update.measure_rows() for update in updates]))
    sum_terms(chain.from_iterable([update.measure_update() for update in updates]))
    for update in updates:
        update.apply()


def sum_terms(terms: Iterable[Term]) -> None:
    """Sum each tensor, in place, over its axes, with one all-reduce for each group and dtype.

    Groups are taken in the order in which the terms first name them. Ranks of one group see the
    same terms, so none waits for another in a different collective.
    """
    batches: dict[tuple[dist.ProcessGroup, torch.dtype], list[Tensor]] = {}
    for tensor, axes in terms:
        for axis in axes:
            assert axis.group is not None, f"axis {axis.name} of {axis.size} ranks has no group"
            batches.setdefault((axis.group, tensor.dtype), []).append(tensor)
    for (group, _), batch in batches.items():
        flat = torch.cat([tensor.flatten() for tensor in batch])
        dist.all_reduce(flat, group=group)
        for tensor, total in zip(batch, flat.split([t.numel() for t in batch]), strict=True):
            tensor.copy_(total.view_as(tensor))


class ShardedUpdate:
    """One step of divided parameters that lie alike, cut where ranks must sum what they measured.

    Each method but the last returns the terms to be summed before the next one is called.

    Args:
        pile: this rank's blocks; the step is counted at once.
        buffers: where work memory is taken from and left.
    """

    _row_square: Tensor
    _column_square: Tensor
    _weight_square: Tensor
    _update_square: Tensor
    _row: Tensor
    _row_mean: Tensor
    _row_factor: Tensor

    def __init__(self, pile: Pile, buffers: Buffers) -> None:
        missing = any(p.grad is None for p in pile.parameters)
        assert not missing, "all ranks of a divided parameter need its gradient"
        self._pile = pile
        self._buffers = buffers
        self._block = pile.block
        self._beta2 = pile.advance()
        # Dimensions over which RMS(U) and RMS(W) are taken.
        batched = pile.is_expert and not pile.joint
        self._scaled_dims = range(1 if batched else 0, len(self._block.shape))

    def measure_gradient(self) -> list[Term]:
        """Mean squares of the gradient's rows and columns and of W; a moment is complete here."""
        squares: list[tuple[Tensor, ...]] = []
        weights: list[Tensor] = []
        everything = self._pile.slices()
        for _, chunk, scratch in self._chunks(everything):
            square = chunk.mean_squares(scratch)
            if chunk.moment is None:
                squares.append(square)
            else:
                remember(chunk.moments(), square, self._beta2, self._pile.group["epsilon1"])
            weights.append(mean_square(chunk.parameter, scratch.dtype))
        self._pile.store(moment=everything.moment)
        self._weight_square, term = self._scale_term(weights)
        if not squares:
            return [term]
        self._row_square, self._column_square = map(torch.cat, zip(*squares, strict=True))
        return [term, self._term(self._row_square, [-1]), self._term(self._column_square, [-2])]

    def measure_rows(self) -> list[Term]:
        """Complete row and column; the mean over all rows."""
        row, column = self._pile.joined("row"), self._pile.joined("column")
        if row is None or column is None:
            return []
        self._row, column = row.view_as(self._row_square), column.view_as(self._column_square)
        squares = self._row_square, self._column_square
        remember((self._row, column), squares, self._beta2, self._pile.group["epsilon1"])
        self._pile.store(row=self._row, column=column)
        self._row_mean = mean_of_rows(self._row)
        return [self._term(self._row_mean, [-2])]

    def measure_update(self) -> list[Term]:
        """Mean square of U."""
        everything = self._pile.slices()
        if everything.row is not None:
            self._row_factor = row_factor_of(self._row, self._row_mean)
        squares: list[Tensor] = []
        for run, chunk, scratch in self._chunks(everything):
            chunk.precondition(scratch)
            squares.append(mean_square(scratch, scratch.dtype, self._factor(run, chunk)))
        self._update_square, term = self._scale_term(squares)
        return [term]

    def apply(self) -> None:
        """Compute U again and subtract it."""
        everything = self._pile.slices()
        for run, chunk, scratch in self._chunks(everything):
            chunk.precondition(scratch)
            run_or_all = slice(None) if self._pile.joint else run
            apply_update(
                chunk,
                self._pile.group,
                scratch,
                self._factor(run, chunk),
                self._update_square[run_or_all],
                self._weight_square[run_or_all],
            )
        self._pile.store(parameter=everything.parameter)

    def _chunks(self, everything: Slices) -> Iterator[tuple[slice, Slices, Tensor]]:
        """Each run of slices and its work memory."""
        for run, chunk in everything.chunks():
            yield run, chunk, scratch_like(chunk.gradient, self._buffers)

    def _factor(self, run: slice, chunk: Slices) -> Tensor:
        return chunk.ones() if chunk.row is None else self._row_factor[run]

    def _scale_term(self, squares: list[Tensor]) -> tuple[Tensor, Term]:
        """From mean squares of each local slice to those of the global slices or, joint, of all."""
        square = torch.cat(squares)
        if self._pile.joint:
            square = square.mean(dim=0, keepdim=True)
        return square, self._term(square, self._scaled_dims)

    def _term(self, mean: Tensor, dims: Iterable[int]) -> Term:
        """Make `mean`, taken over the local part of `dims`, a term of the mean over all of them."""
        dims = list(dims)
        local = math.prod(self._block.sizes[dim] for dim in dims)
        total = math.prod(self._block.shape[dim] for dim in dims)
        if local:
            mean.mul_(local / total)
        else:
            mean.zero_()  # the mean of nothing is not a number
        return mean, tuple(axis for dim in dims for axis in self._block.axes[dim])
