"""One rank of a world of any size, rehearsed: the code of a training step runs on shapes alone.

The rank's stages are built, sliced and wrapped as for training, in a group of ranks that are not
there, and run forward, backward and through the optimizer. torch's pipeline schedules need ranks
that answer, so the order of actions is taken from the schedule and its stages are called in it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from megaswitch.config import RunConfig
from megaswitch.data.span_corruption import Seq2SeqBatch
from megaswitch.layers.gradient_memory import GradientMemory
from megaswitch.layers.kernels import rehearse
from megaswitch.layers.noise import Noise
from megaswitch.log import ConfigError, UserError
from megaswitch.model.moe import SwitchFFN
from megaswitch.model.router import expert_capacity
from megaswitch.model.switch_transformer import Inputs, rows_per_group
from megaswitch.optim.build import build_optimizer
from megaswitch.parallel.absent import absent_peers
from megaswitch.parallel.mesh import Mesh
from megaswitch.parallel.pipeline import Pipeline
from megaswitch.parallel.weights import Weight
from megaswitch.rules_parallel import check_sequence_parallel
from megaswitch.scale.recorder import Collective, Recorder, Work
from megaswitch.scale.steps import PipelineSteps, PlainSteps
from megaswitch.train.objectives import MicroBatch
from megaswitch.train.parts import Parts, build_parts
from megaswitch.train.placement import in_torch, row_lengths
from megaswitch.train.runner import Runner

# The first of several axes that have the same ranks names them all.
_AXES = ("tp", "ep", "pp", "edp", "dp", "shard", "replica", "dense_shard", "world")
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class RankStep:
    """What one rank does in a training step, after the first.

    Attributes:
        rank: of the world.
        pipeline_rank: its place in the pipeline.
        blocks: names of the layers that it has, such as "encoder.3".
        parameters: numbers that it holds.
        parameters_here: numbers of its blocks that no rank before it in a group of copies holds.
        parameters_counted: numbers of the global weights that its pipeline rank is first to hold.
        memory: bytes by kind when most were in use.
        resident: bytes between two steps.
        collectives: calls of each kind.
        work: of all operations, recomputed ones too.
        micro_batches: of a step.
    """

    rank: int
    pipeline_rank: int
    blocks: tuple[str, ...]
    parameters: int
    parameters_here: int
    parameters_counted: int
    memory: dict[str, int]
    resident: int
    collectives: dict[Collective, int]
    work: Work
    micro_batches: int

    @property
    def peak(self) -> int:
        """Bytes in use when most were."""
        return sum(self.memory.values())


def rehearse_rank(
    config: RunConfig, world: int, rank: int, kind: str, reads: Sequence[Any] = ()
) -> RankStep:
    """Run one training step of a rank without its peers and without memory.

    Args:
        config: of the run, which fits `world` ranks.
        world: number of ranks.
        rank: which.
        kind: whose kernels: "cpu" or "cuda".
        reads: what the host read of routing in a micro-batch of a real run, in order; empty: an
            even load.

    Raises:
        ConfigError: the decoder's rows do not suit the layout.
        UserError: this process is one of several ranks itself, or the rehearsal cannot show this.
    """
    if problems := list(check_sequence_parallel(config, "decoder", row_lengths(config)[1])):
        raise ConfigError(problems)
    if kind == "cuda" and config.train.precision != "bf16" and config.model.moe.num_experts:
        raise UserError(
            f"train.precision={config.train.precision!r} cannot be rehearsed for a GPU, as torch "
            "knows the shapes of grouped products in bf16 alone; use train.precision='bf16', or "
            "rehearse for a CPU"
        )
    with absent_peers(world, rank), rehearse(kind):
        return Rehearsal(config, Mesh.over_ranks(_CPU, config.parallel), reads).run()


def schedule_orders(config: RunConfig, world: int) -> dict[int, list[Any]]:
    """torch's actions of a step, by pipeline rank."""
    with absent_peers(world, 0):
        mesh = Mesh.over_ranks(_CPU, config.parallel)
        axis, number = mesh.axis("pp"), mesh.axis("pp").size * config.parallel.stages_per_rank
        own: dict[int, nn.Module] = {s: nn.Identity() for s in range(0, number, axis.size)}
        pipeline = Pipeline(own, number, axis, _CPU, config.parallel.schedule, (), {})
        share = mesh.dp.size * config.train.micro_batch_size
        orders: dict[int, list[Any]] = pipeline.schedule(
            config.train.batch_size // share
        ).pipeline_order
        return orders


