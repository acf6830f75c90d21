"""Parameters that carry their placement and their initial distribution.

Each parameter is filled from a generator seeded by (run seed, parameter name, expert index), so a
model starts identical whatever the layout it is trained under.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from megaswitch.parallel.shard import MeshAxis, declare, spec_of
from megaswitch.parallel.weights import block_of


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


def local(weight: Tensor) -> Tensor:
    """This rank's slice of a parameter, whose gradient is the slice's."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


@torch.no_grad()
def initialize(parameters: Iterable[tuple[str, nn.Parameter, Init]], seed: int) -> None:
    """Fill every parameter from its own generator; experts one by one.

    Values are drawn on the CPU in fp32 and then cast, so device and dtype change nothing else. Of a
    sliced parameter the whole matrix is drawn and the slice kept.

    Args:
        parameters: this rank's blocks (see `parallel.weights`) with their global names.
        seed: of the run.
    """
    for name, weight, init in parameters:
        block = block_of(weight)
        is_expert = spec_of(weight).is_expert
        first = 1 if is_expert else 0
        shape, slices = block.shape[first:], block.slices[first:]
        targets = weight.unbind(0) if is_expert else (weight,)
        for index, target in enumerate(targets, block.offsets[0] if is_expert else 0):
            if target.numel():
                generator = torch.Generator().manual_seed(stable_hash(seed, name, index))
                drawn = torch.empty(shape, dtype=torch.float32, device="cpu")
                init.fill_(drawn, generator)
                target.copy_(drawn[slices])
