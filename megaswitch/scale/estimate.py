"""Memory and time of one layout, put together from profiles of blocks and a machine's figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from megaswitch.config import RunConfig
from megaswitch.model.stages import Stage, plan_stages
from megaswitch.scale.hardware import Hardware
from megaswitch.scale.profile import Cost, Profile, Traffic
from megaswitch.scale.sizes import Sized, balanced, count_flops, of_stage

_BUCKET = 32 << 20  # as in `parallel.gradients`, two of which are under way
# Gradients of a block's activations that are there at once, as a share of what it kept.
_BACKWARD = 0.75
_SPARE = 0.06  # of a GPU's memory: what the allocator cannot use, CUDA's context, NCCL


@dataclass(frozen=True)
class Memory:
    """Bytes of the fullest rank at its peak. `buffers`: gathered weights, sums, pipeline."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    buffers: float
    spare: float

    @property
    def total(self) -> float:
        """All of them."""
        return sum(vars(self).values())


@dataclass(frozen=True)
class Seconds:
    """Of a step. Communication that hides behind computing is left out."""

    compute: float
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
class Estimate:
    """What a layout is expected to cost."""

    config: RunConfig
    world: int
    memory: Memory
    seconds: Seconds
    tokens_per_second: float
    mfu: float


def estimate(
    config: RunConfig,
    world: int,
    lengths: tuple[int, int],
    profile_of: Callable[[int, bool], Profile],
    hardware: Hardware,
) -> Estimate:
    """Of a configuration that fits `world` ranks.

    Args:
        config: of the run.
        world: ranks.
        lengths: of encoder and decoder rows.
        profile_of: of `tp` and whether experts lie on several ranks.
        hardware: of each rank.
    """
    layout = _Layout(config, world, lengths, hardware)
    profile = profile_of(config.parallel.tp, config.parallel.ep > 1)
    memory = max((layout.memory(r, profile) for r in range(layout.pp)), key=lambda m: m.total)
    seconds = layout.seconds(profile)
    rows = config.train.batch_size
    flops = 3 * count_flops(config.model, lengths) * rows
    return Estimate(
        config,
        world,
        memory,
        seconds,
        rows * sum(lengths) / seconds.total,
        flops / seconds.total / (world * layout.peak_flops),
    )


