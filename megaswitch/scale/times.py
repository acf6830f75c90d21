"""Time of a step of one layout, put together from profiles of blocks and a machine's figures."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import astuple, dataclass

from megaswitch.model.stages import Stage
from megaswitch.optim.adafactor_math import slices_at_once
from megaswitch.optim.piles import at_most
from megaswitch.parallel.shard import ShardSpec
from megaswitch.scale.layout import Layout
from megaswitch.scale.profile import PER_WEIGHT, Cost, Profile
from megaswitch.scale.recorder import Work
from megaswitch.scale.sizes import Held, Sized, held_by
from megaswitch.scale.updates import Way, is_joint, is_native

_BUCKET = 32 << 20  # bytes of gradients that are summed in one call, as in `parallel.gradients`


@dataclass(frozen=True)
class Seconds:
    """Of a step. Communication that hides behind computing, as on GPUs, is left out.

    `imbalance` is spent waiting for the rank whose experts got most tokens.
    """

    compute: float
    imbalance: float
    tensor_parallel: float
    expert_parallel: float
    data_parallel: float
    bubble: float
    optimizer: float
    checkpoint: float

    @property
    def total(self) -> float:
        """All of them."""
        return sum(vars(self).values())


@dataclass(frozen=True)
class Checkpoint:
    """Bytes of a checkpoint; seconds to copy it to the hosts, and to write it from there."""

    size: float
    copy: float
    write: float


@dataclass(frozen=True)
class _MicroBatch:
    """Seconds of one micro-batch, forward and backward."""

    compute: float = 0.0
    imbalance: float = 0.0
    tensor_parallel: float = 0.0
    expert_parallel: float = 0.0

    def __add__(self, other: _MicroBatch) -> _MicroBatch:
        pairs = zip(astuple(self), astuple(other), strict=True)
        return _MicroBatch(*(a + b for a, b in pairs))

    @property
    def total(self) -> float:
        return float(sum(astuple(self)))


class Times(Layout):
    """What each rank of a layout takes."""

    def seconds(self, profile: Profile, busiest: Mapping[str, float]) -> Seconds:
        """Of a step.

        Args:
            profile: of the blocks.
            busiest: by stack, rows of the busiest expert-parallel rank by an even share.
        """
        stages = [self._stage(s, profile, busiest) for s in self.stages]
        own = [sum(stages[r :: self.pp], _MicroBatch()) for r in range(self.pp)]
        one = max(own, key=lambda m: m.total)
        bubble = self.waits * one.total
        ranks = map(self.held, range(self.pp))
        held = max(ranks, key=lambda held: self.total(self.sliced, held))
        update = Work()
        for way, (numbers, pieces) in self._updated(held).items():
            cost = profile.update[way]
            update += Work(moved=numbers * cost.moved, operations=pieces * cost.operations)
        m = self.micro
        parts = {
            "compute": m * one.compute,
            "imbalance": m * one.imbalance,
            "tensor_parallel": m * one.tensor_parallel,
            "expert_parallel": m * one.expert_parallel,
            "data_parallel": self._data_parallel(held, one.total),
            "bubble": bubble,
            "optimizer": self.hardware.seconds_of(update, bf16=False),
        }
        return Seconds(**parts, checkpoint=self._stall(sum(parts.values())))

    @property
    def waits(self) -> float:
        """How long a rank waits in a step, in micro-batches of all its stages.

        The first micro-batches fill the pipeline; where they are fewer than its ranks, a rank also
        waits for its next stage.
        """
        parallel, missing = self.config.parallel, max(0, self.pp - self.micro)
        waits = missing + (min(self.micro, self.pp) - 1) / parallel.stages_per_rank
        return waits / 3 if parallel.schedule == "zero-bubble" else waits

    def checkpoint(self) -> Checkpoint:
        """Each weight and state is written by one rank; the ranks that have most take longest."""
        everything = held_by(self.config.model, tuple(self.stages))
        size = self.total(self._global, everything)
        slowest = max(self.total(self._saved, self.held(r)) for r in range(self.pp))
        bandwidths = self.hardware.host_bandwidth, self.hardware.disk_bandwidth
        return Checkpoint(size, *(slowest / bandwidth for bandwidth in bandwidths))

    def _updated(self, held: Held) -> dict[Way, tuple[float, float]]:
        """By how parameters are updated, the numbers in them and the pieces; see `Updates`.

        Remembered as `_sum` is.
        """
        key = "_updated", id(held)
        if key not in self._sums:
            alike: Counter[tuple[tuple[int, ...], ShardSpec]] = Counter()
            for number, group in [*((a.number, a.parameters) for a in held.blocks), (1, held.ends)]:
                for p in group:
                    alike[p.shape, p.spec] += number
            found: dict[Way, tuple[float, float]] = {}
            for (shape, spec), number in alike.items():
                p = Sized("", shape, spec, None)
                way, pieces = self._way(p, number)
                numbers, before = found.get(way, (0.0, 0.0))
                found[way] = numbers + number * self.sharded(p), max(1.0, before + pieces)
            self._sums[key] = found
        known: dict[Way, tuple[float, float]] = self._sums[key]
        return known

    def _way(self, p: Sized, number: int) -> tuple[Way, float]:
        """How so many like it are updated, and how often the update's operations run."""
        optim, device = self.config.optim, self.hardware.device
        divided = len(p.shape) > 1 and self.sharded(p) < math.prod(p.shape)
        if optim.name != "adafactor":
            return Way(divided, piled=False), 0.0  # all together, by one operation
        if not divided and is_native(p, self.config, device):
            return Way(divided, piled=False, native=True), number
        size = 4.0 * self.sharded(p)
        joint = is_joint(p, self.config)
        most = at_most(size, device)
        if min(most, number) > 1 and not joint:
            return Way(divided, piled=True), -(-number // most)
        experts = p.shape[0] // self.ep if p.spec.is_expert else 1
        chunks = -(-experts // slices_at_once(int(size / experts), device))
        return Way(divided, piled=False, joint=joint), number * chunks

    def _saved(self, p: Sized) -> float:
        return 4.0 * self.sharded(p) + self.states(p)

    def _global(self, p: Sized) -> float:
        return 4.0 * math.prod(p.shape) + self.states(p, whole=True)

    def _stall(self, step: float) -> float:
        """Seconds of a step that checkpoints take: copies, and what is not written by the next."""
        saved = self.checkpoint()
        interval = self.config.checkpoint.interval or self.config.train.steps
        behind = saved.write
        if self.config.checkpoint.background:
            behind = max(0.0, saved.write - interval * step)
        return (saved.copy + behind) / interval

    def _stage(self, stage: Stage, profile: Profile, busiest: Mapping[str, float]) -> _MicroBatch:
        held = held_by(self.config.model, (stage,))
        costs = [(profile.blocks[a.kind], a.number) for a in held.blocks]
        costs += [(profile.ends, 1)] * stage.last
        again = 1 if self.config.train.activation_checkpointing is True else 0
        forward = sum((self._work(cost) * number for cost, number in costs), Work())
        ratio = profile.backward
        backward = Work(
            forward.flops * ratio.flops,
            forward.moved * ratio.moved,
            forward.operations * ratio.operations,
        )
        numbers = self.total(self.sliced, held)
        there, back = PER_WEIGHT[self.bf16]
        weights = Work(moved=numbers * (there * (1 + again) + back))
        work = forward * (1 + again) + backward + weights
        return _MicroBatch(
            self.hardware.seconds_of(work, bf16=self.bf16),
            self._imbalance(held, busiest) * (3 + again),
            *(
                (2 + again) * sum(number * self._travel(cost, axis) for cost, number in costs)
                for axis in ("tp", "ep")
            ),
        )

    def _work(self, cost: Cost) -> Work:
        """Of a micro-batch's forward pass."""
        work = cost.work
        return Work(work.flops * self.rows, work.moved * self.rows, work.operations)

    def _imbalance(self, held: Held, busiest: Mapping[str, float]) -> float:
        """Seconds of a forward pass in which ranks wait for the busiest rank's experts."""
        model = self.config.model
        matrices = 3 if model.activation.startswith("gated") else 2
        by_token = 2.0 * matrices * model.d_model * model.d_ff / self.tp
        flops = by_token * self.rows_beyond(held, busiest)
        return self.hardware.seconds_of(Work(flops=flops), bf16=self.bf16)

    def _travel(self, cost: Cost, axis: str) -> float:
        ranks, stride = (self.tp, 1) if axis == "tp" else (self.ep, self.tp)
        seconds = sum(
            self.hardware.seconds_to_send(
                operation, size * self.rows, calls=0, ranks=ranks, stride=stride
            )
            for (operation, where), size in cost.traffic.items()
            if where == axis
        )
        starts = cost.calls[axis] * self.hardware.collective_seconds if ranks > 1 else 0.0
        return seconds + starts

    def _data_parallel(self, held: Held, micro_batch: float) -> float:
        """Gradient sums, or FSDP2's gathering and scattering, where computing does not hide it."""
        zero = self.config.parallel.zero
        total = 0.0
        blocks = 1 + sum(a.number for a in held.blocks)
        for size, ranks, stride in (
            (self._dense, self.dp, self.tp),
            (self._experts, self.edp, self.tp * self.ep),
        ):
            number = self.total(size, held)
            if not number:
                continue
            place = {"ranks": ranks, "stride": stride}
            if zero == "none":
                calls = math.ceil(4.0 * number / _BUCKET)
                total += self.hardware.seconds_to_send(
                    "all_reduce", 4.0 * number, calls=calls, **place
                )
                continue
            gathers = 2 if zero == "full" else 1
            total += self.hardware.seconds_to_send(
                "all_gather",
                self.micro * (4.0 + gathers * self.word) * number,
                calls=self.micro * (1 + gathers) * blocks,
                **place,
            )
        return max(0.0, total - self._hiding(micro_batch))

    def _hiding(self, micro_batch: float) -> float:
        """Seconds of a step behind which weights and gradients can travel."""
        parallel = self.config.parallel
        if self.hardware.device == "cpu":
            return 0.0  # what is sent takes the time of cores that compute
        if parallel.zero != "none":
            return 0.8 * self.micro * micro_batch
        return 0.6 * micro_batch if self.pp == 1 and parallel.overlap_gradients else 0.0

    def _dense(self, p: Sized) -> float:
        return 0.0 if p.spec.is_expert else self.sliced(p)

    def _experts(self, p: Sized) -> float:
        return self.sliced(p) if p.spec.is_expert else 0.0
