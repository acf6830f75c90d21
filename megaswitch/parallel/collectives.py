"""Differentiable collectives over one axis, each with the backward pass that makes gradients sums.

A tensor is, over an axis, either *whole* (the same on every rank, and so is its gradient), a *part*
(a slice that only this rank has), or a *term* (ranks hold summands). Each function says what it
turns into what; the gradient goes the opposite way. Over an axis of one rank all of them return
their argument.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megaswitch.parallel.mesh import Axis
from megaswitch.parallel.regions import named


def whole_to_terms(x: Tensor, axis: Axis) -> Tensor:
    """Use a whole tensor in work that ranks divide among them; its gradients are summed."""
    return x if axis.size == 1 else _WholeToTerms.apply(x, axis)


def terms_to_whole(x: Tensor, axis: Axis) -> Tensor:
    """Sum the terms of all ranks."""
    return x if axis.size == 1 else _TermsToWhole.apply(x, axis)


def parts_to_terms(x: Tensor, axis: Axis, dim: int = 0) -> Tensor:
    """Join the parts of all ranks along `dim`, for work that ranks divide among them."""
    return x if axis.size == 1 else _PartsToTerms.apply(x, axis, dim)


def terms_to_parts(x: Tensor, axis: Axis, dim: int = 0) -> Tensor:
    """Sum the terms of all ranks and keep this rank's part along `dim`."""
    return x if axis.size == 1 else _TermsToParts.apply(x, axis, dim)


def whole_to_parts(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """Keep this rank's part along `dim` of a whole tensor."""
    return x if axis.size == 1 else _WholeToParts.apply(x, axis, dim)


def parts_to_whole(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """Join the parts of all ranks along `dim`, for work that every rank does in the same way."""
    return x if axis.size == 1 else _PartsToWhole.apply(x, axis, dim)


def swap_parts(x: Tensor, axis: Axis, *, split: int, join: int) -> Tensor:
    """From parts along dimension `join` to parts along `split`, both whole otherwise."""
    return x if axis.size == 1 else _SwapParts.apply(x, axis, split, join)


def exchange(
    x: Tensor, axis: Axis, send: Sequence[int] | None, receive: Sequence[int] | None
) -> Tensor:
    """Send rows to the ranks of the axis and get theirs: the first rows go to rank 0, and so on.

    Args:
        x: [N, …].
        axis: the ranks.
        send: rows for each rank; None: equally many for each.
        receive: rows from each rank; None: equally many from each.
    """
    return x if axis.size == 1 else _Exchange.apply(x, axis, send, receive)


def all_gather(x: Tensor, axis: Axis) -> Tensor:
    """All ranks' x, stacked: [size, …]. No gradient."""
    return _all_gather(x, axis, 0).view(axis.size, *x.shape)


def _newest(name: str, before: str) -> Any:
    """A collective of torch that has a new name since 2.13, which warns at the one `before`."""
    return getattr(dist, name, None) or getattr(dist, before)


@named("tensor parallel")
def _all_reduce(x: Tensor, axis: Axis) -> Tensor:
    summed = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(summed, group=axis.group)
    return summed


@named("tensor parallel")
def _all_gather(x: Tensor, axis: Axis, dim: int) -> Tensor:
    gathered = x.new_empty(axis.size * x.shape[0], *x.shape[1:])
    _newest("all_gather_single", "all_gather_into_tensor")(
        gathered, x.contiguous(), group=axis.group
    )
    dim %= x.ndim
    if dim == 0:
        return gathered
    return torch.cat(gathered.chunk(axis.size), dim)


@named("tensor parallel")
def _reduce_scatter(x: Tensor, axis: Axis, dim: int) -> Tensor:
    dim %= x.ndim
    if dim != 0:
        x = torch.cat(x.chunk(axis.size, dim))
    part = x.new_empty(x.shape[0] // axis.size, *x.shape[1:])
    _newest("reduce_scatter_single", "reduce_scatter_tensor")(
        part, x.contiguous(), group=axis.group
    )
    return part


def _part(x: Tensor, axis: Axis, dim: int) -> Tensor:
    return x.chunk(axis.size, dim)[axis.rank].contiguous()


@named("tensor parallel")
def _swap(x: Tensor, axis: Axis, split: int, join: int) -> Tensor:
    sent = torch.stack(x.chunk(axis.size, split))
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=axis.group)
    return torch.cat(received.unbind(), join)


@named("all-to-all")
def _send_rows(
    x: Tensor, axis: Axis, send: Sequence[int] | None, receive: Sequence[int] | None
) -> Tensor:
    rows = x.shape[0] if receive is None else sum(receive)
    received = x.new_empty(rows, *x.shape[1:])
    dist.all_to_all_single(
        received,
        x.contiguous(),
        None if receive is None else list(receive),
        None if send is None else list(send),
        group=axis.group,
    )
    return received


class _WholeToTerms(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _all_reduce(grad, ctx.axis), None


class _TermsToWhole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        return _all_reduce(x, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _PartsToTerms(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, dim: int) -> Tensor:
        ctx.axis, ctx.dim = axis, dim
        return _all_gather(x, axis, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _reduce_scatter(grad, ctx.axis, ctx.dim), None, None


class _TermsToParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, dim: int) -> Tensor:
        ctx.axis, ctx.dim = axis, dim
        return _reduce_scatter(x, axis, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _all_gather(grad, ctx.axis, ctx.dim), None, None


class _WholeToParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, dim: int) -> Tensor:
        ctx.axis, ctx.dim = axis, dim
        return _part(x, axis, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _all_gather(grad, ctx.axis, ctx.dim), None, None


class _PartsToWhole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, dim: int) -> Tensor:
        ctx.axis, ctx.dim = axis, dim
        return _all_gather(x, axis, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _part(grad, ctx.axis, ctx.dim), None, None


class _SwapParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, split: int, join: int) -> Tensor:
        ctx.axis, ctx.split, ctx.join = axis, split, join
        return _swap(x, axis, split, join)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _swap(grad, ctx.axis, ctx.join, ctx.split), None, None, None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        axis: Axis,
        send: Sequence[int] | None,
        receive: Sequence[int] | None,
    ) -> Tensor:
        ctx.axis, ctx.send, ctx.receive = axis, send, receive
        return _send_rows(x, axis, send, receive)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _send_rows(grad, ctx.axis, ctx.receive, ctx.send), None, None, None
