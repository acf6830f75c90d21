"""Rows to their experts and back, each as one kernel of Triton: for GPUs, or its interpreter.

Sorting is a counting sort, stable as `torch.sort(stable=True)`: blocks of tokens count their
experts, a running sum gives each block its places, and within a block a token's place is the number
of those before it with the same expert. Coming back, a row is multiplied by its gate on the way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

try:
    import triton
    import triton.language as tl
except ImportError:  # CUDA builds of torch bring it; `missing` tells
    triton = tl = None


def _jit(function: Any) -> Any:
    return function if triton is None else triton.jit(function)


_TOKENS = 128  # of a block that is sorted
_COLUMNS = 512  # of a row that one program moves


def missing() -> str | None:
    """Why these kernels cannot run here, or None."""
    if triton is None:
        return "Triton is not installed; CUDA builds of torch bring it, or: pip install triton"
    return None


@_jit
def _count(expert, counts, tokens, BLOCK: tl.constexpr, BINS: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    block = tl.program_id(0)
    token = block * BLOCK + tl.arange(0, BLOCK)
    keys = tl.load(expert + token, mask=token < tokens, other=BINS - 1).to(tl.int32)
    bins = tl.arange(0, BINS)
    tl.store(counts + block * BINS + bins, tl.histogram(keys, BINS))


@_jit
def _place(expert, starts, order, inverse, tokens, BLOCK: tl.constexpr, BINS: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    block = tl.program_id(0)
    token = block * BLOCK + tl.arange(0, BLOCK)
    there = token < tokens
    keys = tl.load(expert + token, mask=there, other=BINS - 1).to(tl.int32)
    lane = tl.arange(0, BLOCK)
    before = (keys[:, None] == keys[None, :]) & (lane[None, :] < lane[:, None])
    place = tl.load(starts + block * BINS + keys) + tl.sum(before.to(tl.int64), 1)
    tl.store(order + place, token.to(tl.int64), mask=there)
    tl.store(inverse + token, place, mask=there)


@_jit
def _move(x, index, weight, y, width, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    # y[r] = x[index[r]], times weight[r] or, backwards, weight[index[r]]; zero where index is -1.
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    source = tl.load(index + row)
    values = tl.load(x + source * width + column, mask=(column < width) & (source >= 0), other=0.0)
    if WEIGHTED == 1:
        values = (values.to(tl.float32) * tl.load(weight + row)).to(values.dtype)
    if WEIGHTED == 2:
        values = (values.to(tl.float32) * tl.load(weight + source)).to(values.dtype)
    tl.store(y + row * width + column, values, mask=column < width)


@_jit
def _dot(a, b, index, result, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    # result[r] = a[r] · b[index[r]], in fp32.
    row = tl.program_id(0).to(tl.int64)
    source = tl.load(index + row)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        one = tl.load(a + row * width + column, mask=column < width, other=0.0).to(tl.float32)
        two = tl.load(b + source * width + column, mask=column < width, other=0.0).to(tl.float32)
        total += one * two
    tl.store(result + row, tl.sum(total, 0))


def sort_by_expert(key: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sort tokens by expert.

    Args:
        key: [N] int64, the expert of each token; `num_experts` where it was dropped.
        num_experts: E.

    Returns:
        order and inverse [N] int64, and ends [E] int32: see `model.dispatch.Dispatch`.
    """
    tokens = len(key)
    bins = triton.next_power_of_2(num_experts + 2)  # the last is of places behind the last token
    blocks = triton.cdiv(tokens, _TOKENS)
    counts = torch.empty(blocks, bins, dtype=torch.int32, device=key.device)
    _count[(blocks,)](key, counts, tokens, BLOCK=_TOKENS, BINS=bins)
    by_expert = counts.t().flatten()
    starts = (by_expert.cumsum(0) - by_expert).view(bins, blocks).t().contiguous()
    order, inverse = torch.empty_like(key), torch.empty_like(key)
    _place[(blocks,)](key, starts, order, inverse, tokens, BLOCK=_TOKENS, BINS=bins)
    ends = counts.sum(0).cumsum(0)[:num_experts].int()
    return order, inverse, ends


def permute_rows(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """x[order] of rows x [N, d]; gradients go back by the inverse."""
    return _PermuteRows.apply(x, order, inverse)


def restore_times_gate(y: Tensor, weight: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """y[inverse] · weight[:, None] of rows y [N, d] in expert order, weight [N] of tokens."""
    return _RestoreTimesGate.apply(y, weight, order, inverse)


def _moved(
    x: Tensor, index: Tensor, weight: Tensor | None = None, *, of_source: bool = False
) -> Tensor:
    x = x.contiguous()
    y = x.new_empty(len(index), x.shape[1])
    if len(index):
        weighted = 0 if weight is None else 2 if of_source else 1
        columns = min(_COLUMNS, triton.next_power_of_2(x.shape[1]))
        grid = (len(index), triton.cdiv(x.shape[1], columns))
        weight = x if weight is None else weight.float().contiguous()
        _move[grid](x, index, weight, y, x.shape[1], WEIGHTED=weighted, BLOCK=columns)
    return y


class _PermuteRows(torch.autograd.Function):
    """x[order], and back by the inverse."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return _moved(x, order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return _moved(grad, inverse), None, None


class _RestoreTimesGate(torch.autograd.Function):
    """y[inverse] · weight[:, None] of rows y [N, d] in expert order."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, weight: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(y, weight, order, inverse)
        return _moved(y, inverse, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        y, weight, order, inverse = ctx.saved_tensors
        grad = grad.contiguous()
        dots = torch.empty(len(weight), dtype=torch.float32, device=grad.device)
        columns = min(_COLUMNS, triton.next_power_of_2(y.shape[1]))
        _dot[(len(weight),)](grad, y.contiguous(), inverse, dots, y.shape[1], BLOCK=columns)
        rows = _moved(grad, order, weight, of_source=True)
        return rows, dots.to(weight.dtype), None, None
