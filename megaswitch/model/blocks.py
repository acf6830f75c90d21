"""Pre-norm residual blocks of the two stacks."""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from megaswitch.config import ModelConfig
from megaswitch.layers.attention import Attention, KeyValues
from megaswitch.layers.noise import Noise, dropout
from megaswitch.layers.norm import RMSNorm
from megaswitch.model.ffn import FeedForward
from megaswitch.model.moe import SwitchFFN
from megaswitch.model.router import Routing
from megaswitch.model.switch_attention import SwitchAttention
from megaswitch.parallel.tensor_parallel import ALONE, TensorParallel


class Past(Protocol):
    """Keys and values of the tokens before, which decoding keeps.

    Attributes:
        length: how many.
    """

    length: int

    def extend(self, new: KeyValues) -> KeyValues:
        """Append `new`; returns all there are."""
        ...


class Block(nn.Module):
    """Self-attention, in the decoder cross-attention, then an FFN.

    Args:
        stack: which stack the block belongs to.
        index: its place in that stack, from 0; decides what of it is a mixture of experts.
    """

    tp: TensorParallel = ALONE

    def __init__(
        self, config: ModelConfig, stack: Literal["encoder", "decoder"], index: int
    ) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.site = f"{stack}.{index}"
        self.self_attention_norm = RMSNorm(config.d_model, config.norm_epsilon)
        sparse = config.sparse_parts(stack, index)
        self.self_attention = (
            SwitchAttention(config, f"{self.site}.self_attention")
            if "self_attention" in sparse
            else self._attention(config, "self_attention")
        )
        if stack == "decoder":
            self.cross_attention_norm = RMSNorm(config.d_model, config.norm_epsilon)
            self.cross_attention = self._attention(config, "cross_attention")
        self.ffn_norm = RMSNorm(config.d_model, config.norm_epsilon)
        kind = SwitchFFN if "ffn" in sparse else FeedForward
        self.ffn = kind(config, f"{self.site}.ffn")

    def _attention(self, config: ModelConfig, name: str) -> Attention:
        return Attention(
            config.d_model,
            config.num_heads,
            config.d_kv,
            dropout=config.dropout,
            site=f"{self.site}.{name}",
        )

    def forward(
        self,
        x: Tensor,
        mask: Tensor,
        bias: Tensor,
        rows_per_group: int | None,
        noise: Noise | None,
        memory: Tensor | KeyValues | None = None,
        memory_bias: Tensor | None = None,
        past: Past | None = None,
    ) -> tuple[Tensor, dict[str, Routing]]:
        """Apply the block.

        Args:
            x: [B, L, d_model], or [B·L/tp, d_model] of this rank's tokens.
            mask: [B, L] bool, True on real tokens.
            bias: self-attention scores to add, broadcastable to [B, heads, L, L]; with a past of
                P tokens, to [B, heads, L, P + L].
            rows_per_group: rows that a Switch FFN routes together; None: nothing is dropped.
            noise: randomness of a training step, or None.
            memory: [B, K, d_model], the encoder's output after `TensorParallel.enter`, or its keys
                and values (decoder only). It may have fewer rows than x: each then serves
                as many consecutive rows (beams).
            memory_bias: cross-attention scores to add, broadcastable to [B, heads, L, K].
            past: the tokens before x, in decoding.

        Returns:
            like x, and the routing of each part that is a mixture of experts.
        """
        shape, parts = mask.shape, x.ndim == 2
        routings: dict[str, Routing] = {}
        first = 0 if past is None else past.length
        normed = self.self_attention_norm(x)
        if isinstance(self.self_attention, SwitchAttention):
            q, own, routings["self_attention"] = self.self_attention.project(
                normed, mask, rows_per_group, noise, first
            )
        else:
            normed = self.tp.enter(normed, shape)
            q, own = self.self_attention.queries(normed), self.self_attention.keys_values(normed)
        if past is not None:
            own = past.extend(own)
        y = self.tp.leave(self.self_attention.attend(q, own, bias, noise), parts=parts)
        x = self._add(x, y, "self_attention", shape, noise)
        if memory is not None:
            if isinstance(memory, Tensor):
                memory = self.cross_attention.keys_values(memory)
            normed = self.tp.enter(self.cross_attention_norm(x), shape)
            # Cross-attention knows no positions, so beams of a row may stand where its queries do.
            queries = normed.view(len(memory.keys), -1, normed.shape[-1])
            attended = self.cross_attention(queries, memory, memory_bias, noise)
            y = self.tp.leave(attended.view_as(normed), parts=parts)
            x = self._add(x, y, "cross_attention", shape, noise)
        normed = self.ffn_norm(x)
        if isinstance(self.ffn, SwitchFFN):
            y, routings["ffn"] = self.ffn(normed, mask, rows_per_group, noise, first)
        else:
            y = self.tp.leave(self.ffn(self.tp.enter(normed, shape), noise), parts=parts)
        return self._add(x, y, "ffn", shape, noise), routings

    def _add(
        self, x: Tensor, y: Tensor, name: str, shape: torch.Size, noise: Noise | None
    ) -> Tensor:
        site = f"{self.site}.{name}.out"
        return x + dropout(y, self.dropout, site, noise, tp=self.tp, length=shape[1])
