"""The whole model: embedding → encoder → decoder → logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import register_dataclass

from megaswitch.config import ModelConfig
from megaswitch.layers.attention import RelativeBias, causal_bias, padding_bias, segment_bias
from megaswitch.layers.noise import Noise, dropout
from megaswitch.layers.norm import RMSNorm
from megaswitch.layers.parameter import Init, initialize, scaled
from megaswitch.layers.recompute import recompute, recompute_cheap
from megaswitch.layers.vocab import Embedding, Head, LazyLogits, tied_logits
from megaswitch.model.adapters import add_adapters
from megaswitch.model.blocks import Block
from megaswitch.model.router import Routing
from megaswitch.parallel import expert_parallel
from megaswitch.parallel.expert_parallel import ExpertParallel
from megaswitch.parallel.regions import named
from megaswitch.parallel.tensor_parallel import ALONE, TensorParallel


@dataclass(frozen=True)
class LayerRouting:
    """How one Switch layer routed a batch.

    With routers that may send a token to several experts, the first three are [B, L, K]; where
    fewer were asked, the expert is -1, the gate 0 and nothing kept.

    Attributes:
        expert: [B, L] int64, the expert chosen (of dropped tokens too).
        gate: [B, L], what its output is multiplied by: its probability, or a share of several.
        kept: [B, L] bool, False where the expert was full and, but in HF capacity mode, on padding.
        entropy: [B, L], of the router's distribution, nats.
    """

    expert: Tensor
    gate: Tensor
    kept: Tensor
    entropy: Tensor


class Activations(NamedTuple):
    """What flows through the layers: [B, Le, d_model] and [B, Ld, d_model].

    Under sequence parallelism, of this rank's tokens: [B·Le/tp, d_model] and [B·Ld/tp, d_model].
    """

    encoder: Tensor
    decoder: Tensor


@dataclass(frozen=True)
class Inputs:
    """What every layer knows of a batch.

    Attributes:
        encoder_shape: (B, Le).
        decoder_shape: (B, Ld).
        encoder_mask: [B, Le] bool, True on real tokens; None: all are.
        decoder_mask: [B, Ld] likewise.
        noise: randomness of a training step, or None.
        encoder_segments: [B, Le] integers of packed rows: 0 on padding, else which of the row's
            documents a token belongs to, counted from 1; None: a row is one document.
        decoder_segments: [B, Ld] likewise; its document k answers the encoder's document k.
    """

    encoder_shape: torch.Size
    decoder_shape: torch.Size
    encoder_mask: Tensor | None
    decoder_mask: Tensor | None
    noise: Noise | None
    encoder_segments: Tensor | None = None
    decoder_segments: Tensor | None = None


@dataclass(frozen=True)
class SwitchOutput:
    """What a forward pass gives.

    Attributes:
        logits: [B, Ld, V], or of this rank's rows of the vocabulary; None from layers below, and
            where the loss makes them.
        encoder_hidden: [B, Le, d_model], after the final norm; or of this rank's tokens.
        aux_loss: scalar, load-balancing loss reduced over layers, before its weight α.
        z_loss: scalar, router z-loss reduced over layers, before its weight.
        routing: per Switch layer, by name (`encoder.1.ffn`), detached.
        lazy_logits: what logits are made of, where the loss makes them.
    """

    logits: Tensor | None
    encoder_hidden: Tensor
    aux_loss: Tensor
    z_loss: Tensor
    routing: dict[str, LayerRouting]
    lazy_logits: LazyLogits | None = None


register_dataclass(SwitchOutput)  # as `Routing` is


@dataclass
class RouterLosses:
    """Losses and routings of the layers passed so far."""

    aux: list[Tensor] = field(default_factory=list)
    z: list[Tensor] = field(default_factory=list)
    routing: dict[str, LayerRouting] = field(default_factory=dict)

    def add(self, name: str, routing: Routing, mask: Tensor, tp: TensorParallel) -> None:
        """Record `routing` of the layer `name` over rows like `mask` [B, L]."""
        self.aux.append(routing.aux_loss)
        self.z.append(routing.z_loss)
        with torch.no_grad():
            entropy = torch.special.entr(routing.probabilities).sum(-1)
            gate, entropy = tp.all_tokens(routing.gate), tp.all_tokens(entropy)
            tokens = mask.numel()
            expert, gate, kept = (
                routing.by_token(t, tokens) for t in (routing.expert, gate.detach(), routing.kept)
            )
            gate = gate.masked_fill(expert < 0, 0.0)
            fields = (expert, gate, kept, entropy.flatten()[:tokens])
            self.routing[name] = LayerRouting(*(t.unflatten(0, mask.shape) for t in fields))


class Stack(nn.Module):
    """One side of the model, or some of its layers: relative bias, blocks, final norm."""

    tp: TensorParallel = ALONE

    def __init__(self, config: ModelConfig, name: Literal["encoder", "decoder"]) -> None:
        super().__init__()
        self.name = name
        self.dropout = config.dropout
        self.recompute: Callable[..., Any] | None = None
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

    def start(self, x: Tensor, shape: torch.Size, noise: Noise | None) -> Tensor:
        """What the first block gets of the embedded tokens x of `shape` (B, L)."""
        site = f"{self.name}.embedding"
        return dropout(x, self.dropout, site, noise, tp=self.tp, length=shape[1])

    def forward(
        self,
        x: Tensor,
        shape: torch.Size,
        mask: Tensor | None,
        rows_per_group: int | None,
        noise: Noise | None,
        losses: RouterLosses,
        memory: Tensor | None = None,
        memory_mask: Tensor | None = None,
        segments: Tensor | None = None,
        memory_segments: Tensor | None = None,
    ) -> Tensor:
        """Run the blocks over x, activations of `shape` (B, L); masks are True on real tokens.

        `memory` may have fewer rows than x, and `rows_per_group` be None: see `Block`. Where rows
        are packed, `segments` [B, L] and `memory_segments` [B, K] keep their documents apart, and
        masks serve routing alone.
        """
        bias = self._bias(shape[1], mask, segments)
        memory_bias = None
        if segments is not None and memory_segments is not None:
            memory_bias = segment_bias(segments, memory_segments, bias.dtype)
        elif memory_mask is not None:
            memory_bias = padding_bias(memory_mask, bias.dtype)
        real = torch.ones(shape, dtype=torch.bool, device=x.device) if mask is None else mask
        for index, block in self.layers.items():
            arguments = (x, real, bias, rows_per_group, noise, memory, memory_bias)
            if self.recompute and torch.is_grad_enabled():
                x, routings = self.recompute(block, *arguments)
            else:
                x, routings = block(*arguments)
            for part, routing in routings.items():
                losses.add(f"{self.name}.{index}.{part}", routing, real, self.tp)
        if not hasattr(self, "final_norm"):  # the stack goes on at another pipeline stage
            return x
        site = f"{self.name}.out"
        return dropout(self.final_norm(x), self.dropout, site, noise, tp=self.tp, length=shape[1])

    def _bias(self, length: int, mask: Tensor | None, segments: Tensor | None) -> Tensor:
        """What self-attention adds to its scores, broadcastable to [B, heads, L, L].

        The relative bias needs no notion of documents: it depends on the distance of key and query
        alone, and within a document that is the same wherever in the row the document stands.
        """
        bias = self.relative_bias(length, length)
        hidden = None
        if segments is not None:
            hidden = segment_bias(segments, segments, bias.dtype)
        elif mask is not None:
            hidden = padding_bias(mask, bias.dtype)
        if self.name == "decoder":
            future = causal_bias(length, bias.dtype, bias.device)
            # The least, not the sum: a query that may see nothing then attends evenly to all.
            hidden = future if hidden is None else torch.minimum(future, hidden)
        return bias if hidden is None else bias + hidden


def rows_per_group(config: ModelConfig, encoder_length: int) -> int:
    """Whole rows in one routing group, when encoder rows have `encoder_length` tokens."""
    moe = config.moe
    return 1 if moe.capacity_mode == "hf" else max(1, moe.group_size // encoder_length)


class SwitchTransformer(nn.Module):
    """T5-style encoder-decoder whose FFNs are, where configured, mixtures of experts.

    Build it under `torch.device(...)`; parameters are unfilled until `initialize` or a checkpoint
    fills them.
    """

    tp: TensorParallel = ALONE
    ep: ExpertParallel = expert_parallel.ALONE
    loss_tokens: int | None = None  # whose logits a training loss makes at a time

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = Embedding(config.vocab_size, config.d_model)
        self.encoder = Stack(config, "encoder")
        self.decoder = Stack(config, "decoder")
        if not config.tie_embeddings:
            init = scaled(config.init_scale, config.d_model)
            self.head = Head(config.vocab_size, config.d_model, init)
        if config.lora.rank:
            add_adapters(self, config.lora)

    def initialize(self, seed: int) -> SwitchTransformer:
        """Fill all parameters, each from its own stream of `seed`, and return the model."""
        named = self.named_parameters()
        initialize(((name, p, p.init) for name, p in named), seed)  # type: ignore[attr-defined]
        return self

    def set_activation_checkpointing(
        self, which: Literal[False, True, "selective"], recompute: Callable[..., Any] = recompute
    ) -> None:
        """Compute again in the backward pass what is not kept for it.

        Args:
            which: False: keep everything. True: keep each block's input alone. "selective": also
                what its products with weights give.
            recompute: how all of a block is, as `layers.backend.Backend` says.
        """
        again = {False: None, True: recompute, "selective": recompute_cheap}[which]
        self.encoder.recompute = self.decoder.recompute = again

    def forward(
        self,
        encoder_tokens: Tensor,
        decoder_tokens: Tensor,
        *,
        encoder_mask: Tensor | None = None,
        decoder_mask: Tensor | None = None,
        encoder_segments: Tensor | None = None,
        decoder_segments: Tensor | None = None,
        noise: Noise | None = None,
    ) -> SwitchOutput:
        """Logits of the next decoder token at every position.

        Args:
            encoder_tokens: [B, Le] int64.
            decoder_tokens: [B, Ld] int64, the targets shifted right behind a pad token.
            encoder_mask: [B, Le] bool, True on real tokens; None: all are.
            decoder_mask: [B, Ld] likewise. (A leading pad token is real: it starts the decoder.)
            encoder_segments: [B, Le] integers of rows that hold several documents: 0 on padding,
                else which of the row's documents a token belongs to, from 1. A document sees
                itself alone. None: a row is one document. Masks default to what is not padding.
            decoder_segments: [B, Ld] likewise, given together: its document k reads the encoder's
                document k.
            noise: randomness for dropout and jitter in training mode; None takes torch's seed.
                Evaluation mode draws nothing.

        Raises:
            ValueError: segments are given for one stream only.
        """
        if (encoder_segments is None) != (decoder_segments is None):
            raise ValueError("packed rows need encoder_segments and decoder_segments; give both")
        if encoder_segments is not None and decoder_segments is not None:
            encoder_mask = encoder_segments > 0 if encoder_mask is None else encoder_mask
            decoder_mask = decoder_segments > 0 if decoder_mask is None else decoder_mask
        if not self.training:
            noise = None
        elif noise is None:
            noise = Noise.from_torch(len(encoder_tokens), encoder_tokens.device)
        shapes = (encoder_tokens.shape, decoder_tokens.shape)
        segments = (encoder_segments, decoder_segments)
        inputs = Inputs(*shapes, encoder_mask, decoder_mask, noise, *segments)
        losses = RouterLosses()
        embedded = self.embed(encoder_tokens, decoder_tokens, noise)
        memory, hidden = self.advance(embedded, inputs, losses)
        return self.output(hidden, memory, decoder_tokens.shape, losses)

    def embed(
        self, encoder_tokens: Tensor, decoder_tokens: Tensor, noise: Noise | None
    ) -> Activations:
        """What the first layers get of tokens [B, Le] and [B, Ld]."""
        return Activations(
            *(
                stack.start(self.embedding(tokens), tokens.shape, noise)
                for stack, tokens in (
                    (self.encoder, encoder_tokens),
                    (self.decoder, decoder_tokens),
                )
            )
        )

    def advance(self, x: Activations, inputs: Inputs, losses: RouterLosses) -> Activations:
        """Run all the layers there are, which add to `losses`."""
        encoder, decoder = x
        rows = rows_per_group(self.config, inputs.encoder_shape[1])
        if self.encoder.layers:
            encoder = self.encoder(
                encoder,
                inputs.encoder_shape,
                inputs.encoder_mask,
                rows,
                inputs.noise,
                losses,
                segments=inputs.encoder_segments,
            )
        if self.decoder.layers:
            decoder = self.decoder(
                decoder,
                inputs.decoder_shape,
                inputs.decoder_mask,
                rows,
                inputs.noise,
                losses,
                memory=self.tp.enter(encoder, inputs.encoder_shape),
                memory_mask=inputs.encoder_mask,
                segments=inputs.decoder_segments,
                memory_segments=inputs.encoder_segments,
            )
        return Activations(encoder, decoder)

    def output(
        self, hidden: Tensor | None, memory: Tensor, shape: torch.Size, losses: RouterLosses
    ) -> SwitchOutput:
        """What the layers here give.

        Args:
            hidden: the decoder's output of `shape` (B, L), where it is complete.
            memory: the encoder's.
            shape: see above.
            losses: of these layers.
        """
        logits = lazy = None
        if hidden is not None and self.loss_tokens and self.training and torch.is_grad_enabled():
            head = self.embedding if self.config.tie_embeddings else self.head
            lazy = LazyLogits.of(self.tp.enter(hidden, shape), head, self.loss_tokens)
        elif hidden is not None:
            logits = self.logits(hidden, shape)
        aux, z = self.reduce(losses.aux), self.reduce(losses.z)
        return SwitchOutput(logits, memory, aux, z, losses.routing, lazy)

    @named("vocabulary")
    def logits(self, hidden: Tensor, shape: torch.Size) -> Tensor:
        """Logits [B, L, V], or of this rank's rows, of the decoder's output of `shape` (B, L)."""
        hidden = self.tp.enter(hidden, shape)
        if self.config.tie_embeddings:
            return tied_logits(hidden, self.embedding)
        logits: Tensor = self.head(hidden)
        return logits

    def reduce(self, per_layer: list[Tensor]) -> Tensor:
        """Reduce a loss over the layers here: summed as Mesh-TF, or for T5X's mean over all."""
        if not per_layer:
            return torch.zeros((), device=next(self.parameters()).device)
        total = torch.stack(per_layer).sum()
        by_sum = self.config.moe.aux_loss_reduction == "sum"
        return total if by_sum else total / len(self.config.switch_layers())
