"""A step of Adafactor: by torch, small parameters of a shape alone and together; by the core.

On a CPU the compiled core updates factored parameters; fused AdamW stands beside it.
Usage: python tools/benchmarks/adafactor.py [--device cuda] [--output FILE.json]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from side_by_side import compare, record
from torch import nn

from megaswitch.config import model_config
from megaswitch.optim import native_adafactor, piles
from megaswitch.optim.adafactor import Adafactor
from megaswitch.parallel.shard import declare_spec
from megaswitch.scale.sizes import parameters

PRESETS = ("switch-tiny", "t5-small")


def variants(preset: str, device: str) -> dict[str, Callable[[], None]]:
    """Steps of one optimizer in several ways, and of another."""
    made = []
    for p in parameters(model_config(preset)):
        one = declare_spec(nn.Parameter(torch.randn(p.shape, device=device)), p.spec)
        one.grad = torch.randn_like(one)
        made.append(one)
    optimizer = Adafactor(made, lr=0.01)
    limit = "_PILE_BYTES_CPU" if device == "cpu" else "_PILE_BYTES_ACCELERATOR"
    own = getattr(piles, limit)
    suits = native_adafactor.suits

    def step(size: int, suits: Callable[..., bool] = lambda *_: False) -> Callable[[], None]:
        def once() -> None:
            with (
                mock.patch.object(piles, limit, size),
                mock.patch.object(native_adafactor, "suits", suits),
            ):
                optimizer.step()
            if device == "cuda":
                torch.cuda.synchronize()

        return once

    sizes = {"alone": 0, f"together, {own >> 10} KiB": own}
    sizes |= {f"together, {s >> 10} KiB": s for s in (own // 8, own * 8)}
    steps = {name: step(size) for name, size in sizes.items()}
    if device == "cpu":
        steps["by the core"] = step(own, suits)
        steps["fused AdamW"] = torch.optim.AdamW(made, lr=1e-6, fused=True).step
    return steps


def main() -> None:
    """Compare over presets."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    for preset in PRESETS:
        print(preset)
        results[preset] = compare(variants(preset, arguments.device))
    record("tools/benchmarks/adafactor.py", results, arguments.output)


if __name__ == "__main__":
    main()
