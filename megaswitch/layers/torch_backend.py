"""The reference: torch multiplies, on any device; FP8 is emulated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megaswitch.config import FP8Config
from megaswitch.layers.fp8 import Blocks, Current, Delayed, Factor, FP8Kernel, Scaling
from megaswitch.layers.kernels import LinearMap
from megaswitch.layers.parameter import local
from megaswitch.layers.recompute import recompute
from megaswitch.parallel.mesh import Mesh

# Ranks that see other parts of a map's factors: other tokens, or other slices of the matrix.
_AXES = {False: ("dp", "tp"), True: ("edp", "tp")}


class TorchBackend:
    """torch's own products.

    Args:
        fp8: the recipe.
        mesh: the ranks, all of which have such a backend.
    """

    recompute: Callable[..., Any] = staticmethod(recompute)

    def __init__(self, fp8: FP8Config, mesh: Mesh) -> None:
        self.fp8, self.mesh = fp8, mesh
        self.delayed: dict[str, tuple[Delayed, bool]] = {}

    def attach(self, maps: Mapping[str, LinearMap]) -> None:
        """See `Backend`."""
        if self.fp8.recipe == "none":
            return
        for name, module in maps.items():
            weight = module.weight
            module.kernel = FP8Kernel(self._scaling(name, weight))

    def _scaling(self, name: str, weight: nn.Parameter) -> Scaling:
        fp8 = self.fp8
        if fp8.recipe == "current":
            return Current()
        if fp8.recipe == "block":
            return Blocks(128, square=True)
        if fp8.recipe == "mxfp8":
            return Blocks(32, square=False)
        stacked = weight.ndim == 3
        shape = (len(local(weight)) if stacked else 1, len(Factor), fp8.amax_history)
        amax = torch.zeros(shape, dtype=torch.float32, device=self.mesh.device)
        scaling = Delayed(amax, fp8.margin)
        self.delayed[name] = scaling, stacked
        return scaling

    def forward_pass(self) -> AbstractContextManager[None]:
        """See `Backend`."""
        return nullcontext()

    def finish_step(self, *, keep: bool = True) -> None:
        """See `Backend`. All ranks of a map get the same history."""
        if not keep:
            for scaling, _ in self.delayed.values():
                scaling.forget()
            return
        for stacked, axes in _AXES.items():
            scalings = [s for s, is_stack in self.delayed.values() if is_stack == stacked]
            if not scalings:
                continue
            recorded = torch.cat([s.amax[..., 0].flatten() for s in scalings])
            for axis in map(self.mesh.axis, axes):
                if axis.size > 1:
                    dist.all_reduce(recorded, dist.ReduceOp.MAX, group=axis.group)
            parts = recorded.split([s.amax[..., 0].numel() for s in scalings])
            for scaling, part in zip(scalings, parts, strict=True):
                scaling.amax[..., 0] = part.view_as(scaling.amax[..., 0])
                scaling.turn()

    def history(self) -> dict[str, Tensor]:
        """See `Backend`."""
        return {name: scaling.amax for name, (scaling, _) in self.delayed.items()}
