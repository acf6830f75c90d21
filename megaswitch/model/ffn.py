"""The dense feed-forward network."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from megaswitch.config import ModelConfig
from megaswitch.layers.compiled import region_to_compile
from megaswitch.layers.linear import Linear
from megaswitch.layers.noise import Noise, drop
from megaswitch.layers.parameter import scaled
from megaswitch.parallel.regions import named
from megaswitch.parallel.tensor_parallel import ALONE, TensorParallel


@region_to_compile
def activate(inner: Tensor, gate: Tensor | None) -> Tensor:
    """ReLU, or GELU of the gate (tanh form, as T5 v1.1) times the inner projection."""
    return F.relu(inner) if gate is None else F.gelu(gate, approximate="tanh") * inner


class FeedForward(nn.Module):
    """wo(dropout(act(wi x))): `wi` for ReLU, `wi_0` (gate) and `wi_1` for gated GELU.

    A tensor-parallel rank has some of the d_ff hidden units, and gives its term of the output.
    """

    tp: TensorParallel = ALONE

    def __init__(self, config: ModelConfig, site: str) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.d_ff = config.d_ff
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

    @named("dense FFN")
    def forward(self, x: Tensor, noise: Noise | None) -> Tensor:
        """Map x [B, L, d_model] to the same shape."""
        inner = activate(self.wi_1(x), self.wi_0(x)) if self.gated else activate(self.wi(x), None)
        if noise is not None and self.dropout:
            rows, length, _ = inner.shape
            columns = self.tp.part(self.d_ff)
            tokens = slice(0, rows * length)
            draws = noise.for_tokens(self.site, tokens, length, columns, self.d_ff)
            inner = drop(inner, draws, self.dropout)
        return self.wo(inner)
