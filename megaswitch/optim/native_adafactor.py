"""Adafactor's update of a factored parameter that a CPU has whole, by the compiled core.

torch needs some ten passes over a matrix, each from memory; the core takes three, of which all but
the first find it in the caches, and keeps no copy of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from megaswitch import native
from megaswitch.layers.kernels import kernels_of
from megaswitch.optim.piles import beta2_after
from megaswitch.parallel.shard import spec_of

# Types of weights and moments alike.
_DTYPES = frozenset({torch.float32, torch.float64})


def suits(parameter: nn.Parameter, group: dict[str, Any], state: dict[str, Tensor]) -> bool:
    """Whether `update` is for this whole parameter: on a CPU, factored, each expert for itself."""
    if "row" not in state or parameter.dtype not in _DTYPES or kernels_of(parameter) != "cpu":
        return False
    return not spec_of(parameter).is_expert or group["expert_statistics"] == "per-expert"


def update(parameter: nn.Parameter, group: dict[str, Any], state: dict[str, Tensor]) -> None:
    """Update the parameter and its states, in place; see `Adafactor`."""
    assert parameter.is_contiguous(), "Adafactor updates contiguous parameters only"
    assert parameter.grad is not None
    torch.ops.megaswitch.adafactor(
        parameter,
        parameter.grad.to(parameter.dtype).contiguous(),
        state["row"],
        state["column"],
        learning_rate=group["lr"],
        beta2=beta2_after(state["step"], group),
        clip_threshold=group["clip_threshold"],
        epsilon1=group["epsilon1"],
        epsilon2=group["epsilon2"],
        keep=1.0 - group["lr"] * group["weight_decay"],
        scale_by_parameter=group["scale_by_parameter"],
    )
    state["step"].add_(1)


_LIBRARY = torch.library.Library("megaswitch", "FRAGMENT")
_LIBRARY.define(
    "adafactor(Tensor(a!) parameter, Tensor gradient, Tensor(b!) row, Tensor(c!) column, *, "
    "float learning_rate, float beta2, float clip_threshold, float epsilon1, float epsilon2, "
    "float keep, bool scale_by_parameter) -> ()"
)


@torch.library.impl(_LIBRARY, "adafactor", "CPU")
def _update_in_the_core(*tensors: Tensor, **numbers: Any) -> None:
    threads = torch.get_num_threads()
    arrays = (t.detach().numpy() for t in tensors)
    native.adafactor(*arrays, **numbers, threads=threads)
    torch.autograd.graph.increment_version(tensors[0])  # what torch writes to, it counts itself


@torch.library.register_fake("megaswitch::adafactor", lib=_LIBRARY)
def _(*tensors: Tensor, **numbers: Any) -> None:
    pass
