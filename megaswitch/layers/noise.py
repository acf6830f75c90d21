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


# Bytes of work memory on a CPU: what is made of a block of draws stays in the second-level cache.
_SCRATCH_BYTES = 1 << 20


def _mix(x: Tensor, scratch: Tensor) -> Tensor:
    """SplitMix64 on int64 (two's complement wraps as uint64 does) but for its last xor-shift.

    That one leaves the upper 31 bits as they are. In place; `scratch` is like `x`, and overwritten.
    """
    for shift, factor in ((30, _MIX_1), (27, _MIX_2)):
        torch.bitwise_right_shift(x, shift, out=scratch).bitwise_and_((1 << (64 - shift)) - 1)
        x.bitwise_xor_(scratch).mul_(factor)
    return x


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
        keys = self.samples * _GOLDEN + base
        keys = _mix(keys, torch.empty_like(keys))
        keys.bitwise_xor_((keys >> 31).bitwise_and_((1 << 33) - 1))
        elements = torch.arange(1, math.prod(shape[1:]) + 1, device=keys.device).mul_(_GOLDEN)
        draws = torch.empty(shape[0], len(elements), device=keys.device, dtype=torch.float32)
        # A GPU wants few big kernels, a CPU few bytes at a time.
        block = _SCRATCH_BYTES // elements.itemsize if keys.device.type == "cpu" else draws.numel()
        for columns, out in zip(elements.split(block), draws.split(block, 1), strict=True):
            rows = max(1, block // len(columns))
            for key, target in zip(keys.split(rows), out.split(rows), strict=True):
                counters = key[:, None] + columns
                bits = _mix(counters, torch.empty_like(counters)) >> 40
                target.copy_(bits.bitwise_and_((1 << 24) - 1)).mul_(2.0**-24)
        return draws.view(shape)

    def dropout(self, x: Tensor, rate: float, site: str) -> Tensor:
        """Zero elements of `x` [B, …] with probability `rate`, and scale the rest up."""
        keep = self.uniform(site, tuple(x.shape)) >= rate
        return x * keep.to(x.dtype).mul_(1.0 / (1.0 - rate))


def dropout(x: Tensor, rate: float, site: str, noise: Noise | None) -> Tensor:
    """Dropout if there is noise (training) and a rate; else `x` itself."""
    return x if noise is None or rate == 0.0 else noise.dropout(x, rate, site)
