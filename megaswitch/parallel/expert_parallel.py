"""Rows on their way to the ranks that hold their experts, and back.

A rank brings rows sorted by expert. In capacity mode every expert gets the same number of slots
from every rank, so that shapes are static and the host reads nothing; in dropless mode exactly the
rows there are travel, and their numbers first. An exchange may be cut in chunks of experts: while
the experts of one chunk compute, the next is on its way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megaswitch.parallel.collectives import exchange
from megaswitch.parallel.mesh import Axis
from megaswitch.parallel.places import wait_for
from megaswitch.parallel.regions import named, region


@dataclass(frozen=True)
class ExpertParallel:
    """The expert-parallel ranks, as layers see them. Each has a run of the experts.

    Attributes:
        axis: the ranks.
        chunks: parts of an exchange; divides the experts of a rank.
    """

    axis: Axis = field(default_factory=lambda: Axis("ep"))
    chunks: int = 1

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.axis.size

    def relabel(self, expert: Tensor, num_experts: int) -> Tensor:
        """Number experts by chunk, then rank, then place in the chunk: the order of sending."""
        if self.chunks == 1:
            return expert
        local = num_experts // self.size
        part = local // self.chunks
        rank, inside = expert // local, expert % local
        return (inside // part * self.size + rank) * part + inside % part

    def ship(self, counts: Tensor, slots: int | None) -> Shipment:
        """Prepare to send rows.

        Args:
            counts: [E] int64, rows for each (relabelled) expert.
            slots: most rows for any expert, known to all ranks; None: find out how many there are.
        """
        return Shipment(self, counts, slots)

    def largest(self, number: int, device: torch.device) -> int:
        """The largest number that any of the ranks gives."""
        if self.size == 1:
            return number
        numbers = torch.tensor(number, device=device)
        dist.all_reduce(numbers, dist.ReduceOp.MAX, group=self.axis.group)
        return int(numbers)


ALONE = ExpertParallel()


class Shipment:
    """One layer's exchange. `pack`, `send` every chunk, work on it, `send_back`, `unpack`."""

    def __init__(self, ep: ExpertParallel, counts: Tensor, slots: int | None) -> None:
        self.axis, self.chunks = ep.axis, ep.chunks
        self.slots = slots
        self.experts = len(counts) // (ep.size * ep.chunks)  # of a rank and chunk
        self._counts = counts
        by_rank = counts.view(ep.chunks, ep.size, self.experts).transpose(0, 1).contiguous()
        arriving = torch.empty_like(by_rank)
        with region("all-to-all"):
            dist.all_to_all_single(arriving, by_rank, group=ep.axis.group)
        self._arriving = arriving.transpose(0, 1)  # [chunks, from rank, experts]
        self._splits: list[tuple[Sequence[int] | None, Sequence[int] | None]]
        if slots is None:
            both = torch.stack([by_rank.sum(2).t(), self._arriving.sum(2)]).tolist()
            self._splits = list(zip(*both, strict=True))
        else:
            self._splits = [(None, None)] * ep.chunks
            place = torch.arange(slots, device=counts.device)
            row = (counts.cumsum(0) - counts)[:, None] + place
            self._row_of_slot = torch.where(place < counts[:, None], row, -1).flatten()

    def pack(self, rows: Tensor) -> list[Tensor]:
        """Rows [N, d] sorted by expert, perhaps with others behind, as what each chunk sends."""
        self._rows = len(rows)
        if self.slots is None:
            sizes = [sum(send) for send, _ in self._splits if send is not None]
            return list(rows[: sum(sizes)].split(sizes))
        packed = _move(rows, self._row_of_slot, self._slot_of_row())
        return list(packed.chunk(self.chunks))

    def _slot_of_row(self) -> Tensor:
        """[N] the slot of each row, -1 for those behind the last expert's."""
        slots = torch.full((self._rows + 1,), -1, device=self._row_of_slot.device)
        # Empty slots all write to one place too many, which is then cut off.
        row = self._row_of_slot.masked_fill(self._row_of_slot < 0, self._rows)
        slots[row] = torch.arange(len(row), device=row.device)
        return slots[: self._rows]

    def send(self, part: Tensor, chunk: int) -> Flight:
        """Start sending a packed part."""
        return Flight(part, self.axis, *self._splits[chunk], wait=self.chunks == 1)

    def send_back(self, part: Tensor, chunk: int) -> Flight:
        """Start returning what became of the rows received, in their order."""
        send, receive = self._splits[chunk]
        return Flight(part, self.axis, receive, send, wait=self.chunks == 1)

    def contents(self, chunk: int) -> tuple[Tensor, Tensor]:
        """Of each row received: the expert, from 0 in this rank and chunk; and whether it is one.

        Slots that nobody filled hold anything, and no gradient comes back from them.
        """
        counts = self._arriving[chunk]
        expert = torch.arange(self.experts, device=counts.device).repeat(len(counts))
        if self.slots is None:
            _, receive = self._splits[chunk]
            assert receive is not None
            expert = expert.repeat_interleave(counts.flatten(), output_size=sum(receive))
            return expert, torch.ones_like(expert, dtype=torch.bool)
        place = torch.arange(self.slots, device=counts.device)
        return expert.repeat_interleave(self.slots), (place < counts[..., None]).flatten()

    def unpack(self, parts: Sequence[Tensor]) -> Tensor:
        """Rows [N, d] in the order that `pack` got them; those that did not travel are zero."""
        packed = torch.cat(list(parts)) if len(parts) > 1 else parts[0]
        if self.slots is None:
            missing = self._rows - len(packed)
            return torch.cat([packed, packed.new_zeros(missing, packed.shape[1])])
        return _move(packed, self._slot_of_row(), self._row_of_slot)

    def keys(self, keys: Tensor) -> list[Tensor]:
        """Per chunk, the keys [N] int64 of the rows that arrive, where there are rows."""
        parts = self.pack(keys[:, None])
        with torch.no_grad():
            return [
                exchange(part, self.axis, *split)[:, 0]
                for part, split in zip(parts, self._splits, strict=True)
            ]


