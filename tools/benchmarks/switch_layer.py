"""A Switch layer, forward and backward, beside the dense FFN of equal FLOPs per token.

Also beside the textbook form of the same layer: a Python loop over experts that masks tokens.
Command: python tools/benchmarks/switch_layer.py --output tools/benchmarks/switch_layer.json
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from side_by_side import compare, record
from torch import Tensor, nn

from megaswitch.config import load_config
from megaswitch.layers.noise import Noise
from megaswitch.model.ffn import FeedForward
from megaswitch.model.moe import SwitchFFN
from megaswitch.schema import ModelConfig


def masked_loop(layer: SwitchFFN, x: Tensor) -> Tensor:
    """The same experts over masks, one gather and scatter each, without capacity."""
    probabilities = torch.softmax(x @ layer.router.weight.t(), -1)
    gate, expert = probabilities.max(-1)
    y = torch.zeros_like(x)
    wi, wo = layer.experts.wi.weight.unbind(0), layer.experts.wo.weight.unbind(0)
    for index in range(layer.num_experts):
        rows = (expert == index).nonzero().squeeze(1)
        y = y.index_add(0, rows, torch.relu(x[rows] @ wi[index].t()) @ wo[index].t())
    return y * gate[:, None]


def step(module: nn.Module, run: Callable[[], Tensor], x: Tensor) -> Callable[[], None]:
    """A forward and backward pass with fresh gradients."""

    def once() -> None:
        module.zero_grad()
        x.grad = None
        run().backward(torch.ones_like(x))

    return once


def variants(config: ModelConfig, rows: int, length: int) -> dict[str, Callable[[], None]]:
    """The functions to compare for one shape."""
    dense, switch = FeedForward(config, "ffn"), SwitchFFN(config, "ffn")
    for weight in (*dense.parameters(), *switch.parameters()):
        nn.init.normal_(weight, 0.0, 0.05)
    x = torch.randn(rows, length, config.d_model, requires_grad=True)
    flat = x.detach().flatten(0, 1).requires_grad_()
    mask = torch.ones(rows, length, dtype=torch.bool)
    noise = Noise(0, 0, torch.arange(rows))
    return {
        "dense": step(dense, lambda: dense(x, None), x),
        "switch, capacity 1.25, jitter": step(switch, lambda: switch(x, mask, rows, noise)[0], x),
        "switch, no jitter": step(switch, lambda: switch(x, mask, rows, None)[0], x),
        "masked loop, no capacity": step(switch, lambda: masked_loop(switch, flat), flat),
    }


def main() -> None:
    """Compare over the shapes of a small study."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    for d_model, experts in ((256, 8), (256, 32), (512, 8), (512, 32)):
        config = load_config(
            None,
            [
                f"--model.d_model={d_model}",
                f"--model.d_ff={4 * d_model}",
                f"--model.moe.num_experts={experts}",
            ],
        ).model
        name = f"d_model {d_model}, {experts} experts, 2048 tokens"
        print(name)
        results[name] = compare(variants(config, 16, 128))
    record("tools/benchmarks/switch_layer.py", results, arguments.output)


if __name__ == "__main__":
    main()
