"""The whole model: embedding → encoder → decoder → logits."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megaswitch.config import ModelConfig
from megaswitch.layers.attention import RelativeBias, causal_bias, padding_bias
from megaswitch.layers.noise import Noise, dropout
from megaswitch.layers.norm import RMSNorm
from megaswitch.layers.parameter import Init, initialize, scaled
from megaswitch.layers.vocab import Embedding, Head, tied_logits
from megaswitch.model.blocks import Block
from megaswitch.model.router import Routing


@dataclass(frozen=True)
class LayerRouting:
    """How one Switch layer routed a batch.

    Attributes:
        expert: [B, L] int64, the expert chosen (of dropped tokens too).
        gate: [B, L], its probability.
        kept: [B, L] bool, False where the expert was full and, but in HF capacity mode, on padding.
        entropy: [B, L], of the router's distribution, nats.
    """

    expert: Tensor
    gate: Tensor
    kept: Tensor
    entropy: Tensor


@dataclass(frozen=True)
class SwitchOutput:
    """What a forward pass gives.

    Attributes:
        logits: [B, Ld, V].
        encoder_hidden: [B, Le, d_model], after the final norm.
        aux_loss: scalar, load-balancing loss reduced over layers, before its weight α.
        z_loss: scalar, router z-loss reduced over layers, before its weight.
        routing: per Switch layer, by name (`encoder.1.ffn`), detached.
    """

    logits: Tensor
    encoder_hidden: Tensor
    aux_loss: Tensor
    z_loss: Tensor
    routing: dict[str, LayerRouting]


@dataclass
class RouterLosses:
    """Losses and routings of the layers passed so far."""

    aux: list[Tensor] = field(default_factory=list)
    z: list[Tensor] = field(default_factory=list)
    routing: dict[str, LayerRouting] = field(default_factory=dict)

    def add(self, name: str, routing: Routing, mask: Tensor) -> None:
        """Record `routing` of the layer `name` over rows like `mask` [B, L]."""
        self.aux.append(routing.aux_loss)
        self.z.append(routing.z_loss)
        with torch.no_grad():
            entropy = torch.special.entr(routing.probabilities).sum(-1)
            fields = (routing.expert, routing.gate, routing.kept, entropy)
            flat = (t.detach().flatten()[: mask.numel()].view(mask.shape) for t in fields)
            self.routing[name] = LayerRouting(*flat)


class Stack(nn.Module):
    """One side of the model: relative bias, blocks, final norm."""

    def __init__(self, config: ModelConfig, name: Literal["encoder", "decoder"]) -> None:
        super().__init__()
        self.name = name
        self.dropout = config.dropout
        self.activation_checkpointing = False
        self.relative_bias = RelativeBias(
            config.num_heads,
            buckets=config.relative_buckets,
            max_distance=config.relative_max_distance,
            bidirectional=name == "encoder",
            init=Init("normal", config.d_model**-0.5),
        )
        # Keys are global layer numbers, so a part of the stack keeps its parameters' names.
        self.layers = nn.ModuleDict(
            {str(i): Block(config, name, i) for i in range(config.num_layers(name))}
        )
        self.final_norm = RMSNorm(config.d_model, config.norm_epsilon)

    @property
    def blocks(self) -> list[Block]:
        """The layers in order."""
        return [block for block in self.layers.values() if isinstance(block, Block)]

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None,
        rows_per_group: int | None,
        noise: Noise | None,
        losses: RouterLosses,
        memory: Tensor | None = None,
        memory_mask: Tensor | None = None,
    ) -> Tensor:
        """Run the blocks over x [B, L, d_model]; masks [B, L] bool are True on real tokens.

        `memory` may have fewer rows than x, and `rows_per_group` be None: see `Block`.
        """
        length = x.shape[1]
        bias = self.relative_bias(length, length)
        hidden = None if mask is None else padding_bias(mask, bias.dtype)
        if self.name == "decoder":
            future = causal_bias(length, bias.dtype, bias.device)
            # The least, not the sum: a query that may see nothing then attends evenly to all.
            hidden = future if hidden is None else torch.minimum(future, hidden)
        if hidden is not None:
            bias = bias + hidden
        memory_bias = None if memory_mask is None else padding_bias(memory_mask, bias.dtype)
        real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask
        x = dropout(x, self.dropout, f"{self.name}.embedding", noise)
        for index, block in self.layers.items():
            arguments = (x, real, bias, rows_per_group, noise, memory, memory_bias)
            if self.activation_checkpointing and torch.is_grad_enabled():
                # Our noise is counted, not drawn from a state, so there is none to stash.
                x, routing = checkpoint(
                    block, *arguments, use_reentrant=False, preserve_rng_state=False
                )
            else:
                x, routing = block(*arguments)
            if routing is not None:
                losses.add(f"{self.name}.{index}.ffn", routing, real)
        return dropout(self.final_norm(x), self.dropout, f"{self.name}.out", noise)


class SwitchTransformer(nn.Module):
    """T5-style encoder-decoder whose FFNs are, where configured, top-1 mixtures of experts.

    Build it under `torch.device(...)`; parameters are unfilled until `initialize` or a checkpoint
    fills them.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = Embedding(config.vocab_size, config.d_model)
        self.encoder = Stack(config, "encoder")
        self.decoder = Stack(config, "decoder")
        if not config.tie_embeddings:
            init = scaled(config.init_scale, config.d_model)
            self.head = Head(config.vocab_size, config.d_model, init)

    def initialize(self, seed: int) -> SwitchTransformer:
        """Fill all parameters, each from its own stream of `seed`, and return the model."""
        initialize(self, seed)
        return self

    def set_activation_checkpointing(self, enabled: bool) -> None:
        """Keep only each block's input for the backward pass and compute the rest again."""
        self.encoder.activation_checkpointing = enabled
        self.decoder.activation_checkpointing = enabled

    def rows_per_group(self, encoder_length: int) -> int:
        """Whole rows in one routing group, when encoder rows have `encoder_length` tokens."""
        moe = self.config.moe
        return 1 if moe.capacity_mode == "hf" else max(1, moe.group_size // encoder_length)

    def forward(
        self,
        encoder_tokens: Tensor,
        decoder_tokens: Tensor,
        *,
        encoder_mask: Tensor | None = None,
        decoder_mask: Tensor | None = None,
        noise: Noise | None = None,
    ) -> SwitchOutput:
        """Logits of the next decoder token at every position.

        Args:
            encoder_tokens: [B, Le] int64.
            decoder_tokens: [B, Ld] int64, the targets shifted right behind a pad token.
            encoder_mask: [B, Le] bool, True on real tokens; None: all are.
            decoder_mask: [B, Ld] likewise. (A leading pad token is real: it starts the decoder.)
            noise: randomness for dropout and jitter in training mode; None takes torch's seed.
                Evaluation mode draws nothing.
        """
        if not self.training:
            noise = None
        elif noise is None:
            noise = Noise.from_torch(len(encoder_tokens), encoder_tokens.device)
        losses = RouterLosses()
        rows = self.rows_per_group(encoder_tokens.shape[1])
        memory = self.encoder(self.embedding(encoder_tokens), encoder_mask, rows, noise, losses)
        hidden = self.decoder(
            self.embedding(decoder_tokens), decoder_mask, rows, noise, losses, memory, encoder_mask
        )
        return SwitchOutput(
            self.logits(hidden),
            memory,
            self._reduce(losses.aux),
            self._reduce(losses.z),
            losses.routing,
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [B, L, V] of the decoder's output [B, L, d_model]."""
        if self.config.tie_embeddings:
            return tied_logits(hidden, self.embedding)
        logits: Tensor = self.head(hidden)
        return logits

    def _reduce(self, per_layer: list[Tensor]) -> Tensor:
        """Reduce a loss over layers: summed as Mesh-TF, or averaged as T5X."""
        if not per_layer:
            return torch.zeros((), device=self.embedding.weight.device)
        stacked = torch.stack(per_layer)
        return stacked.sum() if self.config.moe.aux_loss_reduction == "sum" else stacked.mean()