class Flight:
    """Rows under way. Asynchronous, in both directions, if others can be worked on meanwhile."""

    def __init__(
        self,
        x: Tensor,
        axis: Axis,
        send: Sequence[int] | None,
        receive: Sequence[int] | None,
        *,
        wait: bool,
    ) -> None:
        self.axis, self.send, self.receive = axis, send, receive
        self.work: dist.Work | None = None
        self.held: Tensor | None = None
        self.received: Tensor | None = None
        self.waited = wait
        if wait:
            self.rows = exchange(x, axis, send, receive)
        else:
            self.rows = _Start.apply(x, self)

    def land(self) -> Tensor:
        """The rows received."""
        return self.rows if self.waited else _Land.apply(self.rows, self)

    @named("all-to-all")
    def launch(
        self, x: Tensor, send: Sequence[int] | None, receive: Sequence[int] | None
    ) -> Tensor:
        """Start sending; what is received is not there before `finish`."""
        rows = len(x) if receive is None else sum(receive)
        self.received = received = x.new_empty(rows, *x.shape[1:])
        self.held = x.contiguous()  # its memory must not be used again meanwhile
        self.work = dist.all_to_all_single(
            received,
            self.held,
            None if receive is None else list(receive),
            None if send is None else list(send),
            group=self.axis.group,
            async_op=True,
        )
        return received

    @named("all-to-all")
    def finish(self) -> Tensor:
        """Wait for what was launched last, and return what was received."""
        assert self.work is not None
        assert self.received is not None
        wait_for(self.work, "all_to_all_single", self.axis)
        received, self.work, self.held, self.received = self.received, None, None, None
        return received


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, flight: Flight) -> Tensor:
        ctx.flight = flight
        return flight.launch(x, flight.send, flight.receive)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.flight.finish(), None


class _Land(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, flight: Flight) -> Tensor:
        ctx.flight = flight
        flight.finish()
        return rows.view_as(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        flight = ctx.flight
        flight.launch(grad, flight.receive, flight.send)
        return grad, None  # of the right shape; `_Start` takes what is received instead


def _move(x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    """Rows x[index], zero where the index is -1; `inverse` leads back."""
    return _Move.apply(x, index, inverse)


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return _rows(x, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return _rows(grad, inverse), None, None


def _rows(x: Tensor, index: Tensor) -> Tensor:
    absent = index < 0
    return x.index_select(0, index.masked_fill(absent, 0)).masked_fill_(absent[:, None], 0)
