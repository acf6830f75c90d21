"""Real training steps and kernels, timed: in CPU-seconds of this process, or in time of its GPU.

CPU-seconds do not count what else a machine does meanwhile, nor the waiting for other ranks.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import torch

from megaswitch.config import RunConfig
from megaswitch.data.span_corruption import Seq2SeqBatch
from megaswitch.layers.noise import Noise
from megaswitch.optim.build import build_optimizer, clip_gradients
from megaswitch.parallel.mesh import Mesh
from megaswitch.train.objectives import BatchSize, MicroBatch
from megaswitch.train.parts import build_parts
from megaswitch.train.placement import row_lengths
from megaswitch.train.runner import Runner, nothing

# On random tokens weights that change would diverge; CPUs take up to five times as long for the
# tiny numbers that come of it.
_RATE = 1e-6


def least_seconds(function: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Of so many calls, after one that does not count."""
    function()
    return min(_seconds(function, device) for _ in range(repeats))


def _seconds(function: Callable[[], object], device: torch.device) -> float:
    if device.type == "cpu":
        start = time.process_time()
        function()
        return time.process_time() - start
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    function()
    torch.cuda.synchronize(device)
    return time.perf_counter() - start


def step_seconds(config: RunConfig, mesh: Mesh, repeats: int) -> float:
    """The least that a training step takes on this rank: passes, gradient norm, optimizer.

    Tokens are random and fill their rows; nothing is read or written.

    Args:
        config: of the run.
        mesh: the ranks, all of which call this.
        repeats: steps that are timed.
    """
    parts = build_parts(config, mesh, lengths=row_lengths(config))
    parts.initialize(config.train.seed)
    parts.train()
    runner = Runner(config, mesh, parts)
    optimizer = build_optimizer(parts.parameters(), replace(config.optim, learning_rate=_RATE))
    micro = _micro_batches(config, mesh)
    rows = config.train.batch_size
    whole = BatchSize(rows, rows * row_lengths(config)[1])

    def step() -> None:
        runner.backward(micro, whole, nothing)
        parts.gradients.finish()
        clip_gradients(parts.parameters(), config.optim.clip_grad_norm, mesh)
        optimizer.step()
        parts.gradients.clear()

    return least_seconds(step, mesh.device, repeats)


def _micro_batches(config: RunConfig, mesh: Mesh) -> list[MicroBatch]:
    """This rank's rows of a step."""
    rows = config.train.micro_batch_size
    first = mesh.dp.rank * config.train.batch_size // mesh.dp.size
    number = config.train.batch_size // mesh.dp.size // rows
    return [_micro_batch(config, mesh, first + i * rows) for i in range(number)]


def _micro_batch(config: RunConfig, mesh: Mesh, first: int) -> MicroBatch:
    rows = config.train.micro_batch_size
    encoder, decoder = ((rows, length) for length in row_lengths(config))
    draw = torch.Generator().manual_seed(first)

    def tokens(shape: tuple[int, int]) -> torch.Tensor:
        return torch.randint(3, config.model.vocab_size, shape, generator=draw)

    batch = Seq2SeqBatch(
        encoder_tokens=tokens(encoder),
        decoder_tokens=tokens(decoder),
        decoder_targets=tokens(decoder),
        encoder_mask=torch.ones(encoder, dtype=torch.bool),
        decoder_mask=torch.ones(decoder, dtype=torch.bool),
        sample_index=torch.arange(first, first + rows),
    )
    samples = batch.sample_index.to(mesh.device)
    return MicroBatch.of(batch, mesh.device, Noise(config.train.seed, 0, samples))
