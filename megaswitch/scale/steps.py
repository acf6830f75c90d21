"""Training steps of a rehearsed rank, counted, with and without a pipeline."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from megaswitch.config import RunConfig
from megaswitch.optim.build import clip_gradients
from megaswitch.parallel.mesh import Mesh
from megaswitch.scale.recorder import Collective, Recorder, Work
from megaswitch.train.objectives import BatchSize, MicroBatch
from megaswitch.train.parts import Parts
from megaswitch.train.runner import Runner, nothing

_CPU = torch.device("cpu")


class Rehearsed(Protocol):
    """What a step knows of the run."""

    config: RunConfig
    mesh: Mesh
    recorder: Recorder
    lengths: tuple[int, int]
    micro_batches: int


Counts = tuple[Counter[Collective], Work]


class PlainSteps:
    """Steps without a pipeline: one of one micro-batch, then one of two, if there are two."""

    def __init__(
        self,
        rehearsal: Rehearsed,
        parts: Parts,
        runner: Runner,
        optimizer: torch.optim.Optimizer,
        micro: MicroBatch,
    ) -> None:
        self.rehearsal, self.parts, self.runner = rehearsal, parts, runner
        self.optimizer, self.micro = optimizer, micro
        self.recorder, self.memory = rehearsal.recorder, rehearsal.recorder.memory
        rows = rehearsal.config.train.batch_size
        self.whole = BatchSize(rows, rows * rehearsal.lengths[1])

    def count(self) -> Counts:
        """All of a step, by what the second micro-batch adds; the peak is of the last step."""
        number = self.rehearsal.micro_batches
        first = self._step(1)
        self.memory.reset_peak()
        second = self._step(min(number, 2))
        if number <= 2:
            return second
        return _extrapolate(second, _difference(second, first), number - 2)

    def _step(self, micro_batches: int) -> Counts:
        before = Counter(self.recorder.collectives), self.recorder.work
        with self.memory.of_kind("activations"):
            self._backward(micro_batches)
        with self.memory.of_kind("buffers"):
            self.parts.gradients.finish()
            weights = self.parts.weights.values()
            self.memory.mark((w.local.grad for w in weights if w.local.grad is not None),
                             "gradients")  # fmt: skip
            clip_gradients(
                self.parts.parameters(),
                self.rehearsal.config.optim.clip_grad_norm,
                self.rehearsal.mesh,
            )
            self.optimizer.step()
            states = self.optimizer.state.values()
            self.memory.mark(
                (t for state in states for t in state.values() if isinstance(t, Tensor)),
                "optimizer",
            )
        self.parts.gradients.clear()
        return _difference((self.recorder.collectives, self.recorder.work), before)

    def _backward(self, micro_batches: int) -> None:
        self.runner.backward([self.micro] * micro_batches, self.whole, nothing)


def _difference(now: Counts, before: Counts) -> Counts:
    return Counter(now[0]) - before[0], now[1] - before[1]


def _extrapolate(counts: Counts, one: Counts, times: int) -> Counts:
    total = Counter(counts[0])
    for key, calls in one[0].items():
        total[key] += times * calls
    return total, counts[1] + one[1] * times


class PipelineSteps(PlainSteps):
    """Steps of a pipeline rank, its stages called in the order of torch's schedule."""

    def count(self) -> Counts:
        """Two rounds of micro-batches show all that more of them would."""
        number, ranks = self.rehearsal.micro_batches, self.rehearsal.mesh.axis("pp").size
        gpipe = self.rehearsal.config.parallel.schedule == "gpipe"  # holds all at once
        shown = number if gpipe else min(number, 2 * ranks)
        self._buffers = self._receive_buffers(number)
        self._step(min(number, ranks))
        self.memory.reset_peak()
        counts = self._step(shown)
        return _extrapolate(counts, self._last, number - shown)

    def _receive_buffers(self, number: int) -> dict[int, list[tuple[Tensor, ...]]]:
        """By stage, what torch keeps for each micro-batch: of the stage before, of the one after.

        Both directions carry the same shapes; an end of the pipeline has one direction.
        """
        pipeline = self.runner.pipeline_for(self.micro)
        self.pipeline = pipeline
        with self.memory.of_kind("buffers"):

            def receive() -> list[tuple[Tensor, ...]]:
                return [
                    tuple(torch.empty_like(t, device=_CPU) for t in pipeline.carry)
                    for _ in range(number)
                ]

            self._gradients = {s: receive() for s in pipeline.modules if s < pipeline.stages - 1}
            return {s: receive() for s in pipeline.modules if s > 0}

    def _backward(self, micro_batches: int) -> None:
        runner, pipeline = self.runner, self.pipeline
        runner.micro, runner.whole = [self.micro] * micro_batches, self.whole
        runner.record, runner.attached = nothing, torch.zeros((), dtype=torch.float64)
        schedule = pipeline.schedule(micro_batches)
        single = hasattr(schedule, "_stage")
        stages = [schedule._stage] if single else schedule._stages
        orders = schedule.pipeline_order if single else schedule.pipeline_order_with_comms
        self._stages = {stage.stage_index: stage for stage in stages}
        self._kept: dict[tuple[int, int], tuple[Any, list[Tensor]]] = {}
        self._waiting: dict[tuple[int, int], Any] = {}
        seen: Counter[Any] = Counter()
        self._last: Counts = Counter(), Work()
        for action in orders[pipeline.axis.rank]:
            kind = action.computation_type.name
            # torch's lists for one stage number their forward passes from 1 on the last rank.
            number = seen[kind] if single else action.microbatch_index
            seen[kind] += 1
            before = Counter(self.recorder.collectives), self.recorder.work
            self._act(kind, action.stage_index, number)
            if number == micro_batches - 1:
                now = self.recorder.collectives, self.recorder.work
                self._last = _extrapolate(self._last, _difference(now, before), 1)
        for stage in self._stages.values():
            if single and isinstance(stage.submod, FSDPModule):
                stage.perform_reduce_grad(1)

    def _act(self, kind: str, stage: int, number: int) -> None:
        if kind == "FORWARD":
            self._forward(stage, number)
        elif kind in ("FULL_BACKWARD", "BACKWARD_INPUT"):
            self._backward_of(stage, number, wait=kind == "BACKWARD_INPUT")
        elif kind == "BACKWARD_WEIGHT":
            self._waiting.pop((stage, number))()
        elif kind == "REDUCE_GRAD":
            if isinstance(self._stages[stage].submod, FSDPModule):
                self._stages[stage].perform_reduce_grad(1)
        elif kind in ("UNSHARD", "RESHARD"):
            for module in self._stages[stage].submod.modules():
                if isinstance(module, FSDPModule):
                    module.unshard() if kind == "UNSHARD" else module.reshard()
        else:
            assert kind in ("SEND_F", "SEND_B", "RECV_F", "RECV_B"), kind

    def _forward(self, index: int, number: int) -> None:
        inputs = [torch.zeros(1, dtype=torch.int64)]
        if index > 0:
            inputs = [t.detach().requires_grad_() for t in self._buffers[index][number]]
        outputs = self.pipeline.modules[index](*inputs, micro_batch=number)
        if index == self.pipeline.stages - 1:
            self._kept[index, number] = outputs.sum(), inputs
        else:
            self._send()
            self._kept[index, number] = outputs, inputs

    def _backward_of(self, index: int, number: int, *, wait: bool) -> None:
        outputs, inputs = self._kept.pop((index, number))
        last = index == self.pipeline.stages - 1
        self._stages[index].backward_maybe_with_nosync(
            "full",
            {
                "stage_output": outputs,
                "output_grads": None if last else self._gradients[index][number],
                "input_values": inputs,
            },
            last_backward=False,
        )
        if index > 0:
            self._send()
        if index in self.pipeline.later:
            run = self.pipeline.later[index]()
            if wait:
                self._waiting[index, number] = run
            else:
                run()

    def _send(self) -> None:
        sizes: dict[int, int] = defaultdict(int)
        for tensor in self.pipeline.carry:
            sizes[tensor.numel() * tensor.element_size()] += 1
        for size, count in sizes.items():
            self.recorder.collectives[Collective("send", "pp", size)] += count
