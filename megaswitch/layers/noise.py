"""Counter-based randomness: what is perturbed decides the draw, not when or where it happens.

The draw for an element is a hash of (seed, step, site, global sample, element). It is the same
under every layout, micro-batch size and recomputation, and a resumed run needs no generator state.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megaswitch.layers.parameter import stable_hash

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15: Weyl increment of SplitMix64
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64 (two's complement wraps as uint64 does). In place."""
    x.bitwise_xor_((x >> 30) & ((1 << 34) - 1)).mul_(_MIX_1)
    x.bitwise_xor_((x >> 27) & ((1 << 37) - 1)).mul_(_MIX_2)
    return x.bitwise_xor_((x >> 31) & ((1 << 33) - 1))


@dataclass(frozen=True)
class Noise:
    """The source of one training step's randomness.

    Attributes:
        seed: of the run.
        step: optimizer step; micro-batches of a step differ by their samples.
        samples: [B] int64, the global index of each row's sample.
    """

    seed: int
    step: int
    samples: Tensor

    @classmethod
    def from_torch(cls, rows: int, device: torch.device) -> Noise:
        """Noise seeded by torch's global generator, for models trained outside our trainer."""
        seed = int(torch.randint(0, 2**62, ()).item())
        return cls(seed, 0, torch.arange(rows, device=device))

    def uniform(self, site: str, shape: tuple[int, ...]) -> Tensor:
        """Uniform draws in [0, 1), fp32.

        Args:
            site: the name of the module that asks; each name has its own stream.
            shape: [B, …], one row for each sample.
        """
        base = stable_hash(self.seed, self.step, site)
        keys = _mix(self.samples * _GOLDEN + base)
        elements = torch.arange(1, math.prod(shape[1:]) + 1, device=keys.device)
        counters = keys[:, None] + (elements * _GOLDEN)[None, :]
        bits = (_mix(counters) >> 40).bitwise_and_((1 << 24) - 1)
        return bits.to(torch.float32).mul_(2.0**-24).view(shape)

    def dropout(self, x: Tensor, rate: float, site: str) -> Tensor:
        """Zero elements of `x` [B, …] with probability `rate`, and scale the rest up."""
        keep = self.uniform(site, tuple(x.shape)) >= rate
        return x * keep.to(x.dtype).mul_(1.0 / (1.0 - rate))


def dropout(x: Tensor, rate: float, site: str, noise: Noise | None) -> Tensor:
    """Dropout if there is noise (training) and a rate; else `x` itself."""
    return x if noise is None or rate == 0.0 else noise.dropout(x, rate, site)
