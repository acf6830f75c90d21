"""Weight gradients that wait until a pipeline has time for them.

A zero-bubble schedule sends a micro-batch's input gradients on at once and fills its idle time with
the weight gradients, which nobody waits for. (torch can split any backward pass so, but its way of
grouping parameters goes wrong where one parameter is used in several places, as a relative bias or
a router is. Only the big matrices are worth waiting for anyway.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

from megaswitch.layers.kernels import as_autocast


class WeightGradients:
    """The weight gradients that one stage has put off."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Tensor, slice, Callable[[], Tensor]]] = []

    def put_off(self, parameter: Tensor, rows: slice, compute: Callable[[], Tensor]) -> None:
        """Remember to add compute() to the gradient of parameter[rows], of this rank's slice."""
        self._waiting.append((parameter, rows, compute))

    def take(self) -> Callable[[], None]:
        """All that waits, as one call that does it."""
        waiting, self._waiting = self._waiting, []

        @torch.no_grad()
        def run() -> None:
            for parameter, rows, compute in waiting:
                _accumulate(parameter, rows, compute())

        return run


def _accumulate(parameter: Tensor, rows: slice, gradient: Tensor) -> None:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    total = parameter.grad
    if isinstance(total, DTensor):
        total = total.to_local()
    total[rows] += gradient


def deferred_linear(x: Tensor, parameter: Tensor, local: Tensor, later: WeightGradients) -> Tensor:
    """`F.linear(x, local)`, `local` being this rank's slice of `parameter`."""
    x, weight = as_autocast(x, local.detach())
    return _DeferredLinear.apply(x, weight, parameter, later)


class _DeferredLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, parameter: Tensor, later: WeightGradients
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.parameter, ctx.later = parameter, later
        return F.linear(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        x, weight = ctx.saved_tensors
        ctx.later.put_off(
            ctx.parameter, slice(None), lambda: grad.flatten(0, -2).t() @ x.flatten(0, -2)
        )
        return grad @ weight, None, None, None
