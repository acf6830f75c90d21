"""The feed-forward networks: one dense, or a stack of experts of the same shape."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from megaswitch.config import ModelConfig
from megaswitch.layers.linear import GroupedLinear, Linear
from megaswitch.layers.noise import Noise, dropout
from megaswitch.layers.parameter import scaled
from megaswitch.model.dispatch import Dispatch


def activate(inner: Tensor, gate: Tensor | None) -> Tensor:
    """ReLU, or GELU of the gate (tanh form, as T5 v1.1) times the inner projection."""
    return F.relu(inner) if gate is None else F.gelu(gate, approximate="tanh") * inner


class FeedForward(nn.Module):
    """wo(dropout(act(wi x))): `wi` for ReLU, `wi_0` (gate) and `wi_1` for gated GELU."""

    def __init__(self, config: ModelConfig, site: str) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.site = site
        self.gated = config.activation == "gated-gelu"
        first = scaled(config.init_scale, config.d_model)
        if self.gated:
            self.wi_0 = Linear(config.d_model, config.d_ff, shard="column", init=first)
            self.wi_1 = Linear(config.d_model, config.d_ff, shard="column", init=first)
        else:
            self.wi = Linear(config.d_model, config.d_ff, shard="column", init=first)
        last = scaled(config.init_scale, config.d_ff)
        self.wo = Linear(config.d_ff, config.d_model, shard="row", init=last)

    def forward(self, x: Tensor, noise: Noise | None) -> Tensor:
        """Map x [B, L, d_model] to the same shape."""
        inner = activate(self.wi_1(x), self.wi_0(x)) if self.gated else activate(self.wi(x), None)
        return self.wo(dropout(inner, self.dropout, self.site, noise))


class Experts(nn.Module):
    """E feed-forward networks over tokens sorted by expert. Weights are [E, out, in]."""

    def __init__(self, config: ModelConfig, site: str) -> None:
        super().__init__()
        moe = config.moe
        self.dropout = config.dropout if moe.expert_dropout is None else moe.expert_dropout
        self.d_ff = config.d_ff
        self.site = site
        self.gated = config.activation == "gated-gelu"
        first = scaled(config.init_scale, config.d_model)
        shape = (moe.num_experts, config.d_model, config.d_ff)
        if self.gated:
            self.wi_0 = GroupedLinear(*shape, shard="column", init=first)
            self.wi_1 = GroupedLinear(*shape, shard="column", init=first)
        else:
            self.wi = GroupedLinear(*shape, shard="column", init=first)
        last = scaled(config.init_scale, config.d_ff)
        shape = (moe.num_experts, config.d_ff, config.d_model)
        self.wo = GroupedLinear(*shape, shard="row", init=last)

    def forward(self, x: Tensor, dispatch: Dispatch, noise: Noise | None) -> Tensor:
        """Map rows x [N, d_model] in `dispatch`'s order to the same shape; dropped rows give 0."""
        ends = dispatch.ends
        if self.gated:
            inner = activate(self.wi_1(x, ends), self.wi_0(x, ends))
        else:
            inner = activate(self.wi(x, ends), None)
        if noise is not None and self.dropout:
            inner = inner * self._dropout_factors(noise, dispatch).to(inner.dtype)
        return self.wo(inner, ends)

    def _dropout_factors(self, noise: Noise, dispatch: Dispatch) -> Tensor:
        """[N, d_ff], drawn by the tokens' places in the batch, not by their expert's rows."""
        rows = len(noise.samples)
        shape = (rows, len(dispatch.order) // rows, self.d_ff)
        keep = noise.uniform(self.site, shape).flatten(0, 1) >= self.dropout
        return keep.index_select(0, dispatch.order) / (1.0 - self.dropout)
