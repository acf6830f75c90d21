"""Tokens in routing groups, and the random numbers that routers draw for them.

A group is R whole consecutive rows of one stack; nothing in a group depends on how groups are
spread over micro-batches or ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megaswitch.layers.noise import Noise


@dataclass(frozen=True)
class TokenGroups:
    """The tokens of one stack, in routing groups.

    Attributes:
        exists: [G, S] bool, False on the filler that completes a last group of fewer rows.
        real: [G, S] bool, False on filler and on padding.
        sizes: tokens that exist in each group, known without reading the tensors.
        limited: False where experts take all that come, whatever the capacity mode.
    """

    exists: Tensor
    real: Tensor
    sizes: tuple[int, ...]
    limited: bool = True


def into_groups(x: Tensor, rows_per_group: int) -> Tensor:
    """[B, L, …] as [G, R·L, …], completed with zero rows."""
    missing = -len(x) % rows_per_group
    if missing:
        x = F.pad(x, (0, 0) * (x.ndim - 1) + (0, missing))
    return x.reshape(-1, rows_per_group * x.shape[1], *x.shape[2:])


def group_tokens(mask: Tensor, rows_per_group: int, *, limited: bool = True) -> TokenGroups:
    """The groups of `mask` [B, L] bool (True: real token)."""
    rows, length = mask.shape
    starts = range(0, rows, rows_per_group)
    return TokenGroups(
        exists=into_groups(torch.ones_like(mask), rows_per_group),
        real=into_groups(mask, rows_per_group),
        sizes=tuple(min(rows_per_group, rows - start) * length for start in starts),
        limited=limited,
    )


@dataclass(frozen=True)
class Draws:
    """Uniform draws for the tokens that a router sees: the same under every layout.

    In training they depend on (seed, step, layer, sample, place in the row), in evaluation on the
    layer and the place alone, so that a row's result depends on that row alone.

    Attributes:
        noise: of a training step, or None.
        site: the layer.
        shape: (B, L) of all tokens.
        tokens: those of them that the router sees.
        rows_per_group: R, if it sees them in groups.
        first: place of the row's first token: where decoding has come to.
    """

    noise: Noise | None
    site: str
    shape: torch.Size
    tokens: slice
    rows_per_group: int | None
    first: int = 0

    def uniform(self, name: str, width: int, device: torch.device) -> Tensor:
        """Draws in [0, 1), fp32: [G, S, width], or [n, width] of n tokens not in groups.

        Args:
            name: of what is drawn, appended to the layer's; each has its own stream.
            width: draws of a token.
            device: where they go.
        """
        rows, length = self.shape
        noise = self.noise or Noise(0, 0, torch.zeros(rows, dtype=torch.int64, device=device))
        columns = range(self.first * width, (self.first + 1) * width)
        draws = noise.for_tokens(self.site + name, self.tokens, length, columns, width)
        if self.rows_per_group is None:
            return draws
        return into_groups(draws.view(rows, length, width), self.rows_per_group)
