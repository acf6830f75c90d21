"""Parameters and FLOPs, counted on the model itself rather than re-derived from its config."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from megaswitch.config import ModelConfig
from megaswitch.layers.linear import GroupedLinear, Linear
from megaswitch.layers.vocab import Head
from megaswitch.model.switch_transformer import Stack, SwitchTransformer
from megaswitch.parallel.shard import spec_of


@dataclass(frozen=True)
class ModelCount:
    """Sizes of a model.

    Attributes:
        total_parameters: all of them, a tied table once.
        active_parameters: those that one token can meet: one expert of each Switch layer.
        forward_flops_per_sequence: see `forward_flops`.
    """

    total_parameters: int
    active_parameters: int
    forward_flops_per_sequence: int


def meta_model(config: ModelConfig) -> SwitchTransformer:
    """The model without memory: shapes only."""
    with torch.device("meta"):
        return SwitchTransformer(config)


def count(
    config: ModelConfig, *, encoder_length: int = 512, decoder_length: int = 114
) -> ModelCount:
    """Count the model of `config`; lengths are T5's span-corruption shape unless given."""
    model = meta_model(config)
    total = sum(p.numel() for p in model.parameters())
    idle = sum(
        p.numel() // len(p) * (len(p) - 1) for p in model.parameters() if spec_of(p).is_expert
    )
    return ModelCount(total, total - idle, forward_flops(model, encoder_length, decoder_length))


def forward_flops(model: SwitchTransformer, encoder_length: int, decoder_length: int) -> int:
    """Floating-point operations of one sequence's forward pass, as the paper's Table 9 counts them.

    2 per weight and token for every linear map, with all of cross-attention charged to decoder
    tokens and one expert per token, plus 2·heads·d_kv per query-key pair, plus the logits. The
    router and element-wise work are left out. The paper gives no recipe; this meets its figures.
    """
    lengths = {"encoder": encoder_length, "decoder": decoder_length}
    flops = 0
    for stack in (model.encoder, model.decoder):
        flops += 2 * _matmul_weights(stack) * lengths[stack.name]
    config = model.config
    pair = 2 * config.num_heads * config.d_kv
    flops += config.num_encoder_layers * pair * encoder_length**2
    flops += config.num_decoder_layers * pair * decoder_length * (decoder_length + encoder_length)
    head = model.embedding if config.tie_embeddings else model.head
    assert isinstance(head, nn.Module)
    return flops + 2 * sum(p.numel() for p in head.parameters()) * decoder_length


def _matmul_weights(stack: Stack) -> int:
    """Weights of the linear maps that one token passes."""
    total = 0
    for module in stack.modules():
        assert not isinstance(module, Head)
        if isinstance(module, Linear):
            total += module.weight.numel()
        elif isinstance(module, GroupedLinear):
            total += module.weight[0].numel()
    return total
