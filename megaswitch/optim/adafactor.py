"""T5's Adafactor, for parameters that may stack many experts.

Reference: Shazeer & Stern 2018 (arXiv 1804.04235), Algorithms 4 and 5, in the form that trained T5:
`AdafactorOptimizer` of mesh-tensorflow's `mesh_tensorflow/optimize.py`, without a first moment. The
treatment of experts as a batch of separate parameters follows t5x's `adafactor.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn

from megaswitch.log import UserError
from megaswitch.parallel.shard import spec_of

ExpertStatistics = Literal["per-expert", "joint"]

# Bytes of work memory. On a CPU, a step over a big stack is bound by page faults on fresh memory
# and by cache misses, so the stack is walked in pieces that stay in the last-level cache. On a GPU
# the allocator caches and only the number of kernel launches matters.
_SCRATCH_BYTES_CPU = 8 << 20
_SCRATCH_BYTES_ACCELERATOR = 256 << 20


@dataclass(frozen=True)
class _Slices:
    """Parameters of one shape, with what belongs to them, stacked along dimension 0.

    A stacked expert parameter has one slice per expert, any other parameter has one slice.

    Attributes:
        parameter: [slices, rows, columns].
        gradient: [slices, rows, columns].
        row: [slices, rows], mean squared gradient of each row, if factored.
        column: [slices, columns], mean squared gradient of each column, if factored.
        moment: [slices, rows, columns], mean squared gradient, if not factored.
    """

    parameter: Tensor
    gradient: Tensor
    row: Tensor | None
    column: Tensor | None
    moment: Tensor | None

    def chunks(self, elements: int) -> Iterator[_Slices]:
        """Runs of whole slices with at most `elements` elements, but never less than one slice."""
        count, rows, columns = self.parameter.shape
        length = max(1, elements // (rows * columns))
        for start in range(0, count, length):
            run = slice(start, start + length)
            yield _Slices(
                self.parameter[run],
                self.gradient[run],
                None if self.row is None else self.row[run],
                None if self.column is None else self.column[run],
                None if self.moment is None else self.moment[run],
            )

    def accumulate(self, beta2: float, epsilon1: float, scratch: Tensor) -> None:
        """Move the second moments towards the squared gradient; overwrites `scratch`."""
        torch.mul(self.gradient, self.gradient, out=scratch)
        if self.moment is not None:
            self.moment.lerp_(scratch.add_(epsilon1), 1.0 - beta2)
            return
        assert self.row is not None
        assert self.column is not None
        self.row.lerp_(scratch.mean(dim=-1).add_(epsilon1), 1.0 - beta2)
        self.column.lerp_(scratch.mean(dim=-2).add_(epsilon1), 1.0 - beta2)

    def precondition(self, scratch: Tensor) -> Tensor:
        """Gradient over root second moment, left as `scratch` times the returned factor.

        The row factor stays apart so that it can be multiplied with the other scales of the step
        while it is small: that saves a pass over the whole parameter.

        Args:
            scratch: [slices, rows, columns], overwritten.

        Returns:
            [slices, rows, 1], or [slices, 1, 1] if not factored.
        """
        if self.moment is not None:
            torch.rsqrt(self.moment, out=scratch).mul_(self.gradient)
            return self.moment.new_ones(len(self.moment), 1, 1)
        assert self.row is not None
        assert self.column is not None
        torch.mul(self.gradient, self.column.rsqrt().unsqueeze(-2), out=scratch)
        # Mean-square gradients factor as row × column / mean, the mean taken once, with the rows.
        return (self.row / self.row.mean(dim=-1, keepdim=True)).rsqrt_().unsqueeze(-1)


def _mean_square(matrix: Tensor, row_factor: Tensor) -> Tensor:
    """Mean square of `matrix * row_factor` for each slice, shape [slices].

    Row norms come first because torch splits a reduction to a single number among threads, but
    never a row: a slice then has the same sum alone and in a stack.
    """
    norms = torch.linalg.vector_norm(matrix, dim=-1, dtype=row_factor.dtype)
    return norms.mul_(row_factor.squeeze(-1)).square_().mean(dim=-1).div_(matrix.shape[-1])


class Adafactor(torch.optim.Optimizer):
    """T5's Adafactor: factored second moments, relative clipped updates, no momentum.

    One step, for a matrix W with gradient G at step t = 0, 1, …:

    - β2 = 1 − (t + 1)^−decay_exponent, so that the first step remembers nothing before it.
    - row ← β2·row + (1 − β2)·mean over columns of (G² + ε1); column likewise.
    - U = G / √(row ⊗ column / mean(row)).
    - U ← U / max(1, RMS(U) / clip_threshold).
    - W ← W − learning rate · max(ε2, RMS(W)) · U, after W ← W·(1 − learning rate · weight_decay).

    **Which moments are factored.** Those of a matrix with both dimensions at least
    `factored_min_dim`; anything else keeps one moment per element. Mesh-TF factors the two largest
    dimensions of a parameter of any rank. For matrices the rules agree. For a stack of experts
    [experts, out, in] they agree unless a model has more experts than model or feed-forward
    dimensions; there Mesh-TF would factor across experts, which mixes the statistics of experts
    that see different tokens, so here the expert axis is never factored, in either mode. The
    layers keep no other parameter with more than two dimensions; one would not be factored.

    **Experts.** A parameter whose `ShardSpec.is_expert` is true is a stack of parameters, one per
    index of dimension 0. With "per-expert" each slice gets exactly the update that it would get as
    a parameter of its own (t5x). With "joint" one RMS(U) and one RMS(W), over all the experts that
    this process holds, serve all of them (Mesh-TF). The moments are per expert in both modes.

    Statistics are kept in the parameter's dtype, but at least in float32, under the names `row`
    and `column` (its shape without the last or the last but one dimension) or `moment` (its shape),
    beside `step` (scalar float32 on the CPU: the number of updates made).

    Args:
        params: parameters or parameter groups. Each parameter carries a `ShardSpec` and is
            contiguous.
        lr: relative step size (multiplies RMS(W)); absolute if not `scale_by_parameter`.
        decay_exponent: how fast the memory of the second moments lengthens with the step.
        clip_threshold: largest RMS of the update before it is scaled.
        epsilon1: added to squared gradients.
        epsilon2: least RMS(W), so that parameters can leave zero.
        factored_min_dim: smallest dimension of a matrix whose moments are factored.
        scale_by_parameter: multiply the update with RMS(W).
        expert_statistics: "per-expert" or "joint".
        weight_decay: decoupled weight decay per unit of `lr`, as in AdamW.

    Raises:
        UserError: `expert_statistics` is neither of the two.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float,
        *,
        decay_exponent: float = 0.8,
        clip_threshold: float = 1.0,
        epsilon1: float = 1e-30,
        epsilon2: float = 1e-3,
        factored_min_dim: int = 128,
        scale_by_parameter: bool = True,
        expert_statistics: ExpertStatistics = "per-expert",
        weight_decay: float = 0.0,
    ) -> None:
        if expert_statistics not in ("per-expert", "joint"):
            raise UserError(
                f"expert_statistics is {expert_statistics!r}: it must be 'per-expert' or 'joint'."
            )
        defaults = {
            "lr": lr,
            "decay_exponent": decay_exponent,
            "clip_threshold": clip_threshold,
            "epsilon1": epsilon1,
            "epsilon2": epsilon2,
            "factored_min_dim": factored_min_dim,
            "scale_by_parameter": scale_by_parameter,
            "expert_statistics": expert_statistics,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient.

        Args:
            closure: recomputes and returns the loss; called with gradients enabled.

        Returns:
            The closure's loss, or None without one.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        buffers: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group, buffers)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over `state_dict`, with its statistics in the precision that they were saved in."""
        super().load_state_dict(state_dict)
        # torch rounds floating-point states to the parameter's dtype; ours are wider than bfloat16.
        saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        ours = chain.from_iterable(group["params"] for group in self.param_groups)
        for index, parameter in zip(saved, ours, strict=True):
            for name, value in state_dict["state"].get(index, {}).items():
                if value.dtype != self.state[parameter][name].dtype:
                    self.state[parameter][name] = value.to(parameter.device, copy=True)

    def _update(
        self,
        parameter: nn.Parameter,
        group: dict[str, Any],
        buffers: dict[tuple[torch.device, torch.dtype], Tensor],
    ) -> None:
        """Update one parameter in place; work memory is taken from `buffers` and left there."""
        step = self._state(parameter, group)["step"]
        beta2 = 1.0 - (step.item() + 1.0) ** -group["decay_exponent"]
        step += 1
        slices = self._slices(parameter)
        limit = _SCRATCH_BYTES_CPU if parameter.device.type == "cpu" else _SCRATCH_BYTES_ACCELERATOR
        chunks = list(slices.chunks(limit // slices.gradient.element_size()))
        scratch = _scratch(buffers, chunks[0].gradient)

        if group["expert_statistics"] == "joint":
            # Every chunk must be measured before the first is changed, so U is computed twice.
            measured = [self._measure(chunk, group, beta2, scratch)[1:] for chunk in chunks]
            update_square, weight_square = (
                torch.cat(parts).mean(dim=0, keepdim=True) for parts in zip(*measured, strict=True)
            )
            for chunk in chunks:
                row_factor = chunk.precondition(scratch[: len(chunk.parameter)])
                _apply(chunk, group, scratch, row_factor, update_square, weight_square)
        else:
            for chunk in chunks:
                factors = self._measure(chunk, group, beta2, scratch)
                _apply(chunk, group, scratch, *factors)

    def _state(self, parameter: nn.Parameter, group: dict[str, Any]) -> dict[str, Tensor]:
        """The parameter's state, made of zeros before its first step."""
        state: dict[str, Tensor] = self.state[parameter]
        if state:
            return state
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        shape = parameter.shape
        matrix = shape[1:] if spec_of(parameter).is_expert else shape

        def zeros(*dimensions: int) -> Tensor:
            return torch.zeros(dimensions, dtype=dtype, device=parameter.device)

        state["step"] = torch.zeros((), dtype=torch.float32)
        if len(matrix) == 2 and min(matrix) >= group["factored_min_dim"]:
            state["row"] = zeros(*shape[:-1])
            state["column"] = zeros(*shape[:-2], shape[-1])
        else:
            state["moment"] = zeros(*shape)
        return state

    def _slices(self, parameter: nn.Parameter) -> _Slices:
        """Views of the parameter, its gradient (widened to the states' dtype) and its states."""
        state = self.state[parameter]
        assert parameter.is_contiguous(), "Adafactor updates contiguous parameters only"
        assert parameter.grad is not None
        is_expert = spec_of(parameter).is_expert
        count = parameter.shape[0] if is_expert else 1
        matrix = parameter.shape[1:] if is_expert else parameter.shape
        columns = matrix[-1] if matrix else 1
        shape = (count, math.prod(matrix[:-1]), columns)
        row, column, moment = (state.get(name) for name in ("row", "column", "moment"))
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        return _Slices(
            parameter.view(shape),
            parameter.grad.to(dtype).reshape(shape),
            None if row is None else row.view(shape[:2]),
            None if column is None else column.view(count, columns),
            None if moment is None else moment.view(shape),
        )

    def _measure(
        self, chunk: _Slices, group: dict[str, Any], beta2: float, scratch: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Update the moments and compute U (see `precondition`) and the mean squares for scaling.

        Returns:
            Row factors of U [slices, rows or 1, 1], mean squares of U and W, each [slices].
        """
        scratch = scratch[: len(chunk.parameter)]
        chunk.accumulate(beta2, group["epsilon1"], scratch)
        row_factor = chunk.precondition(scratch)
        ones = row_factor.new_ones(len(scratch), 1, 1)
        update_square = _mean_square(scratch, row_factor)
        return row_factor, update_square, _mean_square(chunk.parameter, ones)


def _apply(
    chunk: _Slices,
    group: dict[str, Any],
    scratch: Tensor,
    row_factor: Tensor,
    update_square: Tensor,
    weight_square: Tensor,
) -> None:
    """Decay, clip, scale and subtract U.

    Args:
        chunk: what to update; only its parameter is touched.
        group: the parameter group.
        scratch: [at least slices, rows, columns], U without its row factor.
        row_factor: [slices, rows or 1, 1].
        update_square: mean square of U, [slices] or [1].
        weight_square: mean square of the parameter, [slices] or [1].
    """
    scale = group["lr"] / (update_square.sqrt() / group["clip_threshold"]).clamp_(min=1.0)
    if group["scale_by_parameter"]:
        scale *= weight_square.sqrt().clamp_(min=group["epsilon2"])
    if group["weight_decay"] != 0.0:
        chunk.parameter.mul_(1.0 - group["lr"] * group["weight_decay"])
    factor = row_factor * scale.view(-1, 1, 1)
    chunk.parameter.addcmul_(scratch[: len(chunk.parameter)], factor, value=-1.0)


def _scratch(buffers: dict[tuple[torch.device, torch.dtype], Tensor], like: Tensor) -> Tensor:
    """Uninitialised memory shaped as `like`, kept in `buffers` so that it is faulted in once."""
    key = (like.device, like.dtype)
    if key not in buffers or buffers[key].numel() < like.numel():
        buffers[key] = like.new_empty(like.numel())
    return buffers[key][: like.numel()].view(like.shape)
