"""What the parallel code path costs a single process, beside a training loop written by hand.

Both train the same model on the same batch: one calls the model, `backward`, clipping and the
optimizer itself, the other goes through `Runner`, `GradientSums` and the clipping that knows of
ranks. Operator calls are those that reach ATen, forward and backward.
Command: python tools/benchmarks/machinery.py --output tools/benchmarks/machinery.json
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from side_by_side import compare, record
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from megaswitch.config import RunConfig, load_config
from megaswitch.data.span_corruption import Seq2SeqBatch
from megaswitch.layers.noise import Noise
from megaswitch.model.switch_transformer import SwitchTransformer
from megaswitch.optim.build import build_optimizer, clip_gradients
from megaswitch.parallel.mesh import Mesh
from megaswitch.train.objectives import BatchSize, MicroBatch, training_loss
from megaswitch.train.parts import build_parts
from megaswitch.train.runner import Runner

ROWS, LENGTHS = 8, (128, 32)
SHAPES = [(256, 8, "adamw"), (256, 32, "adafactor")]


class _Calls(TorchDispatchMode):
    """Counts operator calls."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))


def config_of(d_model: int, experts: int, optimizer: str) -> RunConfig:
    """6 + 6 layers, every other sparse."""
    model = {"d_model": d_model, "d_ff": 4 * d_model, "num_heads": 4, "moe.num_experts": experts}
    keys = [f"--model.{key}={value}" for key, value in model.items()]
    # So slow that routing stays as it was initialised.
    return load_config(None, [*keys, f"--optim.name={optimizer}", "--optim.learning_rate=1e-6"])


def micro_batch() -> MicroBatch:
    """Random tokens, without padding."""
    tokens = [torch.randint(3, 32_000, (ROWS, length)) for length in (*LENGTHS, LENGTHS[1])]
    masks = [torch.ones(ROWS, length, dtype=torch.bool) for length in LENGTHS]
    samples = torch.arange(ROWS)
    batch = Seq2SeqBatch(
        encoder_tokens=tokens[0],
        decoder_tokens=tokens[1],
        decoder_targets=tokens[2],
        encoder_mask=masks[0],
        decoder_mask=masks[1],
        sample_index=samples,
    )
    return MicroBatch.of(batch, torch.device("cpu"), Noise(0, 0, samples))


def by_hand(config: RunConfig, micro: MicroBatch, whole: BatchSize) -> Callable[[], None]:
    """A step as anyone would write it."""
    model = SwitchTransformer(config.model).initialize(0).train()
    optimizer = build_optimizer(model.parameters(), config.optim)

    def step() -> None:
        batch = micro.batch
        output = model(batch.encoder_tokens, batch.decoder_tokens, noise=micro.inputs.noise)
        loss, _ = training_loss(output, batch, whole, config)
        assert loss is not None
        loss.backward()
        nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        optimizer.step()
        optimizer.zero_grad()

    return step


def through_the_machinery(
    config: RunConfig, micro: MicroBatch, whole: BatchSize
) -> Callable[[], None]:
    """A step as `Trainer` makes it."""
    mesh = Mesh.start("cpu")
    parts = build_parts(config, mesh)
    parts.initialize(0)
    parts.train()
    runner = Runner(config, mesh, parts)
    optimizer = build_optimizer(parts.parameters(), config.optim)

    def step() -> None:
        runner.backward([micro], whole, lambda *_: None)
        parts.gradients.finish()
        clip_gradients(parts.parameters(), None, mesh)
        optimizer.step()
        parts.gradients.clear()

    return step


def main() -> None:
    """Measure, print, record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--rounds", type=int, default=25)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    results = {}
    for shape in SHAPES:
        config, micro = config_of(*shape), micro_batch()
        whole = BatchSize(ROWS, ROWS * LENGTHS[1])
        steps = {
            "by hand": by_hand(config, micro, whole),
            "machinery": through_the_machinery(config, micro, whole),
        }
        name = "d_model {}, {} experts, {}".format(*shape)
        print(name)
        calls = {}
        for variant, step in steps.items():
            step()
            with _Calls() as counted:
                step()
            calls[variant] = counted.count
        print(f"operator calls: {calls}, ×{calls['machinery'] / calls['by hand']:.4f}")
        results[name] = {"calls": calls, "step": compare(steps, rounds=arguments.rounds)}
    record("tools/benchmarks/machinery.py", results, arguments.output)


if __name__ == "__main__":
    main()
