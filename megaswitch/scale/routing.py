"""How tokens may spread over experts, drawn for the whole world at once.

A rehearsed rank has no tokens. What routing does to a run, drops and ranks that wait for the
busiest, depends on all routing groups of a step, so all are drawn, layer by layer, with numpy.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megaswitch.config import RunConfig
from megaswitch.log import UserError
from megaswitch.model.router import expert_capacity
from megaswitch.model.switch_transformer import rows_per_group

_GROUPS = 4096  # most groups drawn of a layer; more would not change the means


@dataclass(frozen=True)
class Load:
    """What routing does in a step, over the world.

    Attributes:
        dropped: share of tokens that found their expert full.
        busiest_expert: its tokens over an even share, before drops.
        busiest_rank: rows that the busiest rank computes over an even share.
    """

    dropped: float
    busiest_expert: float
    busiest_rank: float


def shares(model: str, experts: int) -> NDArray[np.float64]:
    """Each expert's share of the tokens: `uniform`, `zipf:EXPONENT` or a file of counts.

    Args:
        model: as above; a file is a JSON list of numbers, such as tokens counted by a run.
        experts: how many.

    Raises:
        UserError: `model` is none of these.
    """
    weights: NDArray[np.float64]
    if model == "uniform":
        weights = np.ones(experts)
    elif model.startswith("zipf:"):
        try:
            exponent = float(model.removeprefix("zipf:"))
            weights = np.power(np.arange(1.0, experts + 1), -exponent)
        except ValueError:
            raise UserError(f"routing {model!r} has no exponent; write e.g. zipf:0.5") from None
    else:
        weights = _measured(Path(model), experts)
    if not np.isfinite(weights).all() or weights.min() < 0 or not weights.sum():
        raise UserError(f"routing {model!r} gives shares that are no distribution of {experts}")
    return weights / weights.sum()


def _measured(path: Path, experts: int) -> NDArray[np.float64]:
    try:
        weights = np.asarray(json.loads(path.read_text(encoding="utf-8")), dtype=np.float64)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"routing {str(path)!r} is neither 'uniform' nor 'zipf:EXPONENT' nor a readable JSON "
            f"list of tokens by expert ({error})"
        ) from None
    if weights.shape != (experts,):
        raise UserError(
            f"{path} lists {weights.size} numbers; it must list one for each of {experts} experts"
        )
    return weights


def simulate_routing(
    config: RunConfig,
    model: str,
    lengths: tuple[int, int],
    *,
    seed: int = 0,
    most_layers: int | None = None,
) -> dict[str, Load]:
    """Draw a step of the global batch; the load of each stack's Switch layers, on average.

    Args:
        config: of the run.
        model: see `shares`.
        lengths: of encoder and decoder rows.
        seed: of the draws.
        most_layers: to draw of a stack; None: all.

    Returns:
        by stack that has Switch layers.
    """
    moe = config.model.moe
    if not moe.num_experts:
        return {}
    share = shares(model, moe.num_experts)
    random = np.random.default_rng(seed)
    found = {}
    for stack, length in zip(("encoder", "decoder"), lengths, strict=True):
        layers = sum(name.startswith(stack) for name in config.model.switch_layers())
        if layers:
            drawn = range(min(layers, most_layers or layers))
            loads = [_layer(config, share, length, lengths[0], random) for _ in drawn]
            fields = ("dropped", "busiest_expert", "busiest_rank")
            found[stack] = Load(*(float(np.mean([getattr(x, f) for x in loads])) for f in fields))
    return found


def _layer(
    config: RunConfig,
    share: NDArray[np.float64],
    length: int,
    encoder_length: int,
    random: np.random.Generator,
) -> Load:
    """One layer: which experts are popular is drawn anew."""
    moe, rows = config.model.moe, rows_per_group(config.model, encoder_length)
    size = rows * length
    groups = min(_GROUPS, max(1, config.train.batch_size // rows))
    counts = random.multinomial(size, random.permutation(share), size=groups)
    slots = size
    if moe.capacity_mode == "hf":
        slots = moe.hf_capacity
    elif moe.capacity_mode == "group":
        factor, least = moe.train_capacity_factor, moe.min_capacity
        slots = expert_capacity(size, moe.num_experts, factor, least)
    kept = np.minimum(counts, slots)
    ranks = kept.sum(0).reshape(config.parallel.ep, -1).sum(1)
    return Load(
        dropped=1.0 - kept.sum() / counts.sum(),
        busiest_expert=counts.sum(0).max() / counts.sum(0).mean(),
        busiest_rank=ranks.max() / ranks.mean(),
    )
