"""A training step of a sparse model beside our dense model of equal FLOPs per token, and beside HF.

Forward with loss, backward, and optimizer (gradient norm, update, zeroed gradients) are timed
apart. The optimizer is fused AdamW, or each side's own Adafactor. All models of one shape share
their weights where they have them alike.
Command: python tools/benchmarks/step.py [--optimizer adafactor] --output tools/benchmarks/step.json
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from side_by_side import Lap, line, measure, ratio, record, summary
from torch import Tensor, nn
from transformers import (
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.optimization import Adafactor

from megaswitch.checkpoint.huggingface import to_hf
from megaswitch.config import load_config
from megaswitch.data.span_corruption import Seq2SeqBatch
from megaswitch.layers.noise import Noise
from megaswitch.model.switch_transformer import SwitchTransformer
from megaswitch.optim.build import build_optimizer, clip_gradients
from megaswitch.schema import RunConfig
from megaswitch.train.objectives import BatchSize, training_loss

LENGTHS = (128, 32)
PHASES = ("forward", "backward", "optimizer")
DENSE, SWITCH = "dense", "switch, capacity 1.25, jitter"
HF_DENSE, HF_SWITCH = "HF T5, dense", "HF Switch"


@dataclass(frozen=True)
class Shape:
    """What is trained: 6 + 6 layers, every `every`-th sparse, on `rows` × 128 + 32 tokens."""

    d_model: int
    experts: int
    rows: int
    every: int = 2

    def __str__(self) -> str:
        layers = "every layer" if self.every == 1 else "every other layer"
        return f"d_model {self.d_model}, {self.experts} experts, {layers}, {self.rows} rows"

    def config(self, *, dense: bool, optimizer: str) -> RunConfig:
        """Our configuration."""
        model = {
            "d_model": self.d_model,
            "d_ff": 4 * self.d_model,
            "num_heads": self.d_model // 64,
            "moe.num_experts": 0 if dense else self.experts,
        }
        if not dense:
            model |= {f"moe.{s}_sparse_step": self.every for s in ("encoder", "decoder")}
        optim = {"name": optimizer, "learning_rate": 1e-6}  # routing stays as it was initialised
        options = [f"--model.{k}={v}" for k, v in model.items()]
        return load_config(None, options + [f"--optim.{k}={v}" for k, v in optim.items()])


SHAPES = [
    Shape(d_model, experts, rows, every)
    for rows in (8, 32)
    for d_model, experts, every in (
        (256, 8, 2),
        (256, 32, 2),
        (512, 32, 2),
        (256, 64, 1),
        (512, 8, 2),
    )
]


class Step:
    """The phases of a training step of one model; `loss` runs the forward pass."""

    def __init__(self, model: nn.Module, config: RunConfig, loss: Callable[[], Tensor]) -> None:
        self.model = model.train()
        self.loss = loss
        parameters = [p for p in model.parameters() if p.requires_grad]
        rate = config.optim.learning_rate
        self.optimizer: torch.optim.Optimizer
        if isinstance(model, SwitchTransformer):
            self.optimizer = build_optimizer(parameters, config.optim)
        elif config.optim.name == "adamw":
            self.optimizer = torch.optim.AdamW(parameters, lr=rate, fused=True)
        else:
            self.optimizer = Adafactor(parameters, lr=rate, relative_step=False)
        self.parameters = parameters
        self.output: Tensor | None = None

    def phases(self) -> list[Callable[[], None]]:
        """In the order of `PHASES`."""
        return [self._forward, self._backward, self._optimize]

    def _forward(self) -> None:
        self.output = self.loss()

    def _backward(self) -> None:
        assert self.output is not None
        self.output.backward()
        self.output = None

    def _optimize(self) -> None:
        clip_gradients(self.parameters, None)
        self.optimizer.step()
        self.optimizer.zero_grad()


def our_loss(model: SwitchTransformer, config: RunConfig, batch: list[Tensor]) -> Tensor:
    """As `Trainer` computes it, without padding."""
    encoder, decoder, targets = batch
    samples = torch.arange(len(encoder))
    output = model(encoder, decoder, noise=Noise(0, 0, samples))
    full = Seq2SeqBatch(
        encoder_tokens=encoder,
        decoder_tokens=decoder,
        decoder_targets=targets,
        encoder_mask=torch.ones_like(encoder, dtype=torch.bool),
        decoder_mask=torch.ones_like(decoder, dtype=torch.bool),
        sample_index=samples,
    )
    loss, _ = training_loss(output, full, BatchSize(len(encoder), targets.numel()), config)
    assert loss is not None
    return loss


def hf_loss(model: nn.Module, batch: list[Tensor], **arguments: Any) -> Tensor:
    """HF's own: cross-entropy and, for Switch, its router losses."""
    encoder, decoder, targets = batch
    output = model(input_ids=encoder, decoder_input_ids=decoder, labels=targets, **arguments)
    return output.loss


