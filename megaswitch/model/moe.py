"""The Switch layer: route → dispatch → experts → combine (paper §2.1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megaswitch.config import ModelConfig
from megaswitch.layers.noise import Noise
from megaswitch.model.dispatch import Dispatch
from megaswitch.model.ffn import Experts
from megaswitch.model.router import Routing, SwitchRouter, TokenGroups
from megaswitch.parallel.tensor_parallel import ALONE, TensorParallel


class SwitchFFN(nn.Module):
    """A mixture of experts in place of a feed-forward network.

    A token's output is its expert's output times the router's probability for it; a token that
    found its expert full, and padding, get zero: the block's residual carries them on.
    """

    tp: TensorParallel = ALONE

    def __init__(self, config: ModelConfig, site: str) -> None:
        super().__init__()
        self.site = site
        self.jitter = config.moe.jitter
        self.num_experts = config.moe.num_experts
        self.router = SwitchRouter(config)
        self.experts = Experts(config, f"{site}.experts")

    def forward(
        self, x: Tensor, mask: Tensor, rows_per_group: int | None, noise: Noise | None
    ) -> tuple[Tensor, Routing]:
        """Apply the layer.

        Args:
            x: [B, L, d_model], or [B·L/tp, d_model] of this rank's tokens.
            mask: [B, L] bool, True on real tokens.
            rows_per_group: R; consecutive rows routed together. A last group may have fewer. None:
                nothing is dropped, and no row depends on another.
            noise: randomness of a training step, or None.

        Returns:
            like x, and the routing with its tokens in groups [G, R·L].
        """
        limited = rows_per_group is not None
        rows_per_group = rows_per_group or len(mask)
        groups = group_tokens(mask, rows_per_group, limited=limited)
        parts = x.ndim == 2
        jitter = self._jitter_factors(x, mask.shape[1], noise)
        if not parts:
            jitter = None if jitter is None else into_groups(jitter, rows_per_group)
        routing = self.router(x if parts else into_groups(x, rows_per_group), groups, jitter)

        tokens = mask.numel()
        expert, kept = (t.flatten()[:tokens] for t in (routing.expert, routing.kept))
        labels = self.experts.ep.relabel(expert, self.num_experts)
        dispatch = Dispatch.by_expert(labels, kept, self.num_experts)
        if self.experts.ep.size == 1:
            rows = self.tp.enter(x, mask.shape).reshape(tokens, -1)
            y = dispatch.restore(self.experts(dispatch.gather(rows), dispatch, None, noise))
            y = self.tp.leave(y.view(*mask.shape, -1), parts=parts)
        else:
            rows = self.tp.slice_features(x)
            y = dispatch.restore(
                self.experts(dispatch.gather(rows), dispatch, routing.slots, noise)
            )
            y = self.tp.join_features(y, parts=parts)
        own = self.tp.tokens(x, tokens)
        gate = routing.gate.flatten() if parts else routing.gate.flatten()[:tokens]
        weight = (gate * kept[own]).to(y.dtype)
        return y.view(x.shape) * weight.view(*x.shape[:-1], 1), routing

    def _jitter_factors(self, x: Tensor, length: int, noise: Noise | None) -> Tensor | None:
        """Factors for the router's input, like x; or None."""
        if noise is None or not self.jitter:
            return None
        width = x.shape[-1]
        tokens = self.tp.tokens(x, len(noise.samples) * length)
        draws = noise.for_tokens(self.site, tokens, length, range(width), width)
        return (1.0 + self.jitter * (2.0 * draws - 1.0)).view(x.shape)


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
