"""A pipeline's stages on this rank, and torch's schedules that drive them.

A stage is any module that maps a tuple of tensors (what the stage before gave) and the number of a
micro-batch to the next such tuple; the last one gives its loss, of shape [1]. Stages find all
else about a micro-batch by its number: every rank of a pipeline reads the same batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
)

from megaswitch.parallel.mesh import Axis
from megaswitch.parallel.places import wait_for
from megaswitch.parallel.regions import named

Kind = Literal["gpipe", "1f1b", "interleaved", "zero-bubble"]
_SINGLE = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}
_MULTIPLE = {
    "interleaved": ScheduleInterleaved1F1B,
    "zero-bubble": ScheduleInterleavedZeroBubble,
}


class Pipeline:
    """This rank's stages. Stage s lies on rank s mod the number of ranks.

    Args:
        modules: by stage number.
        stages: how many there are on all ranks.
        axis: the pipeline's ranks.
        device: of this rank.
        kind: of schedule.
        carry: meta tensors like those which a stage hands to the next, of one micro-batch.
        later: of each stage that puts weight gradients off, what hands over those of a backward.
    """

    def __init__(
        self,
        modules: Mapping[int, nn.Module],
        stages: int,
        axis: Axis,
        device: torch.device,
        kind: Kind,
        carry: Sequence[Tensor],
        later: Mapping[int, Callable[[], Callable[[], None]]],
    ) -> None:
        self.later = later
        self.modules, self.stages, self.axis = dict(modules), stages, axis
        self.device, self.kind = device, kind
        self.carry = tuple(carry)
        self._schedules: dict[int, Any] = {}

    @property
    def holds_last(self) -> bool:
        """Whether the last stage is here."""
        return self.stages - 1 in self.modules

    @named("pipeline")
    def train(self, micro_batches: int) -> Tensor | None:
        """Forward and backward of micro-batches 0 … n - 1; gradients add up in the parameters.

        Returns:
            The sum of the losses, where the last stage is; else None.
        """
        schedule = self.schedule(micro_batches)
        numbers = torch.arange(micro_batches)
        losses: list[Tensor] = []
        schedule.step(
            *((numbers,) if 0 in self.modules else ()),
            target=numbers if self.holds_last else None,
            losses=losses if self.holds_last else None,
            micro_batch=numbers,
        )
        return torch.stack([loss.detach() for loss in losses]).sum() if losses else None

    def schedule(self, micro_batches: int) -> Any:
        """torch's schedule of so many micro-batches, with its stages and the order of its actions.

        For those who replay it; `train` runs it.
        """
        if micro_batches not in self._schedules:
            self._schedules[micro_batches] = self._schedule(micro_batches)
        return self._schedules[micro_batches]

    @torch.no_grad()
    def forward(self, micro_batch: int, carry: Sequence[Tensor]) -> Any:
        """One micro-batch through all stages, without gradient.

        Args:
            micro_batch: its number.
            carry: meta tensors like those that are handed on, of this micro-batch.

        Returns:
            What the last stage gives, where it is; else None.
        """
        number = torch.tensor([micro_batch])
        ranks = self.axis.size
        result = None
        for stage, module in sorted(self.modules.items()):
            inputs: tuple[Tensor, ...] = (number,)
            if stage > 0:
                inputs = tuple(torch.empty_like(t, device=self.device) for t in carry)
                self._transfer(dist.irecv, inputs, (stage - 1) % ranks)
            outputs = module(*inputs, micro_batch=number)
            if stage == self.stages - 1:
                result = outputs
            else:
                self._transfer(dist.isend, outputs, (stage + 1) % ranks)
        return result

    def _transfer(self, operation: Any, tensors: Sequence[Tensor], rank: int) -> None:
        """Send to or receive from a rank of the pipeline, and wait."""
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(operation, t.contiguous(), group=self.axis.group, group_peer=rank)
                for t in tensors
            ]
        )
        for work in works:
            wait_for(work, "batch_isend_irecv", self.axis)

    def _schedule(self, micro_batches: int) -> Any:
        stages: list[Any] = [
            PipelineStage(
                module,
                index,
                self.stages,
                self.device,
                input_args=self.carry if index else (torch.empty(1, dtype=torch.int64),),
                output_args=self.carry if index < self.stages - 1 else (torch.empty(1),),
                group=self.axis.group,
                dw_builder=self.later.get(index),
            )
            for index, module in sorted(self.modules.items())
        ]
        options: dict[str, Any] = {"loss_fn": _loss, "scale_grads": False}
        if self.kind in _SINGLE:
            return _SINGLE[self.kind](stages[0], micro_batches, **options)
        return _MULTIPLE[self.kind](stages, micro_batches, **options)


def _loss(output: Tensor, _: Tensor) -> Tensor:
    """The last stage's output is the loss already."""
    return output.sum()


def attach(x: Tensor, loss: Tensor) -> Tensor:
    """`x`, whose backward pass also goes into `loss`, as if that were added to the final loss."""
    return _Attach.apply(x, loss)


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.like = loss.detach()
        return x.clone()  # zero-bubble schedules detach a stage's outputs, which views forbid

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, torch.ones_like(ctx.like)
