"""Small parameters of one shape, put together so that Adafactor updates them by one operation each.

A step of Adafactor takes some 25 operations for a parameter, and a model has hundreds: on a GPU
most of the time goes into starting kernels that have next to nothing to do. The price are copies of
weights and gradients, so what is large is updated where it lies.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megaswitch.layers.kernels import kernels_of
from megaswitch.optim.adafactor_math import Slices
from megaswitch.parallel.shard import spec_of
from megaswitch.parallel.weights import Block, block_of

# Bytes of a pile, where copying them costs as much as starting the kernels that they save: a copy
# per number and kernel of 5 µs at 3 TB/s, or of 4 µs within the caches of a CPU.
_PILE_BYTES_CPU = 1 << 19
_PILE_BYTES_ACCELERATOR = 64 << 20


@dataclass(frozen=True)
class Pile:
    """Parameters of one shape that are updated alike; often only one.

    Attributes:
        parameters: whole, or this rank's blocks that all lie alike.
        states: of each, see `Adafactor`.
        group: the parameter group.
        joint: whether one RMS serves all experts; such a parameter is a pile of its own.
    """

    parameters: list[nn.Parameter]
    states: list[dict[str, Tensor]]
    group: dict[str, Any]
    joint: bool

    @property
    def is_expert(self) -> bool:
        """Whether dimension 0 of each parameter counts experts."""
        return spec_of(self.parameters[0]).is_expert

    @property
    def block(self) -> Block:
        """Where each parameter lies in its global one."""
        return block_of(self.parameters[0])

    def slices(self) -> Slices:
        """Views of one parameter, its gradient (widened to the states' dtype) and its states.

        Of several these are copies, see `store`.
        """
        one = self.parameters[0]
        assert one.is_contiguous(), "Adafactor updates contiguous parameters only"
        matrix = one.shape[1:] if self.is_expert else one.shape
        count = len(self.parameters) * (one.shape[0] if self.is_expert else 1)
        columns = matrix[-1] if matrix else 1
        shape = (count, math.prod(matrix[:-1]), columns)
        dtype = torch.promote_types(one.dtype, torch.float32)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        assert len(gradients) == len(self.parameters)
        row, column, moment = map(self.joined, ("row", "column", "moment"))
        return Slices(
            _join(self.parameters).view(shape),
            _join(gradients).to(dtype).reshape(shape),
            None if row is None else row.view(shape[:2]),
            None if column is None else column.view(count, columns),
            None if moment is None else moment.view(shape),
        )

    def joined(self, statistic: str) -> Tensor | None:
        """A statistic of all parameters, [parameters, ...] if there are several; None: no such."""
        if statistic not in self.states[0]:
            return None
        return _join([state[statistic] for state in self.states])

    def store(self, **joined: Tensor | None) -> None:
        """Give back what was changed of copies: "parameter", "row", "column" or "moment"."""
        if len(self.parameters) == 1:
            return
        for name, values in joined.items():
            if values is not None:
                own: list[Tensor] = [*self.parameters]
                if name != "parameter":
                    own = [state[name] for state in self.states]
                torch._foreach_copy_(own, values.view(len(own), *own[0].shape).unbind())

    def advance(self) -> float:
        """Count one more update, and return its β2."""
        steps = [state["step"] for state in self.states]
        beta2 = beta2_after(steps[0], self.group)
        torch._foreach_add_(steps, 1)
        return beta2


def beta2_after(step: Tensor, group: dict[str, Any]) -> float:
    """β2 of the update that follows so many."""
    beta2: float = 1.0 - (step.item() + 1.0) ** -group["decay_exponent"]
    return beta2


def piles(
    parameters: Iterable[tuple[nn.Parameter, dict[str, Any], dict[str, Tensor]]],
) -> list[Pile]:
    """Put together what can be updated together.

    Ranks that divide parameters make the same piles, in the same order, of whatever blocks they
    have: what decides is the same on all of them.

    Args:
        parameters: each with its group and its states.
    """
    found: dict[Any, list[Pile]] = {}
    for parameter, group, state in parameters:
        is_expert, block = spec_of(parameter).is_expert, block_of(parameter)
        joint = is_expert and group["expert_statistics"] == "joint"
        grad = None if parameter.grad is None else parameter.grad.dtype
        step = state["step"].item()
        like = parameter.dtype, parameter.device, grad, is_expert, block.shape, block.axes
        own = found.setdefault((id(group), "row" in state, step, *like), [])
        if joint or not own or len(own[-1].parameters) >= most_in_pile(parameter):
            own.append(Pile([], [], group, joint))
        own[-1].parameters.append(parameter)
        own[-1].states.append(state)
    return [pile for own in found.values() for pile in own]


def most_in_pile(parameter: nn.Parameter) -> int:
    """How many parameters like this one are put together."""
    block = block_of(parameter)
    ranks = math.prod(axis.size for axes in block.axes for axis in axes)
    return at_most(4 * math.prod(block.shape) / ranks, kernels_of(parameter))


def at_most(size: float, kernels: str) -> int:
    """How many parameters of so many bytes are put together, for "cpu" or "cuda" kernels."""
    limit = _PILE_BYTES_CPU if kernels == "cpu" else _PILE_BYTES_ACCELERATOR
    return max(1, int(limit / max(size, 1)))


def _join(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.stack(list(tensors))
