"""T5's Adafactor, for parameters that may stack many experts.

Reference: Shazeer & Stern 2018 (arXiv 1804.04235), Algorithms 4 and 5, in the form that trained T5:
`AdafactorOptimizer` of mesh-tensorflow's `mesh_tensorflow/optimize.py`, without a first moment. The
treatment of experts as a batch of separate parameters follows t5x's `adafactor.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn

from megaswitch.log import UserError
from megaswitch.optim import native_adafactor
from megaswitch.optim.adafactor_math import (
    Buffers,
    Slices,
    apply_update,
    mean_of_rows,
    mean_square,
    remember,
    row_factor_of,
    scratch_like,
)
from megaswitch.optim.piles import Pile, piles
from megaswitch.optim.sharded_adafactor import ShardedUpdate, update_together
from megaswitch.parallel.shard import spec_of
from megaswitch.parallel.weights import block_of

ExpertStatistics = Literal["per-expert", "joint"]


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
    a parameter of its own (t5x). With "joint" one RMS(U) and one RMS(W), over all the experts,
    serve all of them (Mesh-TF). The moments are per expert in both modes.

    **Devices.** Where a CPU has a factored parameter whole, the compiled core updates it
    (`native_adafactor`), elsewhere torch. They add up in different orders, as ranks do.

    **Ranks.** A parameter may be a rank's block of a global one (`megaswitch.parallel.weights`).
    Its update is that of the global parameter, and its states are blocks too.

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

        Parameters that ranks divide must all have one; their ranks call this together.

        Args:
            closure: recomputes and returns the loss; called with gradients enabled.

        Returns:
            The closure's loss, or None without one.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        whole, divided = [], []
        for group in self.param_groups:
            for parameter in group["params"]:
                is_whole = block_of(parameter).is_whole
                if is_whole and parameter.grad is None:
                    continue
                own = parameter, group, self.state_of(parameter, group)
                if not is_whole:
                    divided.append(own)
                elif native_adafactor.suits(*own):
                    native_adafactor.update(*own)
                else:
                    whole.append(own)
        buffers: Buffers = {}
        for pile in piles(whole):
            _update(pile, buffers)
        update_together([ShardedUpdate(pile, buffers) for pile in piles(divided)])
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

    def state_of(self, parameter: nn.Parameter, group: dict[str, Any]) -> dict[str, Tensor]:
        """The parameter's state, made of zeros before its first step."""
        state: dict[str, Tensor] = self.state[parameter]
        if state:
            return state
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        shape, matrix = parameter.shape, block_of(parameter).shape
        if spec_of(parameter).is_expert:
            matrix = matrix[1:]

        def zeros(*dimensions: int) -> Tensor:
            return torch.zeros(dimensions, dtype=dtype, device=parameter.device)

        state["step"] = torch.zeros((), dtype=torch.float32)
        if len(matrix) == 2 and min(matrix) >= group["factored_min_dim"]:
            state["row"] = zeros(*shape[:-1])
            state["column"] = zeros(*shape[:-2], shape[-1])
        else:
            state["moment"] = zeros(*shape)
        return state


def _update(pile: Pile, buffers: Buffers) -> None:
    """Update whole parameters in place; work memory is taken from `buffers`, left there."""
    group, beta2 = pile.group, pile.advance()
    everything = pile.slices()
    chunks = [chunk for _, chunk in everything.chunks()]
    if pile.joint:
        # Every chunk must be measured before the first is changed, so U is computed twice.
        measured = [_measure(chunk, group, beta2, buffers)[2:] for chunk in chunks]
        update_square, weight_square = (
            torch.cat(parts).mean(dim=0, keepdim=True) for parts in zip(*measured, strict=True)
        )
        for chunk in chunks:
            scratch = scratch_like(chunk.gradient, buffers)
            row_factor = _precondition(chunk, scratch)
            apply_update(chunk, group, scratch, row_factor, update_square, weight_square)
    else:
        for chunk in chunks:
            apply_update(chunk, group, *_measure(chunk, group, beta2, buffers))
    changed = {n: getattr(everything, n) for n in ("parameter", "row", "column", "moment")}
    pile.store(**changed)


def _measure(
    chunk: Slices, group: dict[str, Any], beta2: float, buffers: Buffers
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Update the moments and compute U and the mean squares for scaling.

    Returns:
        U without its row factor [slices, rows, columns], the row factor [slices, rows or 1, 1],
        mean squares of U and W, each [slices].
    """
    scratch = scratch_like(chunk.gradient, buffers)
    remember(chunk.moments(), chunk.mean_squares(scratch), beta2, group["epsilon1"])
    row_factor = _precondition(chunk, scratch)
    update_square = mean_square(scratch, scratch.dtype, row_factor)
    return scratch, row_factor, update_square, mean_square(chunk.parameter, scratch.dtype)


def _precondition(chunk: Slices, scratch: Tensor) -> Tensor:
    """Leave U in `scratch`, but for the row factor, which is returned."""
    chunk.precondition(scratch)
    if chunk.row is None:
        return chunk.ones()
    return row_factor_of(chunk.row, mean_of_rows(chunk.row))
