"""Linear maps without bias: dense ones, and stacks applied to rows grouped by expert."""

from __future__ import annotations

import itertools
import weakref
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megaswitch.layers.gradient_memory import GradientMemory
from megaswitch.layers.parameter import Init, local, parameter

# Of all stacks together, so that what adds up micro-batches needs one block more, not one each.
_MEMORY = GradientMemory()


class Linear(nn.Module):
    """y = x Wᵀ with `weight` [out, in].

    Args:
        shard: "column" slices the outputs over tp, "row" the inputs.
    """

    def __init__(
        self, inputs: int, outputs: int, *, shard: Literal["column", "row"], init: Init
    ) -> None:
        super().__init__()
        axes = ("tp", None) if shard == "column" else (None, "tp")
        self.weight = parameter((outputs, inputs), axes, init)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., in] to [..., out]."""
        return F.linear(x, local(self.weight))


class GroupedLinear(nn.Module):
    """One linear map for each expert: `weight` [E, out, in].

    Args:
        shard: "column" slices each expert's outputs over tp, "row" its inputs.
    """

    def __init__(
        self,
        experts: int,
        inputs: int,
        outputs: int,
        *,
        shard: Literal["column", "row"],
        init: Init,
    ) -> None:
        super().__init__()
        axes = ("ep", "tp", None) if shard == "column" else ("ep", None, "tp")
        self.weight = parameter((experts, outputs, inputs), axes, init)  # type: ignore[arg-type]
        weakref.finalize(self, _MEMORY.forget).atexit = False  # its gradients' memory goes with it

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """Map rows [N, in] to [N, out]; see `grouped_linear`."""
        return grouped_linear(x, local(self.weight), ends)


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Apply expert e's matrix to rows ends[e-1] … ends[e] of `x`; rows past ends[-1] give zero.

    Args:
        x: [N, in], sorted by expert. N is a multiple of nothing.
        weight: [E, out, in].
        ends: [E] int32, cumulative row counts.

    Returns:
        [N, out] in `x`'s dtype, or in autocast's.
    """
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        x, weight = x.to(dtype), weight.to(dtype)
    if kind == "cpu":
        return _SlicedLinear.apply(x, weight, ends)
    return _grouped_mm(x, weight, ends)


def _grouped_mm(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """`grouped_linear` through torch's grouped GEMM (one kernel for bf16 on recent GPUs).

    The kernel leaves rows past its last offset uninitialised, in y and in x's gradient. So the rest
    goes to the last expert, as zeros going in and coming back: it adds nothing to any gradient.
    """
    filled = (torch.arange(len(x), device=x.device) < ends[-1])[:, None]
    offsets = torch.cat([ends[:-1], ends.new_full((1,), len(x))])
    y = F.grouped_mm(torch.where(filled, x, 0.0), weight.transpose(1, 2), offs=offsets)
    return torch.where(filled, y, 0.0)


class _SlicedLinear(torch.autograd.Function):
    """Grouped linear as one GEMM a slice, written straight into the result.

    On a CPU this beats `F.grouped_mm`, which also refuses float64. The weight's gradient is one
    tensor filled in place: indexing `weight[e]` under autograd would build a full stack per expert.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        bounds = [0, *ends.tolist()]
        ctx.save_for_backward(x, weight)
        ctx.bounds = bounds
        y = x.new_empty(len(x), weight.shape[1])
        for expert, rows in _occupied(bounds):
            torch.mm(x[rows], weight[expert].t(), out=y[rows])
        y[bounds[-1] :].zero_()
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        bounds = ctx.bounds
        grad = grad.contiguous()
        x_grad = weight_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = torch.empty_like(x)
            for expert, rows in _occupied(bounds):
                torch.mm(grad[rows], weight[expert], out=x_grad[rows])
            x_grad[bounds[-1] :].zero_()
        if ctx.needs_input_grad[1]:
            weight_grad = _MEMORY.empty_like(weight)
            for expert, (start, end) in enumerate(itertools.pairwise(bounds)):
                # An expert without rows still gets its zeros.
                torch.mm(grad[start:end].t(), x[start:end], out=weight_grad[expert])
        return x_grad, weight_grad, None


def _occupied(bounds: list[int]) -> list[tuple[int, slice]]:
    """The experts that have rows, and which: a step of decoding has rows for few of many."""
    pairs = enumerate(itertools.pairwise(bounds))
    return [(expert, slice(start, end)) for expert, (start, end) in pairs if end > start]
