"""On a GPU: a Switch FFN beside the dense FFN of equal FLOPs, its parts, and its memory.

65,536 tokens, bf16, forward and backward. `speed` is the dense FFN's time by the variant's; the
floor counts products at the FLOP/s that this GPU reaches, weights and moved rows at its bytes/s.
Command: python tools/benchmarks/switch_gpu.py --output switch_gpu.json
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from clocks import ceilings, compare_on_gpu, peak_memory
from side_by_side import record
from torch import Tensor, nn

from megaswitch.config import FP8Config, load_config
from megaswitch.layers.backend import BACKENDS, Backend
from megaswitch.layers.noise import Noise
from megaswitch.log import UserError
from megaswitch.model.dispatch import Dispatch, queue_positions
from megaswitch.model.ffn import FeedForward
from megaswitch.model.moe import SwitchFFN
from megaswitch.parallel.mesh import Mesh
from megaswitch.schema import ModelConfig
from megaswitch.train.trainable import maps_in_fp8

ROWS, LENGTH = 128, 512
SHAPES = {(768, 3072): "relu", (1024, 4096): "relu", (4096, 10240): "gated-gelu"}
EXPERTS = (8, 64, 128)
# Targets of the ratio to dense.
TARGETS = {8: 0.90, 64: 0.85, 128: 0.80}


def config_of(d_model: int, d_ff: int, activation: str, experts: int, mode: str) -> ModelConfig:
    """One layer's shape."""
    sizes = {"d_model": d_model, "d_ff": d_ff, "activation": activation}
    moe = {"num_experts": experts, "capacity_mode": mode, "group_size": 8192}
    options = [f"--model.{k}={v}" for k, v in sizes.items()]
    options += [f"--model.moe.{k}={v}" for k, v in moe.items()]
    return load_config(None, [*options, "--data.encoder_length=512", *batch()]).model


def batch() -> list[str]:
    """A micro-batch of one routing group."""
    return ["--train.micro_batch_size=16", "--train.batch_size=16"]


def filled(module: nn.Module) -> nn.Module:
    """The module with bf16-sized weights, on the GPU."""
    module = module.to("cuda")
    for weight in module.parameters():
        nn.init.normal_(weight, 0.0, 0.02)
    return module.train()


def step(module: nn.Module, run: Callable[[], Tensor], backend: Backend | None = None) -> Any:
    """A forward and backward pass in bf16 with fresh gradients."""

    def once() -> None:
        module.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            if backend is None:
                y = run()
            else:
                with backend.forward_pass():
                    y = run()
        y.sum().backward()
        if backend is not None:
            backend.finish_step()

    return once


def layers(
    config: ModelConfig, recipe: str = "none", backend: str = "torch", *, fused: bool = False
) -> tuple[Any, Any]:
    """Steps of a dense and of a Switch FFN."""
    x = torch.randn(ROWS, LENGTH, config.d_model, device="cuda", requires_grad=True)
    mask = torch.ones(ROWS, LENGTH, dtype=torch.bool, device="cuda")
    noise = Noise(0, 0, torch.arange(ROWS, device="cuda"))
    dense, switch = filled(FeedForward(config, "ffn")), filled(SwitchFFN(config, "ffn"))
    switch.fused = fused
    engine = None
    if (recipe, backend) != ("none", "torch"):
        fp8 = FP8Config() if recipe == "none" else FP8Config(recipe=recipe)  # type: ignore[arg-type]
        engine = BACKENDS[backend](fp8, Mesh(0, 1, torch.device("cuda"), None))
        for name, module in (("dense", dense), ("switch", switch)):
            maps = maps_in_fp8(module, fp8)
            engine.attach({f"{name}.{n}": m for n, m in maps.items()})
    rows = 8192 // LENGTH
    return (
        step(dense, lambda: dense(x, None), engine),
        step(switch, lambda: switch(x, mask, rows, noise)[0], engine),
    )


def floor(config: ModelConfig, reached: dict[str, float]) -> dict[str, float]:
    """Seconds below which the experts cannot be: products, against weights and rows moved."""
    tokens, matrices = ROWS * LENGTH, 3 if config.activation == "gated-gelu" else 2
    flops = 6 * tokens * config.d_model * config.d_ff * matrices
    weights = 3 * 2 * config.moe.num_experts * config.d_model * config.d_ff * matrices
    rows = 9 * 2 * tokens * config.d_model
    products = max(flops / reached["flops"], weights / reached["bytes"])
    return {"products": products, "rows": rows / reached["bytes"], "flops": flops}


def parts(config: ModelConfig) -> dict[str, Callable[[], object]]:
    """What surrounds the experts, one by one: forward only."""
    tokens, experts = ROWS * LENGTH, config.moe.num_experts
    expert = torch.randint(experts, (8, tokens // 8), device="cuda")
    kept = torch.ones_like(expert, dtype=torch.bool)
    x = torch.randn(tokens, config.d_model, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(experts, config.d_model, device="cuda")
    dispatch = Dispatch.by_expert(expert, kept, experts)
    return {
        "router's product, fp32": lambda: x.float() @ weight.t(),
        "places in queues": lambda: queue_positions(expert, kept, experts),
        "sort by expert": lambda: Dispatch.by_expert(expert, kept, experts),
        "gather rows": lambda: dispatch.gather(x),
    }


def main() -> None:
    """Compare at each shape; a shape that does not fit is told."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--te", action="store_true", help="Transformer Engine, too")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    results: dict[str, Any] = {"ceilings": ceilings()}
    for (d_model, d_ff), activation in SHAPES.items():
        for experts in EXPERTS:
            name = f"{d_model}/{d_ff} {activation}, {experts} experts"
            print(name, flush=True)
            try:
                results[name] = one_shape(d_model, d_ff, activation, experts, arguments)
            except (torch.OutOfMemoryError, UserError) as error:
                results[name] = {"failed": str(error).splitlines()[0]}
                print(results[name])
            torch.cuda.empty_cache()
            record("tools/benchmarks/switch_gpu.py", results, arguments.output)


def one_shape(
    d_model: int, d_ff: int, activation: str, experts: int, arguments: argparse.Namespace
) -> dict[str, Any]:
    """All variants of a shape."""
    group = config_of(d_model, d_ff, activation, experts, "group")
    dense, switch = layers(group)
    steps = {"dense": dense, "switch, capacity 1.25": switch}
    fused = layers(group, fused=True)[1]
    steps["switch, Triton"] = fused
    steps["switch, dropless"] = layers(config_of(d_model, d_ff, activation, experts, "dropless"))[1]
    if arguments.te:
        for recipe in ("none", "delayed", "current", "block"):
            fast = layers(group, recipe, "te")
            steps[f"dense, te {recipe}"], steps[f"switch, te {recipe}"] = fast
    result = {
        "step": compare_on_gpu(steps, rounds=arguments.rounds),
        "parts": compare_on_gpu(parts(group), rounds=5),
        "floor": floor(group, ceilings()),
        "peak_bytes": {name: peak_memory(step) for name, step in steps.items()},
        "target": TARGETS[experts] if d_model < 4096 else 0.90,
    }
    reached = result["step"]["switch, capacity 1.25"]["speed"]
    print(f"ratio to dense {reached:.3f}, target {result['target']}")
    return result


if __name__ == "__main__":
    main()
