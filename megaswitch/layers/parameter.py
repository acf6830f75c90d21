"""Parameters that carry their placement and their initial distribution.

Each parameter is filled from a generator seeded by (run seed, parameter name, expert index), so a
model starts identical whatever the layout it is trained under.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from megaswitch.parallel.shard import MeshAxis, declare, spec_of


@dataclass(frozen=True)
class Init:
    """An initial distribution: normal, truncated normal (±2σ, resampled) or constant.

    The truncated kind keeps σ as the parameter of the untruncated normal, as the paper's footnote 6
    and TensorFlow do, so its effective deviation is 0.88σ.
    """

    kind: Literal["normal", "truncated", "constant"]
    value: float

    def fill_(self, tensor: Tensor, generator: torch.Generator) -> None:
        """Overwrite `tensor` in place."""
        if self.kind == "constant":
            tensor.fill_(self.value)
            return
        tensor.normal_(0.0, self.value, generator=generator)
        if self.kind == "truncated":
            # Not torch's trunc_normal_, whose draws changed between releases.
            while (beyond := tensor.abs() > 2 * self.value).any():
                again = tensor.new_empty(int(beyond.sum()))
                tensor[beyond] = again.normal_(0.0, self.value, generator=generator)


def scaled(scale: float, fan_in: int) -> Init:
    """Truncated normal with σ = √(scale / fan_in) (paper §2.4)."""
    return Init("truncated", math.sqrt(scale / fan_in))


def parameter(
    shape: tuple[int, ...],
    axes: tuple[MeshAxis | None, ...],
    init: Init,
    *,
    is_bias: bool = False,
) -> nn.Parameter:
    """An unfilled parameter of `shape`, sliced over `axes`, to be filled by `initialize`."""
    result = declare(nn.Parameter(torch.empty(shape)), *axes, is_bias=is_bias)
    result.init = init  # type: ignore[attr-defined]
    return result


def stable_hash(*parts: object) -> int:
    """A 63-bit hash of `parts`, equal in every process and release of Python."""
    digest = hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@torch.no_grad()
def initialize(module: nn.Module, seed: int) -> None:
    """Fill every parameter of `module` from its own generator; experts one by one.

    Values are drawn on the CPU in fp32 and then cast, so device and dtype change nothing else.
    """
    for name, weight in module.named_parameters():
        init: Init = weight.init  # type: ignore[attr-defined]
        slices = weight.unbind(0) if spec_of(weight).is_expert else (weight,)
        for index, target in enumerate(slices):
            generator = torch.Generator().manual_seed(stable_hash(seed, name, index))
            drawn = torch.empty(target.shape, dtype=torch.float32, device="cpu")
            init.fill_(drawn, generator)
            target.copy_(drawn)
