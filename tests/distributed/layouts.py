"""Which layouts and options are proved to equal one process: `python -m tests.distributed.layouts`.

A case is a mesh with a value for every option that means something there. `make test` takes every
mesh of 2, 4 and 8 ranks, and as many cases as it needs for every possible pair of values; the long
tier takes every possible pair on every mesh.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from typing import Any, Literal

from megaswitch.config import (
    DataConfig,
    ModelConfig,
    MoEConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)

ROWS = 32  # of a global batch
ENCODER, DECODER = 12, 8  # tokens of a row
GROUP_ROWS = 2  # rows routed together
EXPERTS = 8
BLOCKS = 8  # of the longest pipelines; half of them are as good elsewhere, and take half as long
CLIP = 0.05  # below all gradient norms here


@dataclass(frozen=True)
class Grid:
    """A mesh: how many ranks along each axis."""

    pp: int = 1
    edp: int = 1
    ep: int = 1
    tp: int = 1

    @property
    def ranks(self) -> int:
        return self.pp * self.edp * self.ep * self.tp

    @property
    def dp(self) -> int:
        return self.edp * self.ep

    def __str__(self) -> str:
        axes = (f"{axis}{size}" for axis, size in asdict(self).items() if size > 1)
        return "·".join(axes) or "alone"


def grids(ranks: int) -> list[Grid]:
    """All meshes of so many ranks."""
    divisors = [n for n in range(1, ranks + 1) if ranks % n == 0]
    sizes = itertools.product(divisors, repeat=4)
    return [grid for grid in itertools.starmap(Grid, sizes) if grid.ranks == ranks]


GRIDS = [grid for ranks in (2, 4, 8) for grid in grids(ranks)]


@dataclass(frozen=True)
class Structure:
    """Options whose values depend on the mesh and on each other; None: means nothing there."""

    sequence_parallel: bool | None = None
    zero: Literal["none", "optimizer", "full"] | None = None
    replicas: int | None = None
    overlap_gradients: bool | None = None
    schedule: Literal["gpipe", "1f1b", "interleaved", "zero-bubble"] | None = None
    stages_per_rank: int | None = None
    ep_chunks: int | None = None
    micro_batches: int = 1


@dataclass(frozen=True)
class Free:
    """Options that any mesh takes. But for the third, they change what one process computes."""

    capacity_mode: Literal["group", "hf", "dropless"] = "group"
    dropout: float = 0.1
    activation_checkpointing: Literal[False, True, "selective"] = False
    tie_embeddings: bool = True
    activation: Literal["relu", "gated-gelu"] = "relu"
    aux_loss_reduction: Literal["sum", "mean"] = "sum"
    optimizer: Literal["adafactor", "adamw"] = "adamw"


FREE: dict[str, tuple[Any, ...]] = {
    "capacity_mode": ("group", "hf", "dropless"),
    "dropout": (0.1, 0.0),
    "activation_checkpointing": (False, True, "selective"),
    "tie_embeddings": (True, False),
    "activation": ("relu", "gated-gelu"),
    "aux_loss_reduction": ("sum", "mean"),
    "optimizer": ("adafactor", "adamw"),
}


@dataclass(frozen=True)
class Case:
    """A mesh and what is chosen there. None: as many blocks as the mesh needs."""

    grid: Grid = field(default_factory=Grid)
    structure: Structure = field(default_factory=Structure)
    free: Free = field(default_factory=Free)
    given_blocks: int | None = None

    @property
    def blocks(self) -> int:
        return self.given_blocks or (BLOCKS if self.grid.pp > 2 else BLOCKS // 2)

    @property
    def ranks(self) -> int:
        return self.grid.ranks

    def alone(self) -> Case:
        """The same model in one process, in one micro-batch and without any option of layouts."""
        free = replace(self.free, activation_checkpointing=False)
        return Case(Grid(), Structure(), free, self.blocks)

    def __str__(self) -> str:
        values = {**asdict(self.structure), **asdict(self.free)}
        told = (f"{k}={v}" for k, v in values.items() if v is not None)
        return f"{self.grid}: {', '.join(told)}"


def case(layout: str, **options: Any) -> Case:
    """A case such as case("ep2·tp2", zero="full"); what is not given takes the first value."""
    grid = Grid(**{axis: int(n) for axis, n in re.findall(r"(pp|edp|ep|tp)(\d+)", layout)})
    free = {k: options.pop(k) for k in FREE if k in options}
    fitting = [s for s in structures(grid) if all(getattr(s, k) == v for k, v in options.items())]
    assert fitting, f"{layout} has no structure with {options}"
    return Case(grid, fitting[0], Free(**free))


@cache
def structures(grid: Grid) -> list[Structure]:
    """Everything possible on a mesh."""
    values: Iterable[tuple[Any, ...]] = itertools.product(
        (True, False) if grid.tp > 1 else (None,),
        ("none", "optimizer", "full") if grid.dp > 1 else (None,),
        (None, 1, 2, 4),
        (None, True, False),
        ("1f1b", "gpipe", "interleaved", "zero-bubble") if grid.pp > 1 else (None,),
        (None, 1, 2),
        (1, 2) if grid.ep > 1 and EXPERTS // grid.ep % 2 == 0 else (None,),
        (1, 2, 4, 8),  # eight for long pipelines only, whose schedules need them
    )
    return [s for s in itertools.starmap(Structure, values) if _possible(grid, s)]


def _possible(grid: Grid, s: Structure) -> bool:
    sharded = s.zero in ("optimizer", "full")
    replicas = [n for n in (1, 2, 4) if grid.edp % n == 0 and n < grid.dp] if sharded else [None]
    overlaps = (True, False) if s.zero == "none" and grid.pp == 1 else (None,)
    several = s.schedule in ("interleaved", "zero-bubble")
    stages = [n for n in (1, 2) if grid.pp * n <= BLOCKS] if several else [None]
    return (
        s.replicas in replicas
        and s.overlap_gradients in overlaps
        and s.stages_per_rank in stages
        and ROWS // grid.dp % (GROUP_ROWS * s.micro_batches) == 0
        and s.micro_batches <= max(4, grid.pp)
        and _scheduled(grid.pp, s)
    )


def _scheduled(ranks: int, s: Structure) -> bool:
    """Whether torch's schedule takes so many micro-batches."""
    if s.schedule == "1f1b":
        return s.micro_batches >= ranks
    if s.schedule in ("interleaved", "zero-bubble"):
        return s.micro_batches % max(1, s.micro_batches // ranks) == 0
    return True


def config(case: Case, precision: Literal["fp32", "bf16"] = "fp32", **changes: Any) -> RunConfig:
    """The run of a case; `changes` are the model's."""
    grid, s, free = case.grid, case.structure, case.free
    given = {k: v for k, v in asdict(s).items() if v is not None and k != "micro_batches"}
    moe = {
        "num_experts": EXPERTS,
        "group_size": GROUP_ROWS * ENCODER,
        "capacity_mode": free.capacity_mode,
        "min_capacity": 1,
        "hf_capacity": 2,
        "aux_loss_weight": 0.3,
        "aux_loss_reduction": free.aux_loss_reduction,
        "z_loss_weight": 0.1,
        **changes.pop("moe", {}),
    }
    model = {
        "vocab_size": 97,
        "d_model": 16,
        "d_kv": 4,
        "d_ff": 32,
        "num_heads": 8,
        "num_encoder_layers": case.blocks // 2,
        "num_decoder_layers": case.blocks // 2,
        "dropout": free.dropout,
        "tie_embeddings": free.tie_embeddings,
        "activation": free.activation,
        **changes,
    }
    return RunConfig(
        model=ModelConfig(**model, moe=MoEConfig(**moe)),
        data=DataConfig(encoder_length=ENCODER, decoder_length=DECODER),
        train=TrainConfig(
            batch_size=ROWS,
            micro_batch_size=ROWS // grid.dp // s.micro_batches,
            activation_checkpointing=free.activation_checkpointing,
            logits_z_loss=0.01,
            precision=precision,
        ),
        parallel=ParallelConfig(pp=grid.pp, ep=grid.ep, tp=grid.tp, **given),
        optim=OptimConfig(
            name=free.optimizer,
            learning_rate=0.01,
            schedule="constant",
            warmup_steps=0,
            weight_decay=0.1,
            factored_min_dim=8,
        ),
    )


# A value of an option, or an axis of several ranks.
Item = tuple[str, Any]
Pair = tuple[Item, Item]


def axes(grid: Grid) -> list[Item]:
    """Those of several ranks."""
    return [(axis, "several") for axis, size in asdict(grid).items() if size > 1]


def items(case: Case) -> list[Item]:
    """What a case has that means something."""
    options = {**asdict(case.structure), **asdict(case.free)}
    return [*axes(case.grid), *((k, v) for k, v in options.items() if v is not None)]


def pairs(case: Case) -> Iterator[Pair]:
    """All pairs that a case covers."""
    return itertools.combinations(items(case), 2)


@cache
def possible_pairs(of: tuple[Grid, ...]) -> dict[Pair, None]:
    """All pairs that some case on these meshes covers, in a fixed order."""
    found: dict[Pair, None] = {}
    free = [Free(**dict(zip(FREE, v, strict=True))) for v in itertools.product(*FREE.values())]
    for grid in of:
        for number, structure in enumerate(structures(grid)):
            # All free options go with each other and with every structure: once is enough for the
            # former, and for the latter two that differ everywhere, or three.
            some = free if number == 0 else _unlike()
            for one in some:
                found.update(dict.fromkeys(pairs(Case(grid, structure, one))))
    return found


def _unlike() -> list[Free]:
    """Few, that have all values."""
    most = max(map(len, FREE.values()))
    return [Free(**{k: v[i % len(v)] for k, v in FREE.items()}) for i in range(most)]


def _best(of: Sequence[Grid], missing: dict[Pair, None], turn: int, wanted: Pair | None) -> Case:
    """A case on one of the meshes that covers much of what is missing, and `wanted` surely.

    `turn` decides which of equals comes first, so that all values take part.
    """
    fixed = dict(wanted or ())

    def gain(case: Case) -> float:
        return sum(pair in missing for pair in pairs(case)) - _cost(case)

    def fits(case: Case) -> bool:
        return all(item[0] in FREE or item in items(case) for item in wanted or ())

    free = Free(**{k: v for k, v in fixed.items() if k in FREE})
    candidates = [Case(grid, s, free) for grid in of for s in structures(grid)]
    best = max(_turned([c for c in candidates if fits(c)], 7 * turn), key=gain)
    for place, (option, values) in enumerate(FREE.items()):
        if option not in fixed:
            chosen = [
                replace(best.free, **{option: v}) for v in _turned(values, turn // (place + 1))
            ]
            best = max((replace(best, free=free) for free in chosen), key=gain)
    return best


def _cost(case: Case) -> float:
    """Of the time a case takes, in pairs: tensor-parallel ranks wait for each other most often."""
    return case.structure.micro_batches * case.grid.tp * case.ranks / 32


def _turned(values: Sequence[Any], turn: int) -> list[Any]:
    turn %= len(values)
    return [*values[turn:], *values[:turn]]


def cover(of: Sequence[Grid]) -> list[Case]:
    """Each mesh at least once, and every possible pair; the same at every call."""
    missing = dict(possible_pairs(tuple(of)))
    chosen: list[Case] = []

    def take(case: Case) -> None:
        chosen.append(case)
        for pair in pairs(case):
            missing.pop(pair, None)

    for grid in of:
        take(_best([grid], missing, len(chosen), None))
    while missing:
        take(_best(of, missing, len(chosen), next(iter(missing))))
    return chosen


# What decides where a router's tokens lie, when they are looked at, and how its losses travel.
ROUTED = ("capacity_mode", "dropout", "activation_checkpointing", "sequence_parallel", "zero",
          "schedule", "ep_chunks", "micro_batches")  # fmt: skip


def routed_pairs(case: Case) -> set[tuple[Item, ...]]:
    """The case's pairs of axes and of what a router meets; its other options one by one."""
    met = [item for item in items(case) if item[1] == "several" or item[0] in ROUTED]
    return {(item,) for item in items(case)} | set(itertools.combinations(met, 2))


@cache
def routed_cover(of: tuple[Grid, ...]) -> list[Case]:
    """Few cases on some meshes that have all their `routed_pairs`; the same at every call."""
    options = [k for k in FREE if k in ROUTED]
    free = []
    for number, chosen in enumerate(itertools.product(*(FREE[k] for k in options))):
        others = {k: v[number % len(v)] for k, v in FREE.items() if k not in options}
        free.append(Free(**dict(zip(options, chosen, strict=True)), **others))
    candidates = {}
    for grid in of:
        for structure in structures(grid):
            for one in free:
                case = Case(grid, structure, one)
                candidates[case] = routed_pairs(case)
    missing = set().union(*candidates.values())
    chosen_cases: list[Case] = []
    while missing:
        best = max(candidates, key=lambda case: len(missing & candidates[case]) - _cost(case))
        chosen_cases.append(best)
        missing -= candidates[best]
    return chosen_cases


@cache
def short_tier() -> list[Case]:
    """Of `make test`."""
    return cover(GRIDS)


@cache
def long_tier(grid: Grid) -> list[Case]:
    """Of `make test-long`, on one mesh."""
    return cover([grid])


def main() -> None:
    """Print what is covered."""
    short = short_tier()
    print(f"{'mesh':<20}ranks  possible  make test  make test-long  pairs")
    for grid in GRIDS:
        free = itertools.product(*FREE.values())
        possible = len(structures(grid)) * len(list(free))
        taken = sum(case.grid == grid for case in short)
        counts = (possible, taken, len(long_tier(grid)), len(possible_pairs((grid,))))
        print(
            f"{grid!s:<20}{grid.ranks:>5}{counts[0]:>10}{counts[1]:>11}{counts[2]:>16}{counts[3]:>7}"
        )
    print(f"\nmake test: {len(short)} cases, all {len(possible_pairs(tuple(GRIDS)))} pairs")
    total = sum(len(long_tier(grid)) for grid in GRIDS)
    print(f"make test-long: {total} cases, all pairs on every mesh\n")
    for case in short:
        print(case)


if __name__ == "__main__":
    main()
