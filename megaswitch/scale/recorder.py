"""What a rehearsed step does: every tensor's life, every collective, every FLOP.

Tensors have shapes but no memory (torch's fake tensors), so that a rank of thousands fits a laptop.
Memory is counted by storages, as an allocator would see them: born with the first tensor on one,
dead with the last. Work memory inside a kernel is not seen.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

KINDS = ("weights", "gradients", "optimizer", "activations", "buffers")


@dataclass
class Allocation:
    """One storage's life. Times count allocations and deaths; `died` is None while it lives."""

    size: int
    kind: str
    born: int
    died: int | None = None
    is_lent: bool = False  # by `layers.gradient_memory`, which keeps it for the next gradient


class Memory:
    """All storages of a rehearsal, and the most that lived at once since `reset_peak`."""

    def __init__(self) -> None:
        self.live = self.peak = self._now = self._peak_at = 0
        self.kind = "buffers"  # of what is born next
        self._all: list[Allocation] = []
        self._of: dict[int, tuple[weakref.ref[Any], Allocation]] = {}
        self._idle: list[Allocation] = []  # blocks that wait for a gradient of their size

    @contextmanager
    def of_kind(self, kind: str) -> Iterator[None]:
        """Inside, what is born is of this kind, unless `mark` says otherwise later."""
        before, self.kind = self.kind, kind
        try:
            yield
        finally:
            self.kind = before

    def see(self, tensor: Tensor) -> None:
        """Count the tensor's storage, if it is new."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._of:
            reference = weakref.ref(storage, lambda _: self._forget(key))
            self._of[key] = reference, self._born(storage.nbytes())

    def resized(self, storage: torch.UntypedStorage) -> None:
        """FSDP2 frees gathered weights by resizing their storage to nothing, and back."""
        if storage._cdata in self._of:
            reference, allocation = self._of[storage._cdata]
            self._die(allocation)
            with self.of_kind("buffers"):
                self._of[storage._cdata] = reference, self._born(storage.nbytes())

    def lend(self, like: Tensor) -> Tensor:
        """What `GradientMemory.empty_like` does to memory."""
        size = like.numel() * like.element_size()
        fitting = [block for block in self._idle if block.size == size][:1]
        for block in fitting or self._idle:
            self._die(block)
        self._idle = [block for block in self._idle if block.died is None]
        lent = torch.empty_like(like)
        self.see(lent)
        self._of[lent.untyped_storage()._cdata][1].is_lent = True
        return lent

    def mark(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Say what these tensors are, from their birth on."""
        for tensor in tensors:
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            self.see(local)
            self._of[local.untyped_storage()._cdata][1].kind = kind

    def reset_peak(self) -> None:
        """Look for a new peak from here on."""
        self.peak, self._peak_at = self.live, self._now
        self._all = [a for a in self._all if a.died is None]

    def at_peak(self) -> dict[str, int]:
        """Bytes by kind when most were alive."""
        sizes = dict.fromkeys(KINDS, 0)
        for a in self._all:
            if a.born <= self._peak_at and (a.died is None or a.died > self._peak_at):
                sizes[a.kind] += a.size
        return sizes

    def _born(self, size: int) -> Allocation:
        self._now += 1
        allocation = Allocation(size, self.kind, self._now)
        self._all.append(allocation)
        self.live += size
        if self.live > self.peak:
            self.peak, self._peak_at = self.live, self._now
        return allocation

    def _forget(self, key: int) -> None:
        _, allocation = self._of.pop(key)
        self._die(allocation)
        if allocation.is_lent:
            with self.of_kind("gradients"):
                self._idle.append(self._born(allocation.size))

    def _die(self, allocation: Allocation) -> None:
        self._now += 1
        allocation.died = self._now
        self.live -= allocation.size


@dataclass(frozen=True, order=True)
class Collective:
    """A kind of collective: what, over which axis, and bytes as `parallel/README.md` counts."""

    operation: str
    axis: str
    size: int


_OPERATIONS = {
    "allreduce_": "all_reduce",
    "_allgather_base_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "alltoall_base_": "all_to_all",
    "send": "send",
}


class Recorder(TorchDispatchMode):
    """Sees every operation inside. Enter it within `FakeTensorMode`.

    Args:
        axes: names of the axes, by the ranks of each.

    Attributes:
        memory: of all tensors.
        collectives: how many of each kind.
        flops: of matrix products and attention.
    """

    def __init__(self, axes: Mapping[tuple[int, ...], str]) -> None:
        super().__init__()
        self._axes = axes
        self._axis_of: dict[str, str] = {}  # by the name of a group; several may be of one axis
        self.memory = Memory()
        self.collectives: Counter[Collective] = Counter()
        self.flops = 0
        self._paused = False

    def __enter__(self) -> Recorder:
        resize = torch.UntypedStorage.resize_

        def resize_(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            self.memory.resized(storage)
            return result

        propagate = ShardingPropagator._propagate_tensor_meta_non_cached

        def propagate_(propagator: ShardingPropagator, *args: Any) -> Any:
            self._paused = True  # DTensor tries shapes on global tensors that are nowhere
            try:
                return propagate(propagator, *args)
            finally:
                self._paused = False

        name = "_propagate_tensor_meta_non_cached"
        self._patches: list[Any] = [
            mock.patch.object(torch.UntypedStorage, "resize_", resize_),
            mock.patch.object(ShardingPropagator, name, propagate_),
        ]
        for patch in self._patches:
            patch.start()
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        for patch in self._patches:
            patch.stop()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Let the operation run, and write down what it was."""
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes again, with local tensors
        result = func(*args, **(kwargs or {}))
        if self._paused:
            return result
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.memory.see(leaf)
        if func.namespace == "c10d":
            self._collective(func, args)
        else:
            self.flops += _flops(func, args, kwargs or {}, result)
        return result

    def _collective(self, func: Any, args: tuple[Any, ...]) -> None:
        operation = _OPERATIONS.get(func._schema.name.partition("::")[2])
        if operation is None:
            return
        tensors = [t for t in tree_leaves(args) if isinstance(t, Tensor)]
        sizes = [t.numel() * t.element_size() for t in tensors]
        group = next(
            dist.ProcessGroup.unbox(a)
            for a in args
            if isinstance(a, torch.ScriptObject) and "ProcessGroup" in str(a._type())
        )
        size = sizes[1] if operation == "all_to_all" else max(sizes)
        self.collectives[Collective(operation, self._axis(group), size)] += 1

    def _axis(self, group: dist.ProcessGroup) -> str:
        name = group.group_name
        if name not in self._axis_of:
            self._axis_of[name] = self._axes[tuple(dist.get_process_group_ranks(group))]
        return self._axis_of[name]


def _flops(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    packet = func._overloadpacket
    if packet is torch.ops.aten._grouped_mm:
        return _grouped_flops(args[0], args[1], result)
    formula: Callable[..., int] | None = flop_registry.get(packet)
    return formula(*args, **kwargs, out_val=result) if formula else 0


def _grouped_flops(a: Tensor, b: Tensor, result: Tensor) -> int:
    """Rows of one matrix times as many of the other, whichever group they fall in.

    [N, K] · [E, K, M] gives [N, M]; [K, N] · [N, M], cut along N, gives [E, K, M].
    """
    if b.ndim == 3:
        return 2 * a.shape[0] * a.shape[1] * b.shape[2]
    return 2 * a.shape[0] * a.shape[1] * b.shape[1]
