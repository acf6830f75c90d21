"""Who multiplies. A backend gives linear maps its kernels; their parameters stay the model's own.

So any backend trains, and goes on from, the checkpoints of any other: names, shapes, slices and
all communication are the same. Router, norms, attention's softmax and the head are torch's under
every backend: they compute in fp32 what Transformer Engine would round to bf16.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

from megaswitch.config import FP8Config
from megaswitch.layers import te_backend, triton_kernels
from megaswitch.layers.compiled import missing_compiler
from megaswitch.layers.kernels import LinearMap
from megaswitch.layers.te_backend import TEBackend
from megaswitch.layers.torch_backend import TorchBackend
from megaswitch.log import UserError
from megaswitch.parallel.mesh import Mesh


class Backend(Protocol):
    """What multiplies on this rank."""

    @property
    def recompute(self) -> Callable[..., Any]:
        """Calls a function with its arguments, keeps these alone, and calls it again backward."""
        ...

    def attach(self, maps: Mapping[str, LinearMap]) -> None:
        """Give linear maps kernels. Their weights are sliced already, and not yet wrapped.

        Args:
            maps: by name; those that are in FP8 if the recipe says so.
        """
        ...

    def forward_pass(self) -> AbstractContextManager[None]:
        """What each forward pass of a micro-batch runs in."""
        ...

    def finish_step(self, *, keep: bool = True) -> None:
        """To be called by all ranks after the backward passes of a step.

        Args:
            keep: False if the step was bad: what was recorded in it is forgotten.
        """
        ...

    def history(self) -> dict[str, Tensor]:
        """What delayed scaling remembers: by linear map [E, 3, H], see `fp8.Delayed.amax`.

        A checkpoint keeps it, and fills it in place before the first step.
        """
        ...


# From the recipe and the ranks.
BACKENDS: dict[str, Callable[[FP8Config, Mesh], Backend]] = {
    "torch": TorchBackend,
    "te": TEBackend,
}


def check_backend(name: str, fp8: FP8Config, device: str) -> None:
    """Refuse a backend that cannot run here. Needs no process group.

    Args:
        name: of the backend.
        fp8: the recipe.
        device: "cpu", "cuda" or "auto", as configured.

    Raises:
        UserError: saying what is missing, and how to get it.
    """
    if name == "te" and (reason := te_backend.missing(fp8, device)):
        raise UserError(f"train.backend='te' cannot run here: {reason}")


def check_compile(on: bool, device: str) -> None:
    """Refuse to compile where torch cannot. Needs no process group.

    Args:
        on: `train.compile`.
        device: "cpu", "cuda" or "auto", as configured.

    Raises:
        UserError: saying what is missing, and how to get it.
    """
    if on and (reason := missing_compiler(device)):
        raise UserError(f"train.compile=true cannot run here: {reason}")


def check_dispatch(name: str, device: str) -> None:
    """Refuse fused dispatch where it cannot run. Needs no process group.

    Args:
        name: "torch" or "triton".
        device: "cpu", "cuda" or "auto", as configured.

    Raises:
        UserError: saying what is missing, and how to get it.
    """
    if name == "torch":
        return
    reason = triton_kernels.missing()
    if reason is None and (device == "cpu" or not torch.cuda.is_available()):
        reason = "it needs a CUDA device and there is none, or train.device='cpu'; use 'torch'"
    if reason:
        raise UserError(f"train.dispatch='triton' cannot run here: {reason}")
