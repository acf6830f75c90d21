"""A training step of a whole world, from one rehearsed rank of each kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megaswitch.config import RunConfig
from megaswitch.model.count import block_flops, head_flops
from megaswitch.model.stages import balance
from megaswitch.scale.hardware import Hardware
from megaswitch.scale.rehearsal import RankStep, rehearse_rank, schedule_orders
from megaswitch.scale.routing import Load, simulate_routing
from megaswitch.scale.timeline import Span, lay_out
from megaswitch.train.placement import row_lengths


@dataclass(frozen=True)
class Simulation:
    """What `megaswitch simulate` tells.

    Attributes:
        world: ranks.
        steps: of the rehearsed ranks.
        seconds: of each rank's step, see `step_seconds`; empty where no hardware is known.
        loads: of the experts, by stack.
        spans: of the pipeline, in forward FLOPs of a micro-batch; empty without one.
    """

    world: int
    steps: list[RankStep]
    seconds: list[dict[str, float]]
    loads: dict[str, Load]
    spans: list[Span]

    @property
    def total_parameters(self) -> int | None:
        """Of the whole model, if a rank of each place in the pipeline was rehearsed.

        A weight that several ranks hold counts once: on the first pipeline rank that has it, and of
        its copies and slices all together.
        """
        return sum(s.parameters_counted for s in self.steps) if self.is_whole else None

    @property
    def is_whole(self) -> bool:
        """Whether every place in the pipeline was rehearsed, by ranks that count."""
        return len({s.pipeline_rank for s in self.steps}) == self.places

    @property
    def places(self) -> int:
        """Pipeline ranks."""
        return max((span.rank + 1 for span in self.spans), default=1)


def simulate(
    config: RunConfig,
    world: int,
    ranks: Sequence[int] | None,
    kind: str,
    routing: str,
    hardware: Hardware | None = None,
) -> Simulation:
    """Rehearse ranks, lay the pipeline out and draw the routing of the whole world.

    Args:
        config: which fits `world` ranks.
        world: ranks.
        ranks: those to rehearse; None: the first of each place in the pipeline, which all others
            there are like.
        kind: whose kernels: "cpu" or "cuda".
        routing: see `routing.shares`.
        hardware: of each rank, to tell times, too.
    """
    lengths = row_lengths(config)
    loads = simulate_routing(config, routing, lengths)
    pp = config.parallel.pp
    chosen = range(0, world, world // pp) if ranks is None else ranks
    steps = [rehearse_rank(config, world, rank, kind) for rank in chosen]
    seconds = [step_seconds(step, config, world, hardware) for step in steps] if hardware else []
    spans = timeline(config, world, lengths) if pp > 1 else []
    return Simulation(world, steps, seconds, loads, spans)


def step_seconds(
    step: RankStep, config: RunConfig, world: int, hardware: Hardware
) -> dict[str, float]:
    """What a rehearsed rank's step takes: "compute", and what it tells others by axis.

    Nothing hides behind anything else, and nobody waits: on CPUs these are the seconds that a rank
    keeps its cores busy.
    """
    axes = _axes(config, world)
    seconds = {"compute": hardware.seconds_of(step.work, bf16=config.train.precision == "bf16")}
    for kind, calls in step.collectives.items():
        ranks, stride = axes[kind.axis]
        took = hardware.seconds_to_send(
            kind.operation, calls * kind.size, calls=calls, ranks=ranks, stride=stride
        )
        seconds[kind.axis] = seconds.get(kind.axis, 0.0) + took
    return seconds


def _axes(config: RunConfig, world: int) -> dict[str, tuple[int, int]]:
    """By name of an axis, its ranks and how far apart they stand, in the order of `Mesh`."""
    parallel = config.parallel
    pp, ep, tp = parallel.pp, parallel.ep, parallel.tp
    edp = world // (pp * ep * tp)
    replicas = parallel.replicas if parallel.zero != "none" else edp
    shards = edp // replicas
    return {
        "tp": (tp, 1),
        "ep": (ep, tp),
        "edp": (edp, ep * tp),
        "dp": (edp * ep, tp),
        "shard": (shards, ep * tp),
        "dense_shard": (shards * ep, tp),
        "replica": (replicas, shards * ep * tp),
        "pp": (pp, world // pp),
        "world": (world, 1),
    }


def timeline(config: RunConfig, world: int, lengths: tuple[int, int]) -> list[Span]:
    """A pipeline's step, each action as long as its FLOPs, in those of an even forward pass."""
    costs = stage_costs(config, lengths)
    return lay_out(schedule_orders(config, world), len(costs), costs)


def stage_costs(config: RunConfig, lengths: tuple[int, int]) -> list[dict[str, float]]:
    """By stage, what each kind of action costs; 1 is the mean forward pass of a stage."""
    parallel = config.parallel
    number = parallel.pp * parallel.stages_per_rank
    counts = parallel.layers_per_stage or balance(config.model, number, *lengths)
    blocks = block_flops(config.model, *lengths)
    head = head_flops(config.model, lengths[1])
    mean = (sum(blocks) + head) / number
    costs: list[dict[str, float]] = []
    for index, count in enumerate(counts):
        start = sum(counts[:index])
        own = sum(blocks[start : start + count]) + (head if index == number - 1 else 0)
        again = 1 if config.train.activation_checkpointing is True else 0
        factors = {"FORWARD": 1, "FULL_BACKWARD": 2 + again, "BACKWARD_INPUT": 1 + again,
                   "BACKWARD_WEIGHT": 1}  # fmt: skip
        costs.append({kind: factor * own / mean for kind, factor in factors.items()})
    return costs


def as_table(simulation: Simulation) -> dict[str, Any]:
    """For programs."""
    return {
        "world": simulation.world,
        "total_parameters": simulation.total_parameters,
        "ranks": [
            {
                "rank": s.rank,
                "pipeline_rank": s.pipeline_rank,
                "blocks": list(s.blocks),
                "parameters": s.parameters,
                "peak_bytes": s.peak,
                "peak_bytes_by_kind": s.memory,
                "resident_bytes": s.resident,
                "flops": s.work.flops,
                "moved_bytes": s.work.moved,
                "operations": s.work.operations,
                "micro_batches": s.micro_batches,
                "collectives": [
                    {"operation": c.operation, "axis": c.axis, "bytes": c.size, "calls": n}
                    for c, n in s.collectives.items()
                ],
            }
            for s in simulation.steps
        ],
        "seconds": simulation.seconds,
        "routing": {stack: vars(load) for stack, load in simulation.loads.items()},
    }
