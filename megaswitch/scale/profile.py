"""What a block of each kind costs, by rehearsal of a model that has one of each.

Bytes and FLOPs grow with the rows of a micro-batch, and depend on a layout by `tp` and by whether
experts lie on other ranks; a plan puts those of any number of blocks together.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megaswitch.config import ParallelConfig, RunConfig
from megaswitch.layers.kernels import rehearse
from megaswitch.layers.linear import GroupedLinear, Linear
from megaswitch.model.blocks import Block
from megaswitch.model.moe import SwitchFFN
from megaswitch.model.switch_transformer import rows_per_group
from megaswitch.parallel.absent import absent_peers
from megaswitch.parallel.mesh import Mesh
from megaswitch.scale.recorder import Memory, Recorder, Work
from megaswitch.scale.rehearsal import Rehearsal
from megaswitch.scale.sizes import Kind
from megaswitch.scale.updates import Updates
from megaswitch.train.objectives import BatchSize, MicroBatch, forward, training_loss
from megaswitch.train.parts import Parts

# Bytes by (operation, axis), as `parallel/README.md` counts them.
Traffic = dict[tuple[str, str], float]


@dataclass
class Cost:
    """Of one row's forward pass; operations and calls do not grow with rows.

    Attributes:
        kept: bytes that wait for the backward pass, without weights cast to bf16.
        transient: bytes that either pass takes beyond what is kept, at most; of blocks.
        work: of the device.
        traffic: bytes of collectives.
        calls: collectives by axis.
    """

    kept: float = 0.0
    transient: float = 0.0
    work: Work = field(default_factory=Work)
    traffic: Traffic = field(default_factory=dict)
    calls: Counter[str] = field(default_factory=Counter)


@dataclass
class Profile:
    """Costs of a row under one `tp`, with or without expert parallelism.

    Attributes:
        blocks: of each kind of block.
        ends: embedding, head, loss.
        work: bytes that the backward pass takes beyond what was kept, at most, but for those of the
            largest weight's gradient.
        backward: what the backward pass does, each number by that of the forward pass.
        update: what the optimizer does to a parameter.
    """

    blocks: dict[Kind, Cost]
    ends: Cost
    work: float
    backward: Work
    update: Updates


def smallest_micro_batch(config: RunConfig, lengths: tuple[int, int], tp: int) -> int:
    """Rows of whole routing groups, whose tokens `tp` ranks can divide."""
    groups = bool(config.model.moe.num_experts)
    unit = rows_per_group(config.model, lengths[0]) if groups else 1
    if tp > 1 and config.parallel.sequence_parallel:
        for length in lengths:
            unit = math.lcm(unit, tp // math.gcd(length, tp))
    return unit


# Bytes moved for each weight and pass, forward and backward, whatever the rows: casts to bf16 and
# of its gradient back, and the gradient's addition to the sum. By whether that is in bf16.
PER_WEIGHT = {False: (0.0, 12.0), True: (6.0, 18.0)}
_ROWS = 8  # at least, so that what does not grow with them hardly counts


def profile(
    config: RunConfig,
    lengths: tuple[int, int],
    tp: int,
    exchanges: bool,
    device: str,
    update: Updates,
) -> Profile:
    """Rehearse a model of one block of each kind.

    Args:
        config: of the run.
        lengths: of encoder and decoder rows.
        tp: tensor-parallel ranks.
        exchanges: whether experts lie on several ranks.
        device: whose kernels: "cpu" or "cuda".
        update: what the optimizer does, as `update_work` says; it hardly depends on the rest.
    """
    model = config.model
    steps = model.moe.encoder_sparse_step, model.moe.decoder_sparse_step
    depths = [max(1, step) if model.moe.num_experts else 1 for step in steps]
    ep = model.moe.num_experts if exchanges else 1
    unit = smallest_micro_batch(config, lengths, tp)
    rows = -(-_ROWS // unit) * unit
    small = replace(
        config,
        model=replace(model, num_encoder_layers=depths[0], num_decoder_layers=depths[1]),
        data=replace(config.data, decoder_length=lengths[1]),
        train=replace(
            config.train,
            micro_batch_size=rows,
            batch_size=rows * ep,
            activation_checkpointing=False,
            rampup_batch_size=None,
        ),
        parallel=ParallelConfig(tp=tp, ep=ep, sequence_parallel=config.parallel.sequence_parallel),
    )
    with absent_peers(tp * ep, 0), rehearse(device):
        rehearsal = Rehearsal(small, Mesh.over_ranks(torch.device("cpu"), small.parallel))
        with rehearsal.prepared() as (parts, _, micro):
            return _measure(rehearsal, parts, micro, rows, update)


def _measure(
    rehearsal: Rehearsal, parts: Parts, micro: MicroBatch, rows: int, update: Updates
) -> Profile:
    recorder, model = rehearsal.recorder, parts.models[0]
    blocks = [*model.encoder.blocks, *model.decoder.blocks]
    bf16 = rehearsal.config.train.precision == "bf16"
    seen: dict[Kind, Cost] = {}
    spent: list[Cost] = []
    peaks = _BackwardPeaks(recorder.memory)
    for block in blocks:
        meter = _Meter(recorder, cast_bytes(block) if bf16 else 0)
        block.register_forward_pre_hook(meter.start)
        block.register_forward_hook(partial(meter.stop, seen, spent, peaks))
    for w in parts.weights.values():  # as of an earlier micro-batch, to be added to
        w.parameter.grad = torch.empty_like(w.parameter)
    whole = _Meter(recorder, 0)
    whole.start()
    output = forward(model, micro, torch.bfloat16 if bf16 else torch.float32)
    tp = model.tp
    loss, _ = training_loss(output, micro.batch, BatchSize(rows, 1), rehearsal.config, tp)
    assert loss is not None
    total = whole.cost()
    head = (w for name, w in parts.weights.items() if _is_head(name, parts))
    casts = bf16 * (sum(2 * w.local.numel() for w in head) + sum(map(cast_bytes, blocks)))
    total.work -= Work(moved=3 * casts)
    del output
    start, done = recorder.memory.live, recorder.work
    peaks.begin(None)
    loss.backward()
    peaks.end()
    work = float(peaks.peak - start)
    numbers = sum(w.local.numel() for w in parts.weights.values())
    backward = recorder.work - done - Work(moved=PER_WEIGHT[bf16][1] * numbers)
    ends = _minus(total, spent)
    ends.kept -= casts
    # A gradient in bf16 and once more in fp32, until it is added to the sum.
    largest = 6 * max(w.local.numel() for w in parts.weights.values())
    scores = 8 * rows * rehearsal.lengths[1] * model.config.vocab_size / model.tp.size
    return Profile(
        {kind: _by_row(cost, rows) for kind, cost in seen.items()},
        _by_row(ends, rows),
        (work if work > 1.05 * largest else scores) / rows,
        _ratio(backward, total.work),
        update,
    )


def _ratio(work: Work, by: Work) -> Work:
    moved = max(0.0, work.moved) / by.moved
    return Work(work.flops / by.flops, moved, work.operations / by.operations)


def _is_head(name: str, parts: Parts) -> bool:
    return name == ("embedding.weight" if "head.weight" not in parts.weights else "head.weight")


def cast_bytes(block: Block) -> int:
    """Of the copies in bf16 that autocast makes of the block's matrices here."""
    kinds = (Linear, GroupedLinear)
    modules = (m for m in block.modules() if isinstance(m, kinds))
    return 2 * sum(_local_numel(m.weight) for m in modules)