def hf_like(ours: SwitchTransformer) -> nn.Module:
    """HF's model of our model's shape, with its weights."""
    config = ours.config
    common = {
        "vocab_size": config.vocab_size,
        "d_model": config.d_model,
        "d_kv": config.d_kv,
        "d_ff": config.d_ff,
        "num_layers": config.num_encoder_layers,
        "num_decoder_layers": config.num_decoder_layers,
        "num_heads": config.num_heads,
        "dropout_rate": 0.0,
        "decoder_start_token_id": 0,
    }
    model: nn.Module
    if config.moe.num_experts:
        sparse = [name.split(".")[0] for name in config.switch_layers()]
        model = SwitchTransformersForConditionalGeneration(
            SwitchTransformersConfig(
                **common,
                num_experts=config.moe.num_experts,
                num_sparse_encoder_layers=sparse.count("encoder"),
                num_sparse_decoder_layers=sparse.count("decoder"),
                expert_capacity=10_000,  # takes every token
                router_jitter_noise=config.moe.jitter,
            )
        )
    else:
        model = T5ForConditionalGeneration(T5Config(**common))
    model.load_state_dict(to_hf(ours.state_dict(), config), strict=False)
    return model


def variants(shape: Shape, optimizer: str) -> dict[str, Step]:
    """The steps to compare, on one batch."""
    batch = [torch.randint(2, 32_000, (shape.rows, length)) for length in (*LENGTHS, LENGTHS[1])]
    steps = {}
    for dense, ours_name, hf_name in ((True, DENSE, HF_DENSE), (False, SWITCH, HF_SWITCH)):
        config = shape.config(dense=dense, optimizer=optimizer)
        ours = SwitchTransformer(config.model).initialize(0)
        theirs = hf_like(ours)
        arguments = {} if dense else {"output_router_logits": True}
        steps[ours_name] = Step(
            ours, config, lambda ours=ours, config=config: our_loss(ours, config, batch)
        )
        steps[hf_name] = Step(
            theirs, config, lambda hf=theirs, more=arguments: hf_loss(hf, batch, **more)
        )
    return steps


def results(laps: dict[str, list[list[Lap]]]) -> dict[str, Any]:
    """Summaries of the phases and of their sums, with ratios to our dense and to HF's Switch."""
    result: dict[str, Any] = {}
    sums = {
        name: {
            **dict(zip(PHASES, phases, strict=True)),
            "forward + backward": _sum(phases[:2]),
            "step": _sum(phases),
        }
        for name, phases in laps.items()
    }
    for name, parts in sums.items():
        result[name] = {}
        for part, series in parts.items():
            numbers: dict[str, Any] = summary(series)
            for reference in (DENSE, HF_SWITCH):
                numbers[f"by {reference}"] = ratio(series, sums[reference][part])
            result[name][part] = numbers
            ratios = (f"×{numbers[f'by {r}']['ratio']:.3f}" for r in (DENSE, HF_SWITCH))
            print(f"{part:20s}", line(name, numbers), *ratios)
    return result


def _sum(phases: list[list[Lap]]) -> list[Lap]:
    return [sum(laps[1:], laps[0]) for laps in zip(*phases, strict=True)]


def main() -> None:
    """Compare at each shape."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--optimizer", default="adamw", choices=("adamw", "adafactor"))
    parser.add_argument("--rounds", type=int, default=15, help="of 8 rows; 32 rows get half")
    parser.add_argument("--only", help="shapes whose description has this text")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    everything = {}
    for shape in SHAPES:
        if arguments.only and arguments.only not in str(shape):
            continue
        rounds = arguments.rounds if shape.rows == 8 else arguments.rounds // 2
        print(f"{shape}, {rounds} rounds", flush=True)
        steps = variants(shape, arguments.optimizer)
        phases = {name: step.phases() for name, step in steps.items()}
        everything[f"{shape}, {rounds} rounds"] = results(measure(phases, rounds=rounds, warmup=1))
        del steps, phases
        gc.collect()
        record("tools/benchmarks/step.py", everything, arguments.output)


if __name__ == "__main__":
    main()
