"""Layouts of a run on a machine, searched: the fastest that fit, and why others do not."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cache
from typing import Any, Literal

from megaswitch.config import ParallelConfig, RunConfig, load_config
from megaswitch.presets import PRESETS
from megaswitch.rules import check
from megaswitch.scale.estimate import Estimate, at_least, estimate, fullest
from megaswitch.scale.hardware import Hardware, known, load_hardware
from megaswitch.scale.holdings import Memory
from megaswitch.scale.layout import Layout
from megaswitch.scale.profile import smallest_micro_batch
from megaswitch.scale.profiles import Profiles, profiles_of
from megaswitch.scale.routing import shares, simulate_routing
from megaswitch.train.placement import row_lengths

_ZERO: tuple[Literal["none", "optimizer", "full"], ...] = ("none", "optimizer", "full")
_STAGES = 16  # most pipeline ranks that are tried
_MICRO_BATCHES = (1, 2, 4, 8)  # multiples of the smallest that are tried
_DRAWN = 4  # layers whose routing is drawn
_DAY = 86400.0
_SLOWER = "fits, but is slower"
_UNEVEN = "has parameters that parallel.zero cannot cut evenly"
# By how much more ranks are tried where nothing fits.
_MORE_RANKS = (Fraction(5, 4), Fraction(3, 2), *map(Fraction, (2, 3, 4, 6, 8, 12, 16)))


@dataclass
class Plan:
    """What a search found.

    Attributes:
        hardware: of each rank.
        world: ranks.
        best: those that fit, the fastest first.
        rejected: how many layouts were not taken, by reason.
        smallest: where nothing fits, the layout that needs least memory.
        remedies: what would make it fit, the smallest change first; empty where something fits.
    """

    hardware: Hardware
    world: int
    best: list[Estimate] = field(default_factory=list)
    rejected: Counter[str] = field(default_factory=Counter)
    smallest: Estimate | None = None
    remedies: list[str] = field(default_factory=list)


def preset_run(name: str, overrides: Sequence[str] = ()) -> RunConfig:
    """A preset in bf16 with batches of 2048 sequences, as the paper's.

    Args:
        name: of `presets.PRESETS`.
        overrides: such as "--train.batch_size=8192".
    """
    table = PRESETS[name].get("moe", {})
    rows = max(1, table.get("group_size", 512) // 512)
    words = ("--train.precision=bf16", "--train.batch_size=2048")
    preset = (f"--model.preset={name}", f"--train.micro_batch_size={rows}", *words)
    return load_config(None, (*preset, *overrides))


def search(
    config: RunConfig,
    world: int,
    hardware: Hardware,
    *,
    keep: int = 5,
    routing: str = "uniform",
    profiles: Profiles | None = None,
    processes: int = 1,
) -> Plan:
    """Try layouts of `config`, whose own layout counts for nothing but its other options.

    What changes results is left as it is: model, batch, precision, optimizer.

    Args:
        config: of the run.
        world: ranks.
        hardware: of each.
        keep: how many of the best.
        routing: how tokens spread over experts; see `routing.shares`.
        profiles: of an earlier search with the same model; None: make them.
        processes: how many make profiles; see `profiles_of`.
    """
    lengths = row_lengths(config)
    busiest = _busiest(config, lengths, routing)
    plan = Plan(hardware, world)
    allowed = list(_allowed(config, plan, lengths))
    if profiles is None:
        hopeful = [one for group in allowed for need, one in group if need <= hardware.memory]
        ahead = {(one.parallel.tp, one.parallel.ep > 1) for one in hopeful}
        profiles = profiles_of(config, hardware, ahead, processes)
    found: list[Estimate] = []
    unfit: list[tuple[float, RunConfig]] = []
    for group in allowed:
        fitting: list[RunConfig] = []
        for need, candidate in group:
            if any(_is_slower(candidate, other) for other in fitting):
                plan.rejected[_SLOWER] += 1
                continue
            if need <= hardware.memory:
                uneven = busiest(candidate.parallel.ep)
                memory = fullest(candidate, world, lengths, profiles, hardware, uneven)
                need = memory.total
            if need <= hardware.memory:
                fitting.append(candidate)
                found.append(
                    estimate(candidate, world, lengths, profiles, hardware, uneven, memory)
                )
            else:
                plan.rejected["needs more memory than a GPU has"] += 1
                unfit.append((need, candidate))
    found.sort(key=lambda e: e.seconds.total)
    plan.best = found[:keep]
    plan.rejected[_SLOWER] += len(found) - len(plan.best)
    if not found:
        plan.smallest = _smallest(unfit, lambda c: estimate(
            c, world, lengths, profiles, hardware, busiest(c.parallel.ep)
        ))  # fmt: skip
        plan.remedies = list(_remedies(config, plan, profiles))
    return plan


def _allowed(
    config: RunConfig, plan: Plan, lengths: tuple[int, int]
) -> Iterator[list[tuple[float, RunConfig]]]:
    """Layouts that keep the rules, with the bytes that each needs at least, as `_candidates`."""
    world, hardware = plan.world, plan.hardware
    for variants in _candidates(config, world, hardware, lengths):
        if problems := check(variants[0], world):
            plan.rejected[_rule(problems[0])] += len(variants)
            continue
        each = [one for one in variants if Layout(one, world, lengths, hardware).can_shard()]
        plan.rejected[_UNEVEN] += len(variants) - len(each)
        yield [(at_least(one, world, lengths, hardware), one) for one in each]


def _smallest(
    unfit: list[tuple[float, RunConfig]], estimated: Callable[[RunConfig], Estimate]
) -> Estimate | None:
    """Of layouts with the bytes that each needs at least, the one that needs least in all."""
    best: Estimate | None = None
    for least, candidate in sorted(unfit, key=lambda pair: pair[0]):
        if best and least >= best.memory.total:
            break
        one = estimated(candidate)
        if best is None or one.memory.total < best.memory.total:
            best = one
    return best


def _is_slower(one: RunConfig, other: RunConfig) -> bool:
    """Whether `one` computes or gathers more than `other`, which fits, and is else the same.

    What hides communication hides less than it takes, so that more of either is never faster.
    """
    again, zero = one.train.activation_checkpointing, one.parallel.zero
    gathers_more = zero == "full" and other.parallel.zero == "optimizer"
    computes_more = again and not other.train.activation_checkpointing
    same = again == other.train.activation_checkpointing
    if zero == other.parallel.zero:
        return computes_more
    return gathers_more and (same or computes_more)


def _busiest(config: RunConfig, lengths: tuple[int, int], routing: str) -> Any:
    """By expert-parallel ranks: by stack, the rows of the busiest by an even share.

    Ranks wait for each other in every micro-batch, so a micro-batch of all of them is drawn.
    """
    if routing != "uniform":
        shares(routing, config.model.moe.num_experts)  # complains if it makes no sense

    @cache
    def of(ep: int) -> dict[str, float]:
        if routing == "uniform" or ep == 1:
            return {}
        train = replace(config.train, batch_size=ep * config.train.micro_batch_size)
        one = replace(config, train=train, parallel=replace(config.parallel, ep=ep))
        loads = simulate_routing(one, routing, lengths, most_layers=_DRAWN)
        return {stack: load.busiest_rank for stack, load in loads.items()}

    return of


def _rule(problem: str) -> str:
    """The keys that a problem speaks of, to count problems alike together."""
    return "breaks the rule of " + problem.split("=")[0].strip()


def _candidates(
    config: RunConfig, world: int, hardware: Hardware, lengths: tuple[int, int]
) -> Iterator[list[RunConfig]]:
    """Layouts, those together that keep or break the same rules."""
    model = config.model
    experts = model.moe.num_experts
    blocks = model.num_encoder_layers + model.num_decoder_layers
    for tp in _divisors(min(world, hardware.node_gpus)):
        if world % tp or model.num_heads % tp:
            continue
        unit = smallest_micro_batch(config, lengths, tp)
        for pp in _divisors(world // tp):
            if pp > min(_STAGES, blocks):
                break
            ranks = world // (tp * pp)
            for ep in _divisors(math.gcd(experts, ranks)) if experts else [1]:
                for times in _MICRO_BATCHES:
                    if unit * times * ranks > config.train.batch_size:
                        break
                    yield from _options(config, (pp, ep, tp), unit * times, ranks)


def _options(
    config: RunConfig, sizes: tuple[int, int, int], rows: int, ranks: int
) -> Iterator[list[RunConfig]]:
    """One list for each schedule, the least memory last."""
    pp, ep, tp = sizes
    own = config.parallel
    schedules: list[dict[str, Any]] = [{}]
    if pp > 1:
        schedules = [{"schedule": "1f1b"}, {"schedule": "interleaved", "stages_per_rank": 2}]
    trains = [
        replace(config.train, micro_batch_size=rows, activation_checkpointing=again)
        for again in (False, True)
    ]
    for schedule in schedules:
        parallels = [
            ParallelConfig(
                pp=pp, ep=ep, tp=tp, zero=zero, sequence_parallel=own.sequence_parallel,
                timeout=own.timeout, **schedule,
            )
            for zero in (_ZERO if ranks > 1 else ("none",))
        ]  # fmt: skip
        yield [replace(config, train=t, parallel=p) for p in parallels for t in trains]


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _remedies(config: RunConfig, plan: Plan, profiles: Profiles) -> Iterator[str]:
    """What to change where nothing fits, each tried before it is told, what costs least first.

    Another optimizer; more ranks, the fewest of some; GPUs with more memory.
    """
    if plan.smallest is None:
        yield (
            f"no layout of {plan.world} ranks keeps the rules; see the reasons above. Larger "
            "batches (--train.batch_size) or another number of ranks (--world) allow more"
        )
        return
    world, hardware, told = plan.world, plan.hardware, False
    if config.optim.name == "adamw":
        lean = replace(config, optim=replace(config.optim, name="adafactor"))
        if fits := _first_fit(lean, world, hardware, profiles):
            yield f"--optim.name=adafactor needs {fits.total / 1e9:.0f} GB on a GPU"
            told = True
    for more, words, other in _more_ranks(config, world, hardware):
        if fits := _first_fit(other, more, hardware, profiles):
            yield f"--world {more}{words} needs {fits.total / 1e9:.0f} GB on a GPU"
            told = True
            break
    machines = [(name, load_hardware(name)) for name in known()]
    for name, machine in sorted(machines, key=lambda pair: pair[1].memory):
        larger = machine.memory > hardware.memory and machine.device == hardware.device
        if larger and (fits := _first_fit(config, world, machine, profiles)):
            yield f"--hardware {name} needs {fits.total / 1e9:.0f} GB on a GPU"
            told = True
            break
    if not told:
        need = plan.smallest.memory.total / 1e9
        yield (
            f"the leanest layout needs GPUs of {need:.0f} GB, and {hardware.name} has "
            f"{hardware.memory / 1e9:.0f} GB; choose a smaller model or other --hardware"
        )


def _more_ranks(
    config: RunConfig, world: int, hardware: Hardware
) -> Iterator[tuple[int, str, RunConfig]]:
    """More and more ranks of whole nodes, with the batch as it is and then with one as large."""
    unit = hardware.node_gpus if world >= hardware.node_gpus else 1
    for times in _MORE_RANKS:
        more = world * times
        if more.denominator != 1 or more % unit:
            continue
        yield int(more), "", config
        batch = config.train.batch_size * times
        if batch.denominator == 1:
            train = replace(config.train, batch_size=int(batch))
            yield int(more), f" --train.batch_size={batch}", replace(config, train=train)


def _first_fit(
    config: RunConfig, world: int, hardware: Hardware, profiles: Profiles
) -> Memory | None:
    """Of the first layout that fits, if one does."""
    lengths = row_lengths(config)
    for variants in _candidates(config, world, hardware, lengths):
        if not check(variants[0], world):
            for candidate in reversed(variants):  # the leanest first
                if not Layout(candidate, world, lengths, hardware).can_shard():
                    continue
                memory = fullest(candidate, world, lengths, profiles, hardware)
                if memory.total <= hardware.memory:
                    return memory
    return None


def tokens_of_run(config: RunConfig) -> float:
    """Tokens of both streams that the run's steps read."""
    return float(config.train.steps * config.train.batch_size * sum(row_lengths(config)))


