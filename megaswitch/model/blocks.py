"""Pre-norm residual blocks of the two stacks."""

from __future__ import annotations

from typing import Literal, Protocol

from torch import Tensor, nn

from megaswitch.config import ModelConfig
from megaswitch.layers.attention import Attention, KeyValues
from megaswitch.layers.noise import Noise, dropout
from megaswitch.layers.norm import RMSNorm
from megaswitch.model.ffn import FeedForward
from megaswitch.model.moe import SwitchFFN
from megaswitch.model.router import Routing


class Past(Protocol):
    """Keys and values of the tokens before, which decoding keeps."""

    def extend(self, new: KeyValues) -> KeyValues:
        """Append `new`; returns all there are."""
        ...


class Block(nn.Module):
    """Self-attention, in the decoder cross-attention, then a dense or a Switch FFN.

    Args:
        stack: which stack the block belongs to.
        index: its place in that stack, from 0; decides whether its FFN is sparse.
    """

    def __init__(
        self, config: ModelConfig, stack: Literal["encoder", "decoder"], index: int
    ) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.site = f"{stack}.{index}"
        self.self_attention_norm = RMSNorm(config.d_model, config.norm_epsilon)
        self.self_attention = self._attention(config, "self_attention")
        if stack == "decoder":
            self.cross_attention_norm = RMSNorm(config.d_model, config.norm_epsilon)
            self.cross_attention = self._attention(config, "cross_attention")
        self.ffn_norm = RMSNorm(config.d_model, config.norm_epsilon)
        kind = SwitchFFN if config.is_sparse(stack, index) else FeedForward
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
    ) -> tuple[Tensor, Routing | None]:
        """Apply the block.

        Args:
            x: [B, L, d_model].
            mask: [B, L] bool, True on real tokens.
            bias: self-attention scores to add, broadcastable to [B, heads, L, L]; with a past of
                P tokens, to [B, heads, L, P + L].
            rows_per_group: rows that a Switch FFN routes together; None: nothing is dropped.
            noise: randomness of a training step, or None.
            memory: [B, K, d_model], the encoder's output, or its keys and values (decoder only).
                It may have fewer rows than x: each then serves as many consecutive rows (beams).
            memory_bias: cross-attention scores to add, broadcastable to [B, heads, L, K].
            past: the tokens before x, in decoding.

        Returns:
            [B, L, d_model], and the routing if the FFN is sparse.
        """
        normed = self.self_attention_norm(x)
        own = self.self_attention.keys_values(normed)
        if past is not None:
            own = past.extend(own)
        x = self._add(x, self.self_attention(normed, own, bias, noise), "self_attention", noise)
        if memory is not None:
            if isinstance(memory, Tensor):
                memory = self.cross_attention.keys_values(memory)
            # Cross-attention knows no positions, so beams of a row may stand where its queries do.
            normed = self.cross_attention_norm(x).view(len(memory.keys), -1, x.shape[-1])
            attended = self.cross_attention(normed, memory, memory_bias, noise)
            x = self._add(x, attended.view_as(x), "cross_attention", noise)
        normed = self.ffn_norm(x)
        routing = None
        if isinstance(self.ffn, SwitchFFN):
            y, routing = self.ffn(normed, mask, rows_per_group, noise)
        else:
            y = self.ffn(normed, noise)
        return self._add(x, y, "ffn", noise), routing

    def _add(self, x: Tensor, y: Tensor, name: str, noise: Noise | None) -> Tensor:
        return x + dropout(y, self.dropout, f"{self.site}.{name}.out", noise)
