"""A dense T5 as a Switch model: every expert starts as a copy of the feed-forward network.

A token's output is p·E_i(x), where p is about 1/E as long as the router is undecided, so a plain
copy would shrink these layers E times. Therefore the experts' last matrix is multiplied by E, and
the fresh router by a small number: it spreads tokens as ever, as the largest logit stays the
largest, yet E·p is 1 to a few parts in ten thousand. So the new model computes what the dense one
does before its first step, as long as no token is dropped. While the router then makes up its mind,
p and with it these layers' output grow; training has to answer that.

Source: Komatsuzaki et al. 2022 (arXiv 2212.05055), and for the scale of the weights He et al. 2024
(arXiv 2410.07524).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from megaswitch.checkpoint.manager import find_checkpoint, load_model_tensors, read_config
from megaswitch.checkpoint.new_model import Original, made, make_model
from megaswitch.checkpoint.streams import Target
from megaswitch.config import ModelConfig, MoEConfig, RunConfig
from megaswitch.layers.parameter import initialize, stable_hash
from megaswitch.log import UserError
from megaswitch.model.count import meta_model
from megaswitch.model.switch_transformer import SwitchTransformer
from megaswitch.parallel.shard import declare_spec, spec_of


@dataclass(frozen=True)
class Recipe:
    """How a dense model becomes a sparse one.

    Attributes:
        moe: its Switch layers.
        noise: deviation of what is added to each expert, relative to its matrix's RMS; 0: copies.
        router_scale: of the fresh router's weights.
        output_scale: of the experts' last matrices; None: the number of experts.
        seed: of router and noise.
    """

    moe: MoEConfig
    noise: float = 0.0
    router_scale: float = 1e-3
    output_scale: float | None = None
    seed: int = 0

    @property
    def keeps_function(self) -> bool:
        """Whether the new model is to compute what the dense one does."""
        return self.noise == 0 and self.output_scale is None


def upcycle(source: Path, target: Path, recipe: Recipe) -> None:
    """Write the Switch model that a dense checkpoint, or a run's newest, becomes.

    Memory holds a matrix or two, whatever the size of the model.

    Raises:
        UserError: `source` is not dense or damaged, or `target` cannot be written.
    """

    def sparse(checkpoint: Path, config: RunConfig) -> ModelConfig:
        if config.model.moe.num_experts:
            raise UserError(
                f"{checkpoint} has {config.model.moe.num_experts} experts already; only a dense "
                "model is upcycled"
            )
        return replace(config.model, moe=recipe.moe)

    make_model(source, target, sparse, partial(_targets, recipe))


def _targets(recipe: Recipe, dense: Original, model: ModelConfig) -> list[Target]:
    """The new model's parameters."""
    targets = []
    for name, parameter in meta_model(model).named_parameters():
        if name.endswith(".router.weight"):
            make = partial(_router, name, parameter, recipe)
            sources = [made(name, parameter.shape, torch.float32, make)]
        else:
            sparse = spec_of(parameter).is_expert
            old = f"model.{name.replace('.experts.', '.') if sparse else name}"
            dtype, shape = dense.dtype(old), parameter.shape[sparse:]
            read = partial(dense.read, old)
            if sparse:
                makes = [partial(_expert, read, name, e, recipe) for e in range(len(parameter))]
            sources = [made(name, shape, dtype, make) for make in (makes if sparse else [read])]
        targets.append(Target(name, sources, stacked=spec_of(parameter).is_expert))
    return targets


def _router(name: str, parameter: nn.Parameter, recipe: Recipe) -> Tensor:
    """As the model itself would fill it, times the scale; fp32."""
    weight = nn.Parameter(torch.empty(parameter.shape, dtype=torch.float32))
    declare_spec(weight, spec_of(parameter))
    initialize([(name, weight, parameter.init)], recipe.seed)  # type: ignore[attr-defined]
    return weight.detach() * recipe.router_scale


def _expert(read: Callable[[], Tensor], name: str, expert: int, recipe: Recipe) -> Tensor:
    dense = read()
    wide = dense.double()
    if recipe.noise:
        draw = torch.Generator().manual_seed(stable_hash(recipe.seed, "noise", name, expert))
        deviation = recipe.noise * wide.square().mean().sqrt()
        wide = wide + deviation * torch.randn(wide.shape, generator=draw, dtype=torch.float64)
    if name.endswith(".wo.weight"):
        scale = recipe.output_scale
        wide = wide * (recipe.moe.num_experts if scale is None else scale)
    return wide.to(dense.dtype)


@dataclass(frozen=True)
class Comparison:
    """How two models differ on the same random text.

    Attributes:
        difference: of any logit, over the largest logit; with no token dropped.
        dropped: share of tokens that find no place at the sparse model's capacity in evaluation.
    """

    difference: float
    dropped: float


@torch.no_grad()
def compare(dense: Path, sparse: Path, *, rows: int = 8, seed: int = 0) -> Comparison:
    """Run both models, whole and in fp64, over random tokens.

    Raises:
        UserError: one cannot be read.
    """
    first, config = find_checkpoint(dense), read_config(find_checkpoint(sparse))
    lengths = config.data.encoder_length, config.data.decoder_length or 64
    draw = torch.Generator().manual_seed(seed)
    low = min(3, config.model.vocab_size - 1)
    tokens = [
        torch.randint(low, config.model.vocab_size, (rows, length), generator=draw)
        for length in lengths
    ]
    moe = config.model.moe
    free = replace(config.model, moe=replace(moe, capacity_mode="dropless"))
    expected = _load(first, read_config(first).model)(*tokens).logits
    found = _load(find_checkpoint(sparse), free)(*tokens).logits
    assert expected is not None
    assert found is not None
    routing = _load(find_checkpoint(sparse), config.model)(*tokens).routing
    kept = torch.cat([layer.kept.flatten() for layer in routing.values()])
    difference = (found - expected).abs().max() / expected.abs().max()
    return Comparison(difference.item(), 1 - kept.double().mean().item())


def _load(path: Path, config: ModelConfig) -> SwitchTransformer:
    model = SwitchTransformer(config)
    load_model_tensors(path, model)
    return model.double().eval()
