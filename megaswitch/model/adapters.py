"""Which linear maps of a model have low-rank adapters, and how these are merged away."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase

from torch import nn

from megaswitch.config import LoRAConfig
from megaswitch.layers.linear import Adapter, GroupedLinear, Linear


def add_adapters(model: nn.Module, config: LoRAConfig) -> None:
    """Give each linear map whose name matches one of the patterns an adapter, still unfilled."""
    for name, module in linear_maps(model):
        if any(fnmatchcase(name, pattern) for pattern in config.targets):
            module.adapter = Adapter(module.weight, config.rank, config.alpha / config.rank)


def linear_maps(model: nn.Module) -> Iterator[tuple[str, Linear | GroupedLinear]]:
    """The maps that may have adapters, by name; the router and the embeddings are none of them."""
    for name, module in model.named_modules():
        if isinstance(module, Linear | GroupedLinear):
            yield name, module


def is_adapter(parameter: str) -> bool:
    """Whether the parameter of that name belongs to an adapter."""
    return ".adapter." in parameter


def merge_adapters(model: nn.Module) -> None:
    """Add all adapters to the weights that they adapt, and remove them."""
    for _, module in linear_maps(model):
        if module.adapter is not None:
            module.adapter.merge_into(module.weight)
            module.adapter = None
