"""Parameters, stages and FLOPs of a model, found once for all the layouts that share it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

from megaswitch.config import ModelConfig
from megaswitch.model.count import count, meta_model
from megaswitch.model.stages import Stage, balance
from megaswitch.parallel.shard import ShardSpec, spec_of


@dataclass(frozen=True)
class Sized:
    """A parameter, as far as memory goes; `block` is None for those of the ends."""

    name: str
    shape: tuple[int, ...]
    spec: ShardSpec
    block: int | None


P = ParamSpec("P")
T = TypeVar("T")


def _once(
    function: Callable[Concatenate[ModelConfig, P], T],
) -> Callable[Concatenate[ModelConfig, P], T]:
    """Remember results by the model itself, as layouts share it; its fields cannot be hashed."""
    known: dict[Any, tuple[ModelConfig, T]] = {}

    @wraps(function)
    def call(model: ModelConfig, *args: P.args, **kwargs: P.kwargs) -> T:
        key = id(model), args
        if key not in known:
            known[key] = model, function(model, *args, **kwargs)  # alive, its id stays its own
        return known[key][1]

    return call


@_once
def parameters(model: ModelConfig) -> tuple[Sized, ...]:
    """Of the whole model."""
    named = meta_model(model).named_parameters()
    return tuple(Sized(n, tuple(p.shape), spec_of(p), _block(model, n)) for n, p in named)


def _block(model: ModelConfig, name: str) -> int | None:
    """The block, counted through encoder and decoder, that a parameter belongs to."""
    stack, _, rest = name.partition(".")
    if not rest.startswith("layers."):
        return None
    return int(rest.split(".")[1]) + (model.num_encoder_layers if stack == "decoder" else 0)


@_once
def of_stage(model: ModelConfig, stage: Stage) -> tuple[Sized, ...]:
    """The parameters that `stages.keep_only` leaves to a stage."""
    encoder = model.num_encoder_layers
    runs = {
        "encoder": range(encoder),
        "decoder": range(encoder, encoder + model.num_decoder_layers),
    }

    def here(p: Sized) -> bool:
        stack, _, rest = p.name.partition(".")
        if p.block is not None:
            return p.block in stage.blocks
        if rest.startswith("relative_bias"):
            return any(block in runs[stack] for block in stage.blocks)
        if stack in runs:  # the final norm
            return runs[stack][-1] in stage.blocks
        if stack == "embedding":
            return stage.first or (stage.last and model.tie_embeddings)
        return stage.last

    return tuple(p for p in parameters(model) if here(p))


@_once
def count_flops(model: ModelConfig, lengths: tuple[int, int]) -> int:
    """Of a sequence's forward pass."""
    sizes = count(model, encoder_length=lengths[0], decoder_length=lengths[1])
    return sizes.forward_flops_per_sequence


@_once
def balanced(model: ModelConfig, stages: int, lengths: tuple[int, int]) -> list[int]:
    """Blocks of each stage; see `stages.balance`."""
    return balance(model, stages, *lengths)
