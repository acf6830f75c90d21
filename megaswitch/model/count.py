"""Parameters and FLOPs, counted on the model itself rather than re-derived from its config."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megaswitch.config import ModelConfig
from megaswitch.layers.linear import GroupedLinear, Linear
from megaswitch.model.blocks import Block
from megaswitch.model.routers import ROUTERS
from megaswitch.model.switch_transformer import SwitchTransformer
from megaswitch.parallel.shard import spec_of


@dataclass(frozen=True)
class ModelCount:
    """Sizes of a model.

    Attributes:
        total_parameters: all of them, a tied table once.
        active_parameters: those that one token meets: one expert of each mixture, with top-2 two,
            and on average as many as the capacity factor where experts choose.
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
    met = _experts_per_token(config)
    idle = sum(
        round(p.numel() // len(p) * (len(p) - met))
        for p in model.parameters()
        if spec_of(p).is_expert
    )
    return ModelCount(total, total - idle, forward_flops(model, encoder_length, decoder_length))


def _experts_per_token(config: ModelConfig) -> float:
    return ROUTERS[config.moe.router].experts_per_token(config.moe)


def forward_flops(model: SwitchTransformer, encoder_length: int, decoder_length: int) -> int:
    """Floating-point operations of one sequence's forward pass, as the paper's Table 9 counts them.

    2 per weight and token for every linear map, with all of cross-attention charged to decoder
    tokens and as many experts as a token meets, plus 2·heads·d_kv per query-key pair, plus the
    logits. Routers and element-wise work are left out. The paper gives no recipe; this meets its
    figures.
    """
    config = model.config
    return sum(block_flops(config, encoder_length, decoder_length, model)) + head_flops(
        config, decoder_length
    )


def block_flops(
    config: ModelConfig,
    encoder_length: int,
    decoder_length: int,
    model: SwitchTransformer | None = None,
) -> list[int]:
    """`forward_flops` of each block, encoder first."""
    model = model or meta_model(config)
    pair = 2 * config.num_heads * config.d_kv
    flops = []
    for stack, length, keys in (
        (model.encoder, encoder_length, encoder_length),
        (model.decoder, decoder_length, decoder_length + encoder_length),
    ):
        for block in stack.blocks:
            weights = _matmul_weights(block, _experts_per_token(config))
            flops.append(2 * weights * length + pair * length * keys)
    return flops


def head_flops(config: ModelConfig, decoder_length: int) -> int:
    """`forward_flops` of the logits."""
    return 2 * config.vocab_size * config.d_model * decoder_length


def _matmul_weights(block: Block, experts: float) -> int:
    """Weights of the linear maps that one token passes, on average."""
    total = 0
    for module in block.modules():
        if isinstance(module, Linear):
            total += module.weight.numel()
        elif isinstance(module, GroupedLinear):
            total += round(module.weight[0].numel() * experts)
    return total
