"""8-bit floats emulated on any device: numbers are rounded as FP8 would, then multiplied.

A product y = x Wᵀ rounds x and W, and behind it the gradient of y, so that all three products of
forward and backward have rounded factors, as on tensor cores (arXiv 2209.05433). Products of such
numbers are exact in fp32, so what is left out is how a chip adds them up.

A scale stretches numbers to the format's range before they are rounded; what lies outside is
clamped. Where nothing is known of the numbers yet, they are not rounded.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from megaswitch.layers.kernels import Product, Rows, as_autocast
from megaswitch.layers.norm import at_least_fp32

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


class Factor(IntEnum):
    """What is rounded: the two factors of the forward product, and the gradient of its result."""

    INPUT = 0
    WEIGHT = 1
    GRADIENT = 2


class Scaling(Protocol):
    """Where scales come from."""

    def format(self, factor: Factor) -> torch.dtype:
        """E4M3 or E5M2."""
        ...

    def scales(self, factor: Factor, x: Tensor, rows: Rows | None, *, record: bool) -> Tensor:
        """What numbers are multiplied by, broadcastable to x; 0 where they are not rounded.

        Args:
            factor: what x is.
            x: the numbers.
            rows: of experts; their weights are [n, out, in], all else [N, features].
            record: whether training may learn from x for later steps.
        """
        ...


class FP8Kernel:
    """Multiplies numbers rounded to FP8."""

    def __init__(self, scaling: Scaling) -> None:
        self.scaling = scaling

    def __call__(
        self, x: Tensor, weight: Tensor, product: Product, rows: Rows | None = None
    ) -> Tensor:
        """See `Kernel`."""
        x, weight = as_autocast(x, weight)
        record = torch.is_grad_enabled()
        x = _Rounded.apply(x, partial(self._rounded, Factor.INPUT, rows, record))
        weight = _Rounded.apply(weight, partial(self._rounded, Factor.WEIGHT, rows, record))
        y = product(x, weight)
        return _GradientRounded.apply(y, partial(self._rounded, Factor.GRADIENT, rows, True))

    def _rounded(self, factor: Factor, rows: Rows | None, record: bool, x: Tensor) -> Tensor:
        scales = self.scaling.scales(factor, x, rows, record=record)
        return rounded(x, scales, self.scaling.format(factor))


class _Rounded(torch.autograd.Function):
    """Rounds; the gradient passes as if it did not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rounding: Callable[[Tensor], Tensor]) -> Tensor:
        return rounding(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _GradientRounded(torch.autograd.Function):
    """Passes numbers on, and rounds their gradient."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, rounding: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.rounding = rounding
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.rounding(grad), None


def rounded(x: Tensor, scales: Tensor, kind: torch.dtype) -> Tensor:
    """x as the format can hold it.

    Args:
        x: of any floating type, which is kept.
        scales: broadcastable to x; 0: not rounded.
        kind: E4M3 or E5M2.
    """
    largest = torch.finfo(kind).max
    wide = at_least_fp32(x)
    used = torch.where(scales > 0, scales, 1.0)
    # Clamped first: casts of numbers out of range saturate, or give NaN, or infinity, by release.
    stored = (wide * used).clamp(-largest, largest).to(kind)
    return torch.where(scales > 0, stored.to(wide.dtype) / used, wide).to(x.dtype)


def largest_by_expert(x: Tensor, rows: Rows | None) -> Tensor:
    """[n] fp32, the largest magnitude of each expert's numbers; [1] of a dense map's.

    Args:
        x: [N, features] of experts' rows, or their weights [n, out, in]; of a dense map anything.
        rows: None of a dense map.
    """
    magnitude = x.detach().abs().float()
    if rows is None:
        return magnitude.amax()[None] if x.numel() else magnitude.new_zeros(1)
    if x.ndim == 3:
        return magnitude.flatten(1).amax(1)
    experts = len(rows.ends)
    of_row = magnitude.amax(1)
    result = magnitude.new_zeros(experts + 1)  # the last one's are no rows
    return result.scatter_reduce(0, rows.expert(len(x)), of_row, "amax")[:experts]


def spread(by_expert: Tensor, x: Tensor, rows: Rows | None) -> Tensor:
    """`by_expert` [n] as something that broadcasts to x; 0 for rows that are no expert's."""
    if rows is None:
        return by_expert
    if x.ndim == 3:
        return by_expert[:, None, None]
    return F.pad(by_expert, (0, 1))[rows.expert(len(x))][:, None]


def scale_of(largest: Tensor, kind: torch.dtype, margin: int = 0) -> Tensor:
    """From the largest magnitudes to scales, fp32: the format's largest number over it.

    0 where nothing but zeros was seen.
    """
    limit = torch.finfo(torch.float32).max
    scales = (torch.finfo(kind).max / largest / 2.0**margin).clamp(max=limit)
    return torch.where(largest > 0, scales, 0.0)


class Current:
    """Scales of each tensor, or of each expert's rows, as it lies on this rank."""

    def format(self, factor: Factor) -> torch.dtype:
        """Gradients need range, all else digits."""
        return E5M2 if factor == Factor.GRADIENT else E4M3

    def scales(self, factor: Factor, x: Tensor, rows: Rows | None, *, record: bool) -> Tensor:
        """See `Scaling`."""
        return spread(scale_of(largest_by_expert(x, rows), self.format(factor)), x, rows)


class Delayed(Current):
    """Scales from the largest magnitudes of earlier steps, of all ranks and micro-batches.

    Attributes:
        amax: [E, 3, H] fp32 of a stack's experts (a dense map is one) and the three factors. Entry
            0 is being recorded; the others go from the oldest to the newest. (The order is TE's.)
    """

    def __init__(self, amax: Tensor, margin: int) -> None:
        self.amax, self.margin = amax, margin
        self._scales: Tensor | None = None

    def scales(self, factor: Factor, x: Tensor, rows: Rows | None, *, record: bool) -> Tensor:
        """See `Scaling`."""
        first = 0 if rows is None else rows.first
        experts = slice(first, first + (1 if rows is None else len(rows.ends)))
        if record:
            seen = largest_by_expert(x, rows)
            seen = torch.where(seen.isfinite(), seen, 0.0)
            entry = self.amax[experts, factor, 0]
            entry.copy_(torch.maximum(entry, seen))
        if self._scales is None:
            largest = self.amax[..., 1:].amax(-1)
            formats = (self.format(f) for f in Factor)
            columns = [
                scale_of(c, kind, self.margin)
                for c, kind in zip(largest.unbind(1), formats, strict=True)
            ]
            self._scales = torch.stack(columns, 1)
        return spread(self._scales[experts, factor], x, rows)

    def turn(self) -> None:
        """End a step: what was recorded becomes history, and the oldest entry is forgotten."""
        self.amax.copy_(self.amax.roll(-1, -1))
        self.forget()

    def forget(self) -> None:
        """End a step that does not count: what was recorded is gone, and history may change."""
        self.amax[..., 0] = 0.0
        self._scales = None


class Blocks:
    """Scales of small blocks, powers of two, so that large and small numbers do not share one.

    Factors are rounded once, in blocks of features. (A chip rounds anew, in blocks of tokens, for
    the products that sum over tokens.)

    Args:
        size: numbers of a row that have a scale in common.
        square: whether weights are cut in squares, not rows, of that size.
    """

    def __init__(self, size: int, *, square: bool) -> None:
        self.size, self.square = size, square

    def format(self, factor: Factor) -> torch.dtype:
        """With so few numbers to a scale, gradients too have more use for digits than for range."""
        return E4M3

    def scales(self, factor: Factor, x: Tensor, rows: Rows | None, *, record: bool) -> Tensor:
        """See `Scaling`."""
        height = self.size if self.square and factor == Factor.WEIGHT else 1
        largest = x.detach().abs().float()
        for dim, size in ((-1, self.size), (-2, height)):
            if size > 1:
                largest = _largest_of_runs(largest, dim, size)
        _, exponent = torch.frexp(torch.finfo(E4M3).max / largest)
        scales = torch.ldexp(torch.ones_like(largest), (exponent - 1).clamp(max=126))
        return torch.where(largest > 0, scales, 0.0)


def _largest_of_runs(x: Tensor, dim: int, size: int) -> Tensor:
    """Each number replaced by the largest of its run along `dim`, which is -1 or -2; x ≥ 0."""
    length = x.shape[dim]
    padded = F.pad(x, (*(0, 0) * (-dim - 1), 0, -length % size))
    runs = padded.unflatten(dim, (-1, size))
    largest = runs.amax(dim, keepdim=True).expand_as(runs)
    return largest.flatten(dim - 1, dim).narrow(dim, 0, length)