class _Layout:
    """A configuration on a machine, with the sizes that everything depends on."""

    def __init__(
        self, config: RunConfig, world: int, lengths: tuple[int, int], hardware: Hardware
    ) -> None:
        parallel = config.parallel
        self.config, self.lengths, self.hardware = config, lengths, hardware
        self.pp, self.ep, self.tp = parallel.pp, parallel.ep, parallel.tp
        self.dp = world // (self.pp * self.tp)
        self.edp = self.dp // self.ep
        self.shards = self.edp // parallel.replicas if parallel.zero != "none" else 1
        self.rows = config.train.micro_batch_size
        self.micro = config.train.batch_size // (self.dp * self.rows)
        number = self.pp * parallel.stages_per_rank
        counts = parallel.layers_per_stage or balanced(config.model, number, lengths)
        self.stages = plan_stages(counts if self.pp > 1 else [sum(counts)])
        self.bf16 = config.train.precision == "bf16"
        self.peak_flops = hardware.bf16_flops if self.bf16 else hardware.fp32_flops
        self.word = 2 if self.bf16 else 4

    def memory(self, rank: int, profile: Profile) -> Memory:
        """Of a pipeline rank."""
        own = [s for s in self.stages if s.index % self.pp == rank]
        held = {p.name: p for s in own for p in of_stage(self.config.model, s)}.values()
        sliced = {p.name: self._sliced(p) for p in held}
        sharded = {p.name: sliced[p.name] / self._shards_of(p) for p in held}
        zero = self.config.parallel.zero
        weights = 4.0 * sum(sharded.values())
        gradients = 4.0 * sum(sliced.values() if self._whole_gradients else sharded.values())
        optimizer = sum(self._states(p) for p in held)
        gathered = 0.0
        if zero != "none":
            parts = [sliced[p.name] * self.word for p in held if self._shards_of(p) > 1]
            by_block = self._largest_block(held, sliced)
            ahead = 2 + self.config.parallel.prefetch
            gathered = sum(parts) if zero == "optimizer" else min(sum(parts), ahead * by_block)
        largest = max(sliced.values())
        kept, block = self._kept(own, profile, sliced)
        # The first stages wait longest for the gradients of what they computed.
        waiting = min(self.micro, self._waiting(rank)) if self.pp > 1 else 1
        ends = profile.work * self.rows if any(s.last for s in own) else 0.0
        work = max(6.0 * largest, ends, block)
        buffers = gathered + self._pipeline_buffers(rank)
        if zero == "none" and self.dp > 1:
            sums = 4.0 * sum(sliced.values())
            buckets = 2 * max(_BUCKET, 4.0 * largest)
            work = max(work, min(sums, buckets))
        spare = _SPARE * self.hardware.memory
        return Memory(weights, gradients, optimizer, kept * waiting + work, buffers, spare)

    @property
    def _whole_gradients(self) -> bool:
        zero = self.config.parallel.zero
        return zero == "none" or (self.pp > 1 and self.micro > 1)

    def _waiting(self, rank: int) -> float:
        """Micro-batches under way on a pipeline rank, in units of all its stages."""
        parallel = self.config.parallel
        stages = parallel.stages_per_rank
        if parallel.schedule == "gpipe":
            return self.micro
        if stages == 1:
            return self.pp - rank
        return ((stages - 1) * self.pp + 2 * (self.pp - 1 - rank) + 1) / stages

    def _pipeline_buffers(self, rank: int) -> float:
        """What torch keeps to receive each micro-batch of a step."""
        if self.pp == 1:
            return 0.0
        tokens: float = self.rows * sum(self.lengths)
        if self.config.parallel.sequence_parallel:
            tokens /= self.tp
        carry = 4.0 * tokens * self.config.model.d_model * self.micro
        own = [s for s in self.stages if s.index % self.pp == rank]
        return carry * sum(2 - s.first - s.last for s in own)

    def _kept(
        self, own: list[Stage], profile: Profile, sliced: Mapping[str, float]
    ) -> tuple[float, float]:
        """Bytes that a micro-batch leaves for its backward pass; what a block's takes."""
        casts = self.bf16 and self.config.parallel.zero == "none"
        kinds = [self._kind(b) for s in own for b in s.blocks]
        each = [profile.blocks[kind].kept * self.rows for kind in kinds]
        matrices = {b: 0.0 for s in own for b in s.blocks}
        for p in (p for s in own for p in of_stage(self.config.model, s)):
            if p.block is not None and casts:
                matrices[p.block] += 2.0 * sliced[p.name]
        ends = profile.ends.kept * self.rows if any(s.last for s in own) else 0.0
        if any(s.last for s in own) and casts:
            names_of_head = ("head.weight", "embedding.weight")
            ends += 2.0 * next((sliced[n] for n in names_of_head if n in sliced), 0.0)
        whole = [a + b for a, b in zip(each, matrices.values(), strict=True)]
        if self.config.train.activation_checkpointing is not True:
            # Where the head is, its work is the most, and done before any block's.
            return sum(whole) + ends, 0.0 if own[-1].last else _BACKWARD * max(each)
        width = 4.0 * self.rows * self.config.model.d_model
        if self.config.parallel.sequence_parallel:
            width /= self.tp
        inputs = [width * self.lengths[kind[0] == "decoder"] for kind in kinds]
        return sum(inputs) + ends, max(whole) + _BACKWARD / 2 * max(each)

    def seconds(self, profile: Profile) -> Seconds:
        """Of a step."""
        again = 1 if self.config.train.activation_checkpointing is True else 0
        forward = [self._stage_time(s, profile) for s in self.stages]
        ranks = [
            [t for s, t in zip(self.stages, forward, strict=True) if s.index % self.pp == r]
            for r in range(self.pp)
        ]
        totals = [tuple(map(sum, zip(*times, strict=True))) for times in ranks]
        compute, tp, ep = max(totals, key=sum)
        compute, tp, ep = (compute * (3 + again), tp * (2 + again), ep * (2 + again))
        one = compute + tp + ep
        stages = self.config.parallel.stages_per_rank
        zero_bubble = self.config.parallel.schedule == "zero-bubble"
        bubble = (self.pp - 1) / stages * one * (1 / 3 if zero_bubble else 1)
        m = self.micro
        held = max(
            ([p for s in self.stages if s.index % self.pp == r
              for p in of_stage(self.config.model, s)] for r in range(self.pp)),
            key=lambda ps: sum(map(self._sliced, ps)),
        )  # fmt: skip
        local = sum(self._sliced(p) / self._shards_of(p) for p in held)
        states = sum(self._states(p) for p in held)
        optimizer = (20.0 * local + 2 * states) / self.hardware.memory_bandwidth
        saved = (4.0 * local + states) / self.hardware.host_bandwidth
        interval = self.config.checkpoint.interval or self.config.train.steps
        return Seconds(
            m * compute,
            m * tp,
            m * ep,
            self._data_parallel(held, one),
            bubble,
            optimizer,
            saved / interval,
        )

    def _stage_time(self, stage: Stage, profile: Profile) -> tuple[float, float, float]:
        """Seconds of a forward pass: computing, over tp, over ep."""
        costs = [profile.blocks[self._kind(b)] for b in stage.blocks]
        if stage.last:
            costs.append(profile.ends)
        compute = sum(self._compute(c) for c in costs)
        tp, ep = (sum(self._travel(c.traffic, axis) for c in costs) for axis in ("tp", "ep"))
        return compute, tp, ep

    def _compute(self, cost: Cost) -> float:
        """Matrix products, and what is kept written once and read once."""
        products = cost.flops * self.rows / (self.peak_flops * self.hardware.matmul_efficiency)
        return products + 2 * max(0.0, cost.kept) * self.rows / self.hardware.memory_bandwidth

    def _travel(self, traffic: Traffic, axis: str) -> float:
        size = self.tp if axis == "tp" else self.ep
        if size == 1:
            return 0.0
        total = sum(
            (2 if operation == "all_reduce" else 1) * number * self.rows
            for (operation, where), number in traffic.items()
            if where == axis
        )
        return total * (size - 1) / size / self._bandwidth(1 if axis == "tp" else self.tp, size)

    def _bandwidth(self, stride: int, size: int) -> float:
        """Of a rank, between `size` ranks that stand `stride` apart; over the slowest link."""
        inside = stride * size <= self.hardware.node_gpus
        speed = self.hardware.node_bandwidth if inside else self.hardware.network_bandwidth
        return speed * self.hardware.link_efficiency

    def _data_parallel(self, held: list[Sized], micro_batch: float) -> float:
        """Gradient sums, or FSDP2's gathering and scattering, where computing does not hide it."""
        zero = self.config.parallel.zero
        total = 0.0
        for is_expert, ranks, stride in (
            (False, self.dp, self.tp),
            (True, self.edp, self.tp * self.ep),
        ):
            if ranks == 1:
                continue
            number = sum(self._sliced(p) for p in held if p.spec.is_expert == is_expert)
            volume = 8.0 * number
            if zero != "none":
                gathers = 2 if zero == "full" else 1
                volume = self.micro * (4.0 + gathers * self.word) * number
            total += volume * (ranks - 1) / ranks / self._bandwidth(stride, ranks)
        hidden = 0.0
        if zero != "none":
            hidden = 0.8 * self.micro * micro_batch
        elif self.pp == 1 and self.config.parallel.overlap_gradients:
            hidden = 0.6 * micro_batch
        return max(0.0, total - hidden)

    def _kind(self, block: int) -> tuple[str, bool]:
        model = self.config.model
        encoder = block < model.num_encoder_layers
        index = block if encoder else block - model.num_encoder_layers
        stack = "encoder" if encoder else "decoder"
        return stack, model.is_sparse(stack, index)  # type: ignore[arg-type]

    def _sliced(self, p: Sized) -> float:
        """Numbers of a rank's slice over ep and tp."""
        slices = (self.ep if p.spec.is_expert else 1) * (self.tp if "tp" in p.spec.axes else 1)
        return math.prod(p.shape) / slices

    def _shards_of(self, p: Sized) -> int:
        """Parts that ZeRO cuts a slice into; see `parts._shard`."""
        if self.config.parallel.zero == "none" or len(p.shape) == 1 or p.spec.is_bias:
            return 1
        return self.shards if p.spec.is_expert else self.shards * self.ep

    def _states(self, p: Sized) -> float:
        """Bytes of the optimizer's states."""
        optim, local = self.config.optim, self._sliced(p) / self._shards_of(p)
        if optim.name == "adamw":
            return 8.0 * local
        matrix = p.shape[1:] if p.spec.is_expert else p.shape
        if len(matrix) == 2 and min(matrix) >= optim.factored_min_dim:
            sizes = self._local_shape(p)
            return 4.0 * math.prod(sizes[:-2]) * (sizes[-2] + sizes[-1])
        return 4.0 * local

    def _local_shape(self, p: Sized) -> list[float]:
        """Of a rank's block; ZeRO cuts the first dimension that divides evenly."""
        ranks = {"ep": self.ep, "tp": self.tp, None: 1}
        pieces = [ranks[axis] for axis in p.spec.axes]
        shards = self._shards_of(p)
        even = [d for d, size in enumerate(p.shape) if size % (pieces[d] * shards) == 0]
        pieces[even[0] if even else 0] *= shards
        return [size / n for size, n in zip(p.shape, pieces, strict=True)]

    def _largest_block(self, held: Iterable[Sized], sliced: Mapping[str, float]) -> float:
        sizes: dict[object, float] = {}
        for p in held:
            key = p.name if p.block is None else p.block
            sizes[key] = sizes.get(key, 0.0) + sliced[p.name] * self.word
        return max(sizes.values())
