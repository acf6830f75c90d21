"""A step of Adafactor: small parameters of one shape together, and each alone.

Usage: python tools/benchmarks/adafactor.py [--device cuda] [--output FILE.json]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from side_by_side import compare, record
from torch import nn

from megaswitch.config import model_config
from megaswitch.optim import piles
from megaswitch.optim.adafactor import Adafactor
from megaswitch.parallel.shard import declare_spec
from megaswitch.scale.sizes import parameters

PRESETS = ("switch-tiny", "t5-small")

_OWN = {name: getattr(piles, name) for name in ("_PILE_BYTES_CPU", "_PILE_BYTES_ACCELERATOR")}


def variants(preset: str, device: str) -> dict[str, Callable[[], None]]:
    """Steps of one optimizer, with piles of different sizes."""
    made = []
    for p in parameters(model_config(preset)):
        one = declare_spec(nn.Parameter(torch.randn(p.shape, device=device)), p.spec)
        one.grad = torch.randn_like(one)
        made.append(one)
    optimizer = Adafactor(made, lr=0.01)
    limit = "_PILE_BYTES_CPU" if device == "cpu" else "_PILE_BYTES_ACCELERATOR"
    own = _OWN[limit]

    def step(size: int) -> Callable[[], None]:
        def once() -> None:
            setattr(piles, limit, size)
            optimizer.step()
            if device == "cuda":
                torch.cuda.synchronize()

        return once

    sizes = {"alone": 0, f"together, {own >> 10} KiB": own}
    sizes |= {f"together, {s >> 10} KiB": s for s in (own // 8, own * 8)}
    return {name: step(size) for name, size in sizes.items()}


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
