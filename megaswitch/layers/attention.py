"""T5 attention: no 1/√d scale (it is in q's initialisation), relative-position bias, no biases."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megaswitch.layers.compiled import region_to_compile
from megaswitch.layers.linear import Linear
from megaswitch.layers.noise import Noise, drop
from megaswitch.layers.norm import at_least_fp32
from megaswitch.layers.parameter import Init, local, parameter
from megaswitch.parallel.regions import named
from megaswitch.parallel.tensor_parallel import ALONE, TensorParallel

# Finite, so that a row of nothing but padding attends evenly instead of giving NaN; and far enough
# from the limits of fp32 and bf16 to be added to.
MASKED = -1e30


class KeyValues(NamedTuple):
    """What queries attend to: `keys` and `values`, both [B, heads, K, d_kv]."""

    keys: Tensor
    values: Tensor


class Attend(nn.Module):
    """Multi-head attention once there are queries, keys and values.

    A tensor-parallel rank has some of the heads, and gives its term of the output.
    """

    tp: TensorParallel = ALONE
    o: Linear  # [d_model, heads·d_kv]; Mesh-TF's initial deviation is (heads·d_kv)^-½

    def __init__(self, num_heads: int, d_kv: int, *, dropout: float, site: str) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.d_kv = d_kv
        self.dropout = dropout
        self.site = site

    @named("attention")
    def attend(
        self, q: Tensor, memory: KeyValues, bias: Tensor | None, noise: Noise | None
    ) -> Tensor:
        """Attend.

        Args:
            q: [B, heads, Q, d_kv].
            memory: of K positions.
            bias: added to the scores, broadcastable to [B, heads, Q, K]; masks are part of it.
            noise: randomness of a training step, or None.

        Returns:
            [B, Q, d_model].
        """
        k, v = memory
        # In bf16 the fused kernels would round the bias; training does not, so evaluation must not.
        exact = bias is not None and (bias.requires_grad or bias.dtype != q.dtype)
        if exact or (noise is not None and self.dropout):
            heads = self._explicit(q, k, v, bias, noise)
        else:
            heads = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
        return self.o(heads.transpose(1, 2).flatten(2))

    def split_heads(self, x: Tensor) -> Tensor:
        """[B, L, heads·d_kv] to [B, heads, L, d_kv]."""
        return x.unflatten(-1, (-1, self.d_kv)).transpose(1, 2)

    def _explicit(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, noise: Noise | None
    ) -> Tensor:
        """Attention step by step: for counted dropout, and for a bias that learns.

        torch's fused kernels give no gradient to the bias; its own fallback does the same as this
        and also looks for rows that are masked throughout, which ours (finite) never are.
        """
        weights = _weights(q @ k.transpose(-1, -2), bias)
        if noise is not None and self.dropout:
            batch, _, queries, keys = weights.shape
            heads = self.tp.part(self.num_heads)
            draws = noise.uniform(
                f"{self.site}.weights",
                (batch, self.num_heads, queries, keys),
                slice(heads.start * queries * keys, heads.stop * queries * keys),
            )
            weights = drop(weights, draws, self.dropout)
        return weights.to(v.dtype) @ v


@region_to_compile
def _weights(scores: Tensor, bias: Tensor | None) -> Tensor:
    """Softmax of scores [B, heads, Q, K] and their bias, in at least fp32."""
    scores = at_least_fp32(scores)
    return torch.softmax(scores if bias is None else scores + bias, -1)


class Attention(Attend):
    """Multi-head attention of `x` over `memory`.

    q, k, v and o are separate parameters: Adafactor's statistics and conversion need them apart.
    Initial deviations are Mesh-TF's: q (d_model·d_kv)^-½, k and v d_model^-½, o (heads·d_kv)^-½.
    """

    def __init__(
        self, d_model: int, num_heads: int, d_kv: int, *, dropout: float, site: str
    ) -> None:
        super().__init__(num_heads, d_kv, dropout=dropout, site=site)
        inner = num_heads * d_kv
        query_init = Init("normal", (d_model * d_kv) ** -0.5)
        memory_init = Init("normal", d_model**-0.5)
        self.q = Linear(d_model, inner, shard="column", init=query_init)
        self.k = Linear(d_model, inner, shard="column", init=memory_init)
        self.v = Linear(d_model, inner, shard="column", init=memory_init)
        self.o = Linear(inner, d_model, shard="row", init=Init("normal", inner**-0.5))

    def forward(
        self, x: Tensor, memory: KeyValues, bias: Tensor | None, noise: Noise | None
    ) -> Tensor:
        """Attend with queries of x [B, Q, d_model]; see `attend` and `keys_values`."""
        return self.attend(self.queries(x), memory, bias, noise)

    @named("attention")
    def queries(self, x: Tensor) -> Tensor:
        """[B, heads, Q, d_kv] of x [B, Q, d_model]."""
        return self.split_heads(self.q(x))

    @named("attention")
    def keys_values(self, memory: Tensor) -> KeyValues:
        """Keys and values of `memory` [B, K, d_model]."""
        return KeyValues(self.split_heads(self.k(memory)), self.split_heads(self.v(memory)))


class RelativeBias(nn.Module):
    """One learned score per head and bucket of relative position, shared by the blocks of a stack.

    Half the buckets are exact distances, half logarithmic up to `max_distance`; a bidirectional
    stack splits them between past and future. `weight` is [buckets, heads].
    """

    def __init__(
        self, num_heads: int, *, buckets: int, max_distance: int, bidirectional: bool, init: Init
    ) -> None:
        super().__init__()
        self.buckets = buckets
        self.max_distance = max_distance
        self.bidirectional = bidirectional
        self.weight = parameter((buckets, num_heads), (None, "tp"), init, is_bias=True)

    @named("attention")
    def forward(self, queries: int, keys: int, first_query: int = 0) -> Tensor:
        """Bias [1, heads, queries, keys]; keys stand at 0 …, queries at `first_query` …

        A tensor-parallel rank gives that of its heads.
        """
        device = self.weight.device
        query = torch.arange(first_query, first_query + queries, device=device)
        relative = torch.arange(keys, device=device) - query[:, None]
        return local(self.weight)[self.bucket(relative)].permute(2, 0, 1)[None]

    def bucket(self, relative: Tensor) -> Tensor:
        """Bucket of each relative position (key − query), int64 of the same shape."""
        buckets = self.buckets
        offset: Tensor | int = 0
        if self.bidirectional:
            buckets //= 2
            offset = (relative > 0) * buckets
            distance = relative.abs()
        else:
            distance = (-relative).clamp(min=0)
        exact = buckets // 2
        # The clamp only keeps log(0) out of the branch that `where` discards.
        ratio = torch.log(distance.clamp(min=1).float() / exact) / math.log(
            self.max_distance / exact
        )
        far = (exact + (ratio * (buckets - exact)).long()).clamp(max=buckets - 1)
        return offset + torch.where(distance < exact, distance, far)


def causal_bias(length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[1, 1, length, length]: 0 where a key is not after its query, else `MASKED`."""
    full = torch.full((length, length), MASKED, dtype=dtype, device=device)
    return full.triu(1)[None, None]


def segment_bias(queries: Tensor, keys: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, 1, Q, K] from segments [B, Q] and [B, K] of packed rows: 0 within one, else `MASKED`.

    Padding is segment 0: it sees padding alone, and no document sees it. What is masked has weight
    0, which hides any finite number; NaN and infinity reach the rest of their row, and end the
    step.
    """
    return (queries[:, :, None] != keys[:, None, :]).to(dtype)[:, None] * MASKED


def padding_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, 1, 1, K] from `mask` [B, K] (True: real): 0 there, else `MASKED`."""
    return (~mask).to(dtype)[:, None, None, :] * MASKED
