"""Memory and time of one layout on a machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megaswitch.config import RunConfig
from megaswitch.scale.hardware import Hardware
from megaswitch.scale.holdings import Holdings, Memory
from megaswitch.scale.profiles import Profiles
from megaswitch.scale.sizes import count_flops
from megaswitch.scale.times import Checkpoint, Seconds, Times


@dataclass(frozen=True)
class Estimate:
    """What a layout is expected to cost."""

    config: RunConfig
    world: int
    memory: Memory
    seconds: Seconds
    checkpoint: Checkpoint
    tokens_per_second: float
    mfu: float


def fullest(
    config: RunConfig,
    world: int,
    lengths: tuple[int, int],
    profile_of: Profiles,
    hardware: Hardware,
    busiest: Mapping[str, float] | None = None,
) -> Memory:
    """Of the pipeline rank that needs most; see `estimate`."""
    held = Holdings(config, world, lengths, hardware)
    profile = profile_of(config.parallel.tp, config.parallel.ep > 1)
    ranks = (held.memory(r, profile, busiest or {}) for r in range(held.pp))
    return max(ranks, key=lambda memory: memory.total)


def at_least(config: RunConfig, world: int, lengths: tuple[int, int], hardware: Hardware) -> float:
    """Bytes of what stays between steps, on the pipeline rank that has most of it."""
    held = Holdings(config, world, lengths, hardware)
    return max(held.least(r).total for r in range(held.pp))


def estimate(
    config: RunConfig,
    world: int,
    lengths: tuple[int, int],
    profile_of: Profiles,
    hardware: Hardware,
    busiest: Mapping[str, float] | None = None,
    memory: Memory | None = None,
) -> Estimate:
    """Of a configuration that fits `world` ranks.

    Args:
        config: of the run.
        world: ranks.
        lengths: of encoder and decoder rows.
        profile_of: of `tp` and whether experts lie on several ranks.
        hardware: of each rank.
        busiest: by stack, rows of the busiest expert-parallel rank by an even share; None: even.
        memory: as `fullest` says, if it is known.
    """
    times = Times(config, world, lengths, hardware)
    profile = profile_of(config.parallel.tp, config.parallel.ep > 1)
    memory = memory or fullest(config, world, lengths, profile_of, hardware, busiest)
    seconds = times.seconds(profile, busiest or {})
    rows = config.train.batch_size
    flops = 3 * count_flops(config.model, lengths) * rows
    return Estimate(
        config,
        world,
        memory,
        seconds,
        times.checkpoint(),
        rows * sum(lengths) / seconds.total,
        flops / seconds.total / (world * hardware.flops(bf16=times.bf16)),
    )