def _local_numel(weight: Any) -> int:
    return int((weight.to_local() if hasattr(weight, "to_local") else weight).numel())


class _Meter:
    """What is spent between start and stop."""

    def __init__(self, recorder: Recorder, casts: int) -> None:
        self.recorder, self.casts = recorder, casts

    def start(self, *_: Any) -> None:
        recorder = self.recorder
        recorder.memory.reset_peak()
        self._before = recorder.memory.live, recorder.work, Counter(recorder.collectives)

    def cost(self) -> Cost:
        live, work, collectives = self._before
        traffic: Traffic = {}
        calls: Counter[str] = Counter()
        for kind, number in (Counter(self.recorder.collectives) - collectives).items():
            key = kind.operation, kind.axis
            traffic[key] = traffic.get(key, 0.0) + number * kind.size
            calls[kind.axis] += number
        kept = self.recorder.memory.live - live - self.casts
        transient = self.recorder.memory.peak - self.recorder.memory.live
        # `PER_WEIGHT` has what casts move, of which `casts` is a third.
        spent = self.recorder.work - work - Work(moved=3 * self.casts)
        return Cost(kept, transient, spent, traffic, calls)

    def stop(
        self,
        seen: dict[Kind, Cost],
        spent: list[Cost],
        peaks: _BackwardPeaks,
        block: Block,
        _: Any,
        output: tuple[Tensor, Any],
    ) -> None:
        cost = self.cost()
        spent.append(cost)
        stack = block.site.partition(".")[0]
        seen[stack, isinstance(block.ffn, SwitchFFN)] = cost
        output[0].register_hook(lambda _: peaks.begin(cost))


class _BackwardPeaks:
    """What blocks take in the backward pass, each from its output's gradient to its input's."""

    def __init__(self, memory: Memory) -> None:
        self.memory, self.peak = memory, 0
        self._cost: Cost | None = None

    def begin(self, cost: Cost | None) -> None:
        """The block of this cost comes next."""
        self.end()
        self._cost, self._start = cost, self.memory.live
        self.memory.reset_peak()

    def end(self) -> None:
        self.peak = max(self.peak, self.memory.peak)
        if self._cost:
            took = float(self.memory.peak - self._start)
            self._cost.transient = max(self._cost.transient, took)
            self._cost = None


def _minus(total: Cost, parts: list[Cost]) -> Cost:
    traffic, calls = dict(total.traffic), Counter(total.calls)
    for part in parts:
        for key, size in part.traffic.items():
            traffic[key] -= size
        calls -= part.calls
    work = total.work - sum((part.work for part in parts), Work())
    return Cost(total.kept - sum(part.kept for part in parts), 0.0, work, traffic, calls)


def _by_row(cost: Cost, rows: int) -> Cost:
    traffic = {key: size / rows for key, size in cost.traffic.items()}
    work = Work(cost.work.flops / rows, cost.work.moved / rows, cost.work.operations)
    return Cost(cost.kept / rows, cost.transient / rows, work, traffic, cost.calls)
