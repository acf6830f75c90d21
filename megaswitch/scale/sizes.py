"""Parameters, stages and FLOPs of a model, found once for all the layouts that share it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import wraps
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar

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


Kind = tuple[str, bool]  # stack, and whether the block is sparse


@dataclass(frozen=True)
class Alike:
    """Blocks of one kind whose parameters have the same shapes; those of one of them."""

    kind: Kind
    number: int
    parameters: tuple[Sized, ...]


@dataclass(frozen=True)
class Held:
    """What some stages hold, each parameter once: blocks, and what lies beside them."""

    blocks: tuple[Alike, ...]
    ends: tuple[Sized, ...]

    @property
    def groups(self) -> list[tuple[Sized, ...]]:
        """Parameters of a block of each sort, and the ends."""
        return [*(alike.parameters for alike in self.blocks), self.ends]


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
def held_by(model: ModelConfig, stages: tuple[Stage, ...]) -> Held:
    """The parameters of stages that are on one rank."""
    ends = {p.name: p for s in stages for p in of_stage(model, s) if p.block is None}
    sorts = _sorts(model)
    numbers = Counter(id(sorts[block]) for s in stages for block in s.blocks)
    first = {id(sort): sort for sort in sorts}
    blocks = (Alike(first[key].kind, number, first[key].parameters) for key, number in
              numbers.items())  # fmt: skip
    return Held(tuple(blocks), tuple(ends.values()))


@_once
def _sorts(model: ModelConfig) -> list[Alike]:
    """Of each block, the first that is like it, so that sums over it can be remembered."""
    of_block: dict[int, list[Sized]] = defaultdict(list)
    for p in parameters(model):
        if p.block is not None:
            of_block[p.block].append(p)
    known: dict[Any, Alike] = {}
    found = []
    for block in sorted(of_block):
        own, kind = of_block[block], _kind(model, block)
        key = kind, tuple((p.shape, p.spec) for p in own)
        found.append(known.setdefault(key, Alike(kind, 1, tuple(own))))
    return found


def _kind(model: ModelConfig, block: int) -> Kind:
    encoder = block < model.num_encoder_layers
    stack: Literal["encoder", "decoder"] = "encoder" if encoder else "decoder"
    return stack, model.is_sparse(stack, block if encoder else block - model.num_encoder_layers)


@_once
def count_flops(model: ModelConfig, lengths: tuple[int, int]) -> int:
    """Of a sequence's forward pass."""
    sizes = count(model, encoder_length=lengths[0], decoder_length=lengths[1])
    return sizes.forward_flops_per_sequence


@_once
def balanced(model: ModelConfig, stages: int, lengths: tuple[int, int]) -> list[int]:
    """Blocks of each stage; see `stages.balance`."""
    return balance(model, stages, *lengths)


@_once
def sums_of(model: ModelConfig, *given: Hashable) -> dict[tuple[str, int], Any]:
    """Empty, for sums over parameters that layouts remember; they depend on what is given alone."""
    return {}
