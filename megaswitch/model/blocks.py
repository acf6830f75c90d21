"""Pre-norm residual blocks of the two stacks."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from megaswitch.config import ModelConfig
from megaswitch.layers.attention import Attention
from megaswitch.layers.noise import Noise, dropout
from megaswitch.layers.norm import RMSNorm
from megaswitch.model.ffn import FeedForward
from megaswitch.model.moe import SwitchFFN
from megaswitch.model.router import Routing


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
        rows_per_group: int,
        noise: Noise | None,
        memory: Tensor | None = None,
        memory_bias: Tensor | None = None,
    ) -> tuple[Tensor, Routing | None]:
        """Apply the block.

        Args:
            x: [B, L, d_model].
            mask: [B, L] bool, True on real tokens.
            bias: self-attention scores to add, broadcastable to [B, heads, L, L].
            rows_per_group: rows that a Switch FFN routes together.
            noise: randomness of a training step, or None.
            memory: [B, K, d_model], the encoder's output (decoder only).
            memory_bias: cross-attention scores to add, broadcastable to [B, heads, L, K].

        Returns:
            [B, L, d_model], and the routing if the FFN is sparse.
        """
        normed = self.self_attention_norm(x)
        x = self._add(x, self.self_attention(normed, normed, bias, noise), "self_attention", noise)
        if memory is not None:
            normed = self.cross_attention_norm(x)
            attended = self.cross_attention(normed, memory, memory_bias, noise)
            x = self._add(x, attended, "cross_attention", noise)
        normed = self.ffn_norm(x)
        routing = None
        if isinstance(self.ffn, SwitchFFN):
            y, routing = self.ffn(normed, mask, rows_per_group, noise)
        else:
            y = self.ffn(normed, noise)
        return self._add(x, y, "ffn", noise), routing

    def _add(self, x: Tensor, y: Tensor, name: str, noise: Noise | None) -> Tensor:
        return x + dropout(y, self.dropout, f"{self.site}.{name}.out", noise)
