"""T5's layer norm: scale by the root mean square, no mean, no bias."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megaswitch.layers.compiled import region_to_compile
from megaswitch.layers.parameter import Init, parameter
from megaswitch.parallel.regions import named


def at_least_fp32(x: Tensor) -> Tensor:
    """`x` in the wider of its dtype and fp32, so that fp64 stays fp64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class RMSNorm(nn.Module):
    """y = x / √(mean(x²) + ε) · weight, computed in at least fp32."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = parameter((size,), (None,), Init("constant", 1.0))

    @named("norms")
    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension of x [..., size]."""
        return _rms_norm(x, self.weight, self.epsilon)


@region_to_compile
def _rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    wide = at_least_fp32(x)
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return (normed * weight).to(x.dtype)