class Rehearsal:
    """One rank, ready to be stepped."""

    def __init__(self, config: RunConfig, mesh: Mesh, reads: Sequence[Any] = ()) -> None:
        self.config, self.mesh = in_torch(config), mesh
        self.reads = itertools.cycle(reads) if reads else None
        self.lengths = row_lengths(config)
        self.recorder = Recorder(_axis_names(mesh))
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.memory = self.recorder.memory
        self.tokens = 0  # of the Switch layer that runs
        self.micro_batches = config.train.batch_size // (
            mesh.dp.size * config.train.micro_batch_size
        )

    def run(self) -> RankStep:
        """The steps, and what the last of them is."""
        with self.prepared() as (parts, runner, micro):
            optimizer = build_optimizer(parts.parameters(), self.config.optim)
            step = PipelineSteps if runner.has_pipeline else PlainSteps
            collectives, work = step(self, parts, runner, optimizer, micro).count()
            resident = self.memory.live
        weights = parts.weights.values()
        return RankStep(
            self.mesh.rank,
            self.mesh.axis("pp").rank,
            tuple(b.site for m in parts.models.values() for s in (m.encoder, m.decoder)
                  for b in s.blocks),
            sum(w.local.numel() for w in weights),
            sum(w.local.numel() for w in weights if w.block.counts),
            sum(_global_numel(w) for w in weights if w.block.counts),
            self.memory.at_peak(),
            resident,
            {c: n for c, n in sorted(collectives.items()) if n and self.mesh.size > 1},
            work,
            self.micro_batches,
        )  # fmt: skip

    @contextmanager
    def prepared(self) -> Iterator[tuple[Parts, Runner, MicroBatch]]:
        """Inside, tensors are shapes, everything is recorded, and this is what there is."""
        parts = build_parts(self.config, self.mesh, lengths=self.lengths, allocate=self._allocate)
        parts.train()
        runner = Runner(self.config, self.mesh, parts)
        for model in parts.models.values():
            for module in model.modules():
                if isinstance(module, SwitchFFN):
                    module.register_forward_pre_hook(self._enter)
        with self.fake, self.recorder, self._answers():
            self.memory.mark((w.local for w in parts.weights.values()), "weights")
            yield parts, runner, self._micro_batch()

    def _allocate(self, module: nn.Module, device: torch.device) -> None:
        with self.fake:
            module.to_empty(device=device)

    def _enter(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        self.tokens = arguments[1].numel()

    def _micro_batch(self) -> MicroBatch:
        rows = self.config.train.micro_batch_size
        encoder, decoder = self.lengths
        packed = self.config.data.packing
        with self.memory.of_kind("buffers"):

            def full(length: int, dtype: torch.dtype = torch.int64) -> Tensor:
                return torch.ones(rows, length, dtype=dtype)

            samples = torch.zeros(rows, dtype=torch.int64)
            masks = full(encoder, torch.bool), full(decoder, torch.bool)
            segments = (full(encoder), full(decoder)) if packed else (None, None)
            batch = Seq2SeqBatch(
                encoder_tokens=full(encoder),
                decoder_tokens=full(decoder),
                decoder_targets=full(decoder),
                encoder_mask=masks[0],
                decoder_mask=masks[1],
                sample_index=samples,
                encoder_segments=segments[0],
                decoder_segments=segments[1],
            )
            shapes = batch.encoder_tokens.shape, batch.decoder_tokens.shape
            known = masks if packed else (None, None)
            inputs = Inputs(*shapes, known[0], known[1], Noise(0, 0, samples), *segments)
        return MicroBatch(batch, inputs)

    @contextmanager
    def _answers(self) -> Iterator[None]:
        """What the host reads from tensors that hold nothing: an even load; a count of steps."""
        with (
            mock.patch.object(FakeTensor, "tolist", self._tolist()),
            mock.patch.object(FakeTensor, "item", create=True, return_value=1.0),
            mock.patch.object(GradientMemory, "empty_like", lambda _, like: self.memory.lend(like)),
        ):
            yield

    def _tolist(self) -> Any:
        moe, ep = self.config.model.moe, self.mesh.axis("ep").size

        def tolist(tensor: Tensor) -> Any:
            if self.reads:
                read = next(self.reads)
                assert np.shape(read) == tensor.shape, "this was read of another run"
                return read
            if tensor.ndim == 1:  # where the rows of each expert here end
                share = self.tokens * ep / moe.num_experts
                share = min(share, self._slots() * ep)
                return [int(share * (i + 1)) for i in range(len(tensor))]
            # rows to and from each rank, in each chunk of an exchange
            directions, chunks, ranks = tensor.shape
            even = _even(self.tokens, chunks * ranks)
            rows = [even[i * ranks : (i + 1) * ranks] for i in range(chunks)]
            return [rows for _ in range(directions)]

        return tolist

    def _slots(self) -> float:
        """Rows that an expert takes of a micro-batch."""
        moe, rows = self.config.model.moe, self.config.train.micro_batch_size
        if moe.capacity_mode == "dropless":
            return float("inf")
        if moe.capacity_mode == "hf":
            return moe.hf_capacity * rows
        group = min(rows, rows_per_group(self.config.model, self.lengths[0]))
        size = self.tokens // rows * group
        slots = expert_capacity(size, moe.num_experts, moe.train_capacity_factor, moe.min_capacity)
        return slots * (rows // group)


def _axis_names(mesh: Mesh) -> dict[tuple[int, ...], str]:
    """The axis that ranks along it are."""
    names: dict[tuple[int, ...], str] = {}
    for axis in map(mesh.axis, _AXES):
        if axis.group is not None:
            names.setdefault(tuple(dist.get_process_group_ranks(axis.group)), axis.name)
    return names


def _even(total: int, parts: int) -> list[int]:
    return [total * (i + 1) // parts - total * i // parts for i in range(parts)]


def _global_numel(weight: Weight) -> int:
    return int(torch.Size(weight.block.shape).numel())
