"""Linear maps without bias: dense ones, and stacks applied to rows grouped by expert."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megaswitch.layers.deferred import WeightGradients, deferred_linear
from megaswitch.layers.gradient_memory import GradientMemory
from megaswitch.layers.kernels import Kernel, Product, Rows, as_autocast, kernels_of
from megaswitch.layers.parameter import Init, local, parameter
from megaswitch.parallel.collectives import whole_to_terms
from megaswitch.parallel.shard import spec_of
from megaswitch.parallel.tensor_parallel import ALONE, TensorParallel

# Of all stacks together, so that what adds up micro-batches needs one block more, not one each.
_MEMORY = GradientMemory()
# A map of rows [N, in], grouped by expert, and where each group ends [E].
Map = Callable[[Tensor, Tensor], Tensor]


class Adapter(nn.Module):
    """A low-rank term of a linear map: scale · B A x, zero at the start (arXiv 2106.09685).

    `a` is [rank, in] and `b` [out, rank]; of experts, stacks of them. Tensor-parallel ranks slice
    the one that the map's own weight is sliced like, and all have the other.

    Args:
        weight: of the map, as its layer declared it.
        rank: of the term.
        scale: see above.
    """

    tp: TensorParallel = ALONE

    def __init__(self, weight: nn.Parameter, rank: int, scale: float) -> None:
        super().__init__()
        *stack, outputs, inputs = weight.shape
        *experts, row, column = spec_of(weight).axes
        self.scale = scale
        self.column = row == "tp"  # else the inputs are sliced
        first = Init("normal", inputs**-0.5)
        self.a = parameter((*stack, rank, inputs), (*experts, None, column), first)
        last = Init("constant", 0.0)
        self.b = parameter((*stack, outputs, rank), (*experts, row, None), last)

    def forward(self, x: Tensor) -> Tensor:
        """The term of x [..., in]: [..., out]."""
        a, b = self._factors()
        return F.linear(F.linear(x, a), b) * self.scale

    def chunks(self, number: int) -> list[Map]:
        """Terms like `GroupedLinear.chunks`, each of a run of this rank's experts."""
        a, b = self._factors()
        size = len(a) // number
        return [self._map(*pair) for pair in zip(a.split(size), b.split(size), strict=True)]

    def _map(self, a: Tensor, b: Tensor) -> Map:
        return lambda x, ends: grouped_linear(grouped_linear(x, a, ends), b, ends) * self.scale

    def _factors(self) -> tuple[Tensor, Tensor]:
        a, b = local(self.a), local(self.b)
        if self.tp.size == 1 or self.tp.sequence:
            return a, b
        # Each rank sees a part of what the undivided factor does, as it does of tokens where these
        # are divided: there all such gradients are summed after the backward pass, here on the way.
        if self.column:
            return whole_to_terms(a, self.tp.axis), b
        return a, whole_to_terms(b, self.tp.axis)

    @torch.no_grad()
    def merge_into(self, weight: Tensor) -> None:
        """Add the term to the map's weight, in place."""
        weight += torch.matmul(self.b.double(), self.a.double()).to(weight.dtype) * self.scale


