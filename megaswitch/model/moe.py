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


class SwitchFFN(nn.Module):
    """A mixture of experts in place of a feed-forward network.

    A token's output is its expert's output times the router's probability for it; a token that
    found its expert full, and padding, get zero: the block's residual carries them on.
    """

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
            x: [B, L, d_model].
            mask: [B, L] bool, True on real tokens.
            rows_per_group: R; consecutive rows routed together. A last group may have fewer. None:
                nothing is dropped, and no row depends on another.
            noise: randomness of a training step, or None.

        Returns:
            [B, L, d_model], and the routing with its tokens in groups [G, R·L].
        """
        rows, length, d_model = x.shape
        limited = rows_per_group is not None
        rows_per_group = rows_per_group or rows
        groups = group_tokens(mask, rows_per_group, limited=limited)
        jitter = None
        if noise is not None and self.jitter:
            draws = noise.uniform(self.site, tuple(x.shape))
            jitter = into_groups(1.0 + self.jitter * (2.0 * draws - 1.0), rows_per_group)
        routing = self.router(into_groups(x, rows_per_group), groups, jitter)

        tokens = rows * length
        expert, kept, gate = (
            t.flatten()[:tokens] for t in (routing.expert, routing.kept, routing.gate)
        )
        dispatch = Dispatch.by_expert(expert, kept, self.num_experts)
        y = self.experts(dispatch.gather(x.reshape(tokens, d_model)), dispatch, noise)
        y = dispatch.restore(y) * (gate * kept).to(y.dtype)[:, None]
        return y.view(rows, length, d_model), routing


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