def days(one: Estimate, tokens: float, hardware: Hardware) -> tuple[float, float]:
    """Days to read so many tokens without a failure, and with failures.

    A failure loses half of what lies between two checkpoints, and ten minutes to start again.
    """
    seconds = tokens / one.tokens_per_second
    interval = (one.config.checkpoint.interval or one.config.train.steps) * one.seconds.total
    between = hardware.hours_between_failures * 3600 / one.world
    lost = min(interval, seconds) / 2 + 600
    return seconds / _DAY, seconds * (1 + lost / between) / _DAY


def as_table(plan: Plan, tokens: float) -> dict[str, Any]:
    """For programs. Bytes, seconds, days and dollars."""
    return {
        "world": plan.world,
        "hardware": dataclasses.asdict(plan.hardware),
        "tokens": tokens,
        "best": [_row(one, tokens, plan.hardware) for one in plan.best],
        "rejected": {reason: n for reason, n in plan.rejected.most_common() if n},
        "leanest": _row(plan.smallest, tokens, plan.hardware) if plan.smallest else None,
        "remedies": plan.remedies,
    }


def _row(one: Estimate, tokens: float, hardware: Hardware) -> dict[str, Any]:
    parallel, train = one.config.parallel, one.config.train
    smooth, real = days(one, tokens, hardware)
    return {
        "pp": parallel.pp,
        "ep": parallel.ep,
        "tp": parallel.tp,
        "edp": one.world // (parallel.pp * parallel.ep * parallel.tp),
        "schedule": parallel.schedule,
        "stages_per_rank": parallel.stages_per_rank,
        "zero": parallel.zero,
        "micro_batch_size": train.micro_batch_size,
        "activation_checkpointing": train.activation_checkpointing,
        "memory": {**vars(one.memory), "total": one.memory.total},
        "seconds": {**vars(one.seconds), "total": one.seconds.total},
        "checkpoint": vars(one.checkpoint),
        "tokens_per_second": one.tokens_per_second,
        "mfu": one.mfu,
        "days": smooth,
        "days_with_failures": real,
        "dollars": real * 24 * one.world * hardware.dollars_per_hour,
    }