class Linear(nn.Module):
    """y = x Wᵀ with `weight` [out, in].

    Args:
        shard: "column" slices the outputs over tp, "row" the inputs.
    """

    later: WeightGradients | None = None  # where weight gradients are put off to
    kernel: Kernel | None = None  # of a backend

    def __init__(
        self, inputs: int, outputs: int, *, shard: Literal["column", "row"], init: Init
    ) -> None:
        super().__init__()
        axes = ("tp", None) if shard == "column" else (None, "tp")
        self.weight = parameter((outputs, inputs), axes, init)  # type: ignore[arg-type]
        self.adapter: Adapter | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., in] to [..., out]."""
        weight = local(self.weight)
        y = self.kernel(x, weight, self._product) if self.kernel else self._product(x, weight)
        return y if self.adapter is None else y + self.adapter(x)

    def _product(self, x: Tensor, weight: Tensor) -> Tensor:
        if self.later and self.weight.requires_grad and torch.is_grad_enabled():
            return deferred_linear(x, self.weight, weight, self.later)
        return F.linear(x, weight)


class GroupedLinear(nn.Module):
    """One linear map for each expert: `weight` [E, out, in].

    Args:
        shard: "column" slices each expert's outputs over tp, "row" its inputs.
    """

    later: WeightGradients | None = None  # where weight gradients are put off to
    kernel: Kernel | None = None  # of a backend

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
        self.adapter: Adapter | None = None
        weakref.finalize(self, _MEMORY.forget).atexit = False  # its gradients' memory goes with it

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """Map rows [N, in] to [N, out]; see `grouped_linear`."""
        return self.chunks(1)[0](x, ends)

    def chunks(self, number: int) -> list[Map]:
        """Maps like `forward`, each of a run of this rank's experts.

        The stack is cut once: a slice taken in each of several places would each have a gradient of
        the whole stack's size.
        """
        stack = local(self.weight)
        size = len(stack) // number
        defer: list[_Deferral | None] = [None] * number
        if self.later and self.weight.requires_grad and torch.is_grad_enabled():
            stack = stack.detach()
            defer = [_Deferral(self.later, self.weight, i * size, size) for i in range(number)]
        parts = (stack,) if number == 1 else stack.split(size)
        maps = [self._map(p, i * size, defer[i]) for i, p in enumerate(parts)]
        if self.adapter is None:
            return maps
        return [_sum(*pair) for pair in zip(maps, self.adapter.chunks(number), strict=True)]

    def _map(self, weight: Tensor, first: int, defer: _Deferral | None) -> Map:
        def apply(x: Tensor, ends: Tensor) -> Tensor:
            if self.kernel is None:
                return grouped_linear(x, weight, ends, defer)
            product: Product = partial(grouped_linear, ends=ends, defer=defer)
            return self.kernel(x, weight, product, Rows(ends, first))

        return apply


def _sum(first: Map, second: Map) -> Map:
    return lambda x, ends: first(x, ends) + second(x, ends)


@dataclass(frozen=True)
class _Deferral:
    """Where the gradient of experts first … first + experts goes, later."""

    later: WeightGradients
    parameter: Tensor
    first: int
    experts: int

    def put_off(self, compute: Callable[[], Tensor]) -> None:
        rows = slice(self.first, self.first + self.experts)
        self.later.put_off(self.parameter, rows, compute)


def grouped_linear(
    x: Tensor, weight: Tensor, ends: Tensor, defer: _Deferral | None = None
) -> Tensor:
    """Apply expert e's matrix to rows ends[e-1] … ends[e] of `x`; rows past ends[-1] give zero.

    Args:
        x: [N, in], sorted by expert. N is a multiple of nothing.
        weight: [E, out, in].
        ends: [E] int32, cumulative row counts.
        defer: takes care of the weight's gradient instead of autograd.

    Returns:
        [N, out] in `x`'s dtype, or in autocast's.
    """
    x, weight = as_autocast(x, weight)
    if kernels_of(x) == "cpu":
        return _SlicedLinear.apply(x, weight, ends, defer)
    if defer:
        return _DeferredGroupedLinear.apply(x, weight, ends, defer)
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


class _DeferredGroupedLinear(torch.autograd.Function):
    """`_grouped_mm` whose weight gradient is put off."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, ends: Tensor, defer: _Deferral) -> Tensor:
        ctx.save_for_backward(x, weight, ends)
        ctx.defer = defer
        return _grouped_mm(x, weight, ends)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        x, weight, ends = ctx.saved_tensors
        filled = (torch.arange(len(x), device=x.device) < ends[-1])[:, None]
        rows, grad_rows = torch.where(filled, x, 0.0), torch.where(filled, grad, 0.0)
        offsets = torch.cat([ends[:-1], ends.new_full((1,), len(x))])
        ctx.defer.put_off(lambda: F.grouped_mm(grad_rows.t(), rows, offs=offsets))
        return _grouped_mm(grad, weight.transpose(1, 2), ends), None, None, None


class _SlicedLinear(torch.autograd.Function):
    """Grouped linear as one GEMM a slice, written straight into the result.

    On a CPU this beats `F.grouped_mm`, which also refuses float64. The weight's gradient is one
    tensor filled in place: indexing `weight[e]` under autograd would build a full stack per expert.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, ends: Tensor, defer: _Deferral | None
    ) -> Tensor:
        ctx.save_for_backward(x, weight, ends)
        ctx.defer = defer
        return grouped_product(x, weight, ends)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight, ends = ctx.saved_tensors
        counts = _counts(ends.tolist(), len(x))
        grad = grad.contiguous()
        x_grad = weight_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = torch.empty_like(x)
            _multiply(grad, weight.unbind(0), counts, x_grad)
        if ctx.defer:
            ctx.defer.put_off(lambda: _stack_gradient(x, grad, counts, weight))
        elif ctx.needs_input_grad[1]:
            weight_grad = _stack_gradient(x, grad, counts, weight)
        return x_grad, weight_grad, None, None


@torch.library.custom_op("megaswitch::grouped_product", mutates_args=())
def grouped_product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """`grouped_linear` on a CPU without autograd: an operation that tools of torch see as one."""
    y = x.new_empty(len(x), weight.shape[1])
    # By numpy: what is read inside of this operation, a rehearsal on shapes does not have to know.
    _multiply(x, weight.transpose(1, 2).unbind(0), _counts(ends.numpy().tolist(), len(x)), y)
    return y


@grouped_product.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(len(x), weight.shape[1])


def _counts(ends: list[int], rows: int) -> list[int]:
    """Rows of each expert and, last, those behind them all."""
    return [end - start for start, end in itertools.pairwise([0, *ends, rows])]


def _multiply(x: Tensor, matrices: Sequence[Tensor], counts: list[int], y: Tensor) -> None:
    """Write rows of x times their expert's matrix [in, out] into y; 0 behind the last expert's."""
    *outputs, rest = y.split(counts)
    for rows, matrix, out, count in zip(x.split(counts), matrices, outputs, counts, strict=False):
        if count:  # a step of decoding has rows for few experts of many
            torch.mm(rows, matrix, out=out)
    if counts[-1]:
        rest.zero_()


def _stack_gradient(x: Tensor, grad: Tensor, counts: list[int], weight: Tensor) -> Tensor:
    """Σ grad xᵀ over each expert's rows; an expert without rows still gets its zeros."""
    result = _MEMORY.empty_like(weight)
    gradients = grad.t().split(counts, 1)
    for to, rows, out in zip(gradients, x.split(counts), result.unbind(0), strict=False):
        torch.mm(to, rows, out=out)  # none of the rows behind the last expert's
    return result
