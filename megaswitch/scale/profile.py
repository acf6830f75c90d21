"""What a block of each kind costs, by rehearsal of a model that has one of each.

Costs grow with the rows of a micro-batch, and depend on a layout by `tp` and by whether experts lie
on other ranks; a plan puts those of any number of blocks together.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from megaswitch.config import ParallelConfig, RunConfig
from megaswitch.layers.kernels import rehearse
from megaswitch.layers.linear import GroupedLinear, Linear
from megaswitch.model.blocks import Block
from megaswitch.model.moe import SwitchFFN
from megaswitch.model.switch_transformer import rows_per_group
from megaswitch.parallel.absent import absent_peers
from megaswitch.parallel.mesh import Mesh
from megaswitch.scale.recorder import Recorder
from megaswitch.scale.rehearsal import Rehearsal
from megaswitch.train.objectives import BatchSize, MicroBatch, forward, training_loss
from megaswitch.train.parts import Parts

Kind = tuple[str, bool]  # stack, and whether it is sparse
# Bytes by (operation, axis), as `parallel/README.md` counts them.
Traffic = dict[tuple[str, str], float]


@dataclass
class Cost:
    """Of one row's forward pass.

    Attributes:
        kept: bytes that wait for the backward pass, without weights cast to bf16.
        flops: floating-point operations.
        traffic: bytes of collectives.
    """

    kept: float = 0.0
    flops: float = 0.0
    traffic: Traffic = field(default_factory=dict)


@dataclass
class Profile:
    """Costs of a row under one `tp`, with or without expert parallelism.

    Attributes:
        blocks: of each kind of block.
        ends: embedding, head, loss.
        work: bytes that the backward pass takes beyond what was kept, at most, but for those of the
            largest weight's gradient.
    """

    blocks: dict[Kind, Cost]
    ends: Cost
    work: float


def smallest_micro_batch(config: RunConfig, lengths: tuple[int, int], tp: int) -> int:
    """Rows of whole routing groups, whose tokens `tp` ranks can divide."""
    groups = bool(config.model.moe.num_experts)
    unit = rows_per_group(config.model, lengths[0]) if groups else 1
    if tp > 1 and config.parallel.sequence_parallel:
        for length in lengths:
            unit = math.lcm(unit, tp // math.gcd(length, tp))
    return unit


_ROWS = 8  # at least, so that what does not grow with them hardly counts


def profile(config: RunConfig, lengths: tuple[int, int], tp: int, exchanges: bool) -> Profile:
    """Rehearse a model of one block of each kind.

    Args:
        config: of the run.
        lengths: of encoder and decoder rows.
        tp: tensor-parallel ranks.
        exchanges: whether experts lie on several ranks.
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
    with absent_peers(tp * ep, 0), rehearse("cuda"):
        rehearsal = Rehearsal(small, Mesh.over_ranks(torch.device("cpu"), small.parallel))
        with rehearsal.prepared() as (parts, _, micro):
            return _measure(rehearsal, parts, micro, rows)


def _measure(rehearsal: Rehearsal, parts: Parts, micro: MicroBatch, rows: int) -> Profile:
    recorder, model = rehearsal.recorder, parts.models[0]
    blocks = [*model.encoder.blocks, *model.decoder.blocks]
    sizes = rehearsal.config.train
    bf16 = sizes.precision == "bf16"
    seen: dict[Kind, Cost] = {}
    spent: list[Cost] = []
    for block in blocks:
        meter = _Meter(recorder, cast_bytes(block) if bf16 else 0)
        block.register_forward_pre_hook(meter.start)
        block.register_forward_hook(partial(meter.stop, seen, spent))
    work = 0.0
    ends = Cost()
    for _ in range(2):  # the second time, gradients are there to be added to
        seen.clear()
        spent.clear()
        whole = _Meter(recorder, 0)
        whole.start()
        precision = torch.bfloat16 if bf16 else torch.float32
        output = forward(model, micro, precision)
        tp = model.tp
        loss, _ = training_loss(output, micro.batch, BatchSize(rows, 1), rehearsal.config, tp)
        assert loss is not None
        total = whole.cost()
        casts = 2 * sum(w.local.numel() for n, w in parts.weights.items() if _is_head(n, parts))
        del output
        start = recorder.memory.live
        recorder.memory.reset_peak()
        loss.backward()
        work = recorder.memory.peak - start
        del loss
        ends = Cost(
            total.kept - sum(c.kept for c in spent) - (casts if bf16 else 0)
            - sum(cast_bytes(b) for b in blocks) * bf16,
            total.flops - sum(c.flops for c in spent),
            _minus(total.traffic, spent),
        )  # fmt: skip
    # A gradient in bf16 and once more in fp32, until it is added to the sum.
    largest = 6 * max(w.local.numel() for w in parts.weights.values())
    scores = 8 * rows * rehearsal.lengths[1] * model.config.vocab_size / model.tp.size
    return Profile(
        {kind: _by_row(cost, rows) for kind, cost in seen.items()},
        _by_row(ends, rows),
        (work if work > 1.05 * largest else scores) / rows,
    )


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
        self._before = recorder.memory.live, recorder.flops, Counter(recorder.collectives)

    def cost(self) -> Cost:
        live, flops, collectives = self._before
        traffic: Traffic = {}
        for kind, calls in (Counter(self.recorder.collectives) - collectives).items():
            key = kind.operation, kind.axis
            traffic[key] = traffic.get(key, 0.0) + calls * kind.size
        kept = self.recorder.memory.live - live - self.casts
        return Cost(kept, self.recorder.flops - flops, traffic)

    def stop(self, seen: dict[Kind, Cost], spent: list[Cost], block: Block, *_: Any) -> None:
        cost = self.cost()
        spent.append(cost)
        stack = block.site.partition(".")[0]
        seen[stack, isinstance(block.ffn, SwitchFFN)] = cost


def _minus(total: Traffic, parts: list[Cost]) -> Traffic:
    return {
        key: size - sum(part.traffic.get(key, 0.0) for part in parts) for key, size in total.items()
    }


def _by_row(cost: Cost, rows: int) -> Cost:
    traffic = {key: size / rows for key, size in cost.traffic.items()}
    return Cost(cost.kept / rows, cost.flops / rows, traffic)
