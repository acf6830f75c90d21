"""The arithmetic of Adafactor over what one process holds, in pieces that fit the caches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megaswitch.layers.kernels import kernels_of

# Bytes of work memory. On a CPU, a step over a big stack is bound by page faults on fresh memory
# and by cache misses, so the stack is walked in pieces that stay in the last-level cache. On a GPU
# the allocator caches and only the number of kernel launches matters.
_SCRATCH_BYTES_CPU = 8 << 20
_SCRATCH_BYTES_ACCELERATOR = 256 << 20

Buffers = dict[tuple[torch.device, torch.dtype], Tensor]


def slices_at_once(size: int, kernels: str) -> int:
    """How many slices of so many bytes are updated together, by "cpu" or "cuda" kernels."""
    limit = _SCRATCH_BYTES_CPU if kernels == "cpu" else _SCRATCH_BYTES_ACCELERATOR
    return max(1, limit // max(1, size))


@dataclass(frozen=True)
class Slices:
    """Parameters of one shape, with what belongs to them, stacked along dimension 0.

    A stacked expert parameter has one slice per expert, any other parameter has one slice. Of a
    parameter that ranks divide these are the local parts, which may be empty.

    Attributes:
        parameter: [slices, rows, columns].
        gradient: [slices, rows, columns], in the dtype of the moments.
        row: [slices, rows], mean squared gradient of each row, if factored.
        column: [slices, columns], mean squared gradient of each column, if factored.
        moment: [slices, rows, columns], mean squared gradient, if not factored.
    """

    parameter: Tensor
    gradient: Tensor
    row: Tensor | None
    column: Tensor | None
    moment: Tensor | None

    def chunks(self) -> Iterator[tuple[slice, Slices]]:
        """Runs of whole slices that fit the work memory, at least one slice each; and where."""
        count, rows, columns = self.parameter.shape
        size = self.gradient.element_size() * rows * columns
        length = slices_at_once(size, kernels_of(self.parameter))
        for start in range(0, max(1, count), length):
            run = slice(start, start + length)
            yield (
                run,
                Slices(
                    self.parameter[run],
                    self.gradient[run],
                    None if self.row is None else self.row[run],
                    None if self.column is None else self.column[run],
                    None if self.moment is None else self.moment[run],
                ),
            )

    def ones(self) -> Tensor:
        """A factor of 1 for each slice, [slices, 1, 1]."""
        return self.gradient.new_ones(len(self.gradient), 1, 1)

    def mean_squares(self, scratch: Tensor) -> tuple[Tensor, ...]:
        """The squared gradient, averaged as the moments are: over columns and rows, or not at all.

        Args:
            scratch: [slices, rows, columns], overwritten; it is the result if not factored.
        """
        torch.mul(self.gradient, self.gradient, out=scratch)
        if self.moment is not None:
            return (scratch,)
        return scratch.mean(dim=-1), scratch.mean(dim=-2)

    def moments(self) -> tuple[Tensor, ...]:
        """Row and column, or the moment."""
        if self.moment is not None:
            return (self.moment,)
        assert self.row is not None
        assert self.column is not None
        return self.row, self.column

    def precondition(self, scratch: Tensor) -> None:
        """Leave U, the gradient over root second moment, in `scratch`, but for its row factor.

        The row factor stays apart so that it can be multiplied with the other scales of the step
        while it is small: that saves a pass over the whole parameter.

        Args:
            scratch: [slices, rows, columns], overwritten.
        """
        if self.moment is not None:
            torch.rsqrt(self.moment, out=scratch).mul_(self.gradient)
        else:
            assert self.column is not None
            torch.mul(self.gradient, self.column.rsqrt().unsqueeze(-2), out=scratch)


def remember(
    moments: tuple[Tensor, ...], squares: tuple[Tensor, ...], beta2: float, epsilon1: float
) -> None:
    """Move each moment towards its mean squares, which are overwritten."""
    for moment, square in zip(moments, squares, strict=True):
        moment.lerp_(square.add_(epsilon1), 1.0 - beta2)


def mean_of_rows(row: Tensor) -> Tensor:
    """Mean over the rows of each slice, [slices, 1].

    Mean-square gradients factor as row × column / mean; it is taken once, with the rows.
    """
    return row.mean(dim=-1, keepdim=True)


def row_factor_of(row: Tensor, mean: Tensor) -> Tensor:
    """What `Slices.precondition` leaves out of U, [slices, rows, 1]; it is 1 if not factored."""
    return (row / mean).rsqrt_().unsqueeze(-1)


def mean_square(matrix: Tensor, dtype: torch.dtype, row_factor: Tensor | None = None) -> Tensor:
    """Mean square of `matrix * row_factor` for each slice, shape [slices].

    Row norms come first because torch splits a reduction to a single number among threads, but
    never a row: a slice then has the same sum alone and in a stack.
    """
    norms = torch.linalg.vector_norm(matrix, dim=-1, dtype=dtype)
    if row_factor is not None:
        norms.mul_(row_factor.squeeze(-1))
    return norms.square_().mean(dim=-1).div_(matrix.shape[-1])


def apply_update(
    chunk: Slices,
    group: dict[str, Any],
    scratch: Tensor,
    row_factor: Tensor,
    update_square: Tensor,
    weight_square: Tensor,
) -> None:
    """Decay, clip, scale and subtract U.

    Args:
        chunk: what to update; only its parameter is touched.
        group: the parameter group.
        scratch: [slices, rows, columns], U without its row factor.
        row_factor: [slices, rows or 1, 1].
        update_square: mean square of U, [slices] or [1].
        weight_square: mean square of the parameter, [slices] or [1].
    """
    scale = group["lr"] / (update_square.sqrt() / group["clip_threshold"]).clamp_(min=1.0)
    if group["scale_by_parameter"]:
        scale *= weight_square.sqrt().clamp_(min=group["epsilon2"])
    if group["weight_decay"] != 0.0:
        chunk.parameter.mul_(1.0 - group["lr"] * group["weight_decay"])
    chunk.parameter.addcmul_(scratch, row_factor * scale.view(-1, 1, 1), value=-1.0)


def scratch_like(like: Tensor, buffers: Buffers) -> Tensor:
    """Uninitialised memory shaped as `like`, kept in `buffers` so that it is faulted in once."""
    key = (like.device, like.dtype)
    if key not in buffers or buffers[key].numel() < like.numel():
        buffers[key] = like.new_empty(like.numel())
    return buffers[key][: like.numel()].view(like.shape)
