"""What a rehearsed step does: every tensor's life, every collective, every FLOP and byte.

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
from functools import cache
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from megaswitch.layers.kernels import kernels_of

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

    def borrow(self, size: int) -> None:
        """So much is in use for a moment."""
        with self.of_kind("buffers"):
            self._die(self._born(size))

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


@dataclass(frozen=True)
class Work:
    """What a device has to do, whichever it is.

    Attributes:
        flops: of matrix products and attention.
        moved: bytes that all other operations read and write.
        operations: how many, products too; views, which touch nothing, are none.
    """

    flops: float = 0.0
    moved: float = 0.0
    operations: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.flops + other.flops,
            self.moved + other.moved,
            self.operations + other.operations,
        )

    def __mul__(self, times: float) -> Work:
        return Work(self.flops * times, self.moved * times, self.operations * times)

    def __sub__(self, other: Work) -> Work:
        return self + other * -1


class Recorder(TorchDispatchMode):
    """Sees every operation inside. Enter it within `FakeTensorMode`.

    Args:
        axes: names of the axes, by the ranks of each.

    Attributes:
        memory: of all tensors.
        collectives: how many of each kind.
        work: of all operations but collectives.
    """

    def __init__(self, axes: Mapping[tuple[int, ...], str]) -> None:
        super().__init__()
        self._axes = axes
        self._axis_of: dict[str, str] = {}  # by the name of a group; several may be of one axis
        self.memory = Memory()
        self.collectives: Counter[Collective] = Counter()
        self.work = Work()
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
        if func is _DEVICE_OF and isinstance(args[0], FakeTensor):
            mode = args[0].fake_mode  # what it would say itself, in half of all calls
            return torch.device("meta") if mode.in_kernel_invocation else args[0].fake_device
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes again, with local tensors
        result = func(*args, **(kwargs or {}))
        if self._paused or isinstance(result, torch.device | torch.dtype):
            return result  # a question, no operation
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.memory.see(leaf)
        if func.namespace == "c10d":
            self._collective(func, args)
        else:
            self.work += _work(func, args, kwargs or {}, result)
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
        if operation in ("all_gather", "reduce_scatter") and kernels_of(tensors[0]) == "cpu":
            self.memory.borrow(size)  # gloo gathers into, and reduces, a copy of the larger tensor

    def _axis(self, group: dist.ProcessGroup) -> str:
        name = group.group_name
        if name not in self._axis_of:
            self._axis_of[name] = self._axes[tuple(dist.get_process_group_ranks(group))]
        return self._axis_of[name]


_ATEN = torch.ops.aten
_DEVICE_OF = torch.ops.prim.device.default
# They neither read nor write; torch does not count the first among views.
_IDLE = {_ATEN._unsafe_view, _ATEN.empty, _ATEN.empty_like, _ATEN.new_empty, _ATEN.empty_strided,
         _ATEN.new_empty_strided, _ATEN.lift_fresh}  # fmt: skip
# They read as much of their first tensor as they write.
_LOOKUPS = {_ATEN.embedding, _ATEN.index_select, _ATEN.gather, _ATEN.index}


def _work(func: Any, args: Any, kwargs: Any, result: Any) -> Work:
    packet = func._overloadpacket
    if func.is_view or packet in _IDLE or not _has_tensors(func):
        return Work()
    flops = _flops(packet, args, kwargs, result)
    if flops is not None:
        return Work(flops=flops, operations=1)
    given = [_size(leaf) for leaf in tree_leaves((args, kwargs))]
    made = sum(_size(leaf) for leaf in tree_leaves(result))
    changed = [
        argument
        for argument, kind in zip(args, func._schema.arguments, strict=False)
        if kind.alias_info is not None and kind.alias_info.is_write
    ]
    if changed:  # what is returned is what was given
        made = sum(_size(leaf) for leaf in tree_leaves(changed))
    read = made + sum(given[1:]) if packet in _LOOKUPS else sum(given)
    return Work(moved=read + made, operations=1)


@cache
def _has_tensors(func: Any) -> bool:
    """What neither takes nor makes one asks about types, or marks a range for the profiler."""
    schema = func._schema
    return any("Tensor" in str(a.type) for a in (*schema.arguments, *schema.returns))


def _size(leaf: Any) -> int:
    """Bytes of memory behind a tensor, of which an expanded one has few."""
    if not isinstance(leaf, Tensor):
        return 0
    return min(leaf.numel() * leaf.element_size(), leaf.untyped_storage().nbytes())


def _flops(packet: Any, args: Any, kwargs: Any, result: Any) -> int | None:
    """None: no product."""
    if packet is _ATEN._grouped_mm:
        return _grouped_flops(args[0], args[1], result)
    if packet is _ATEN._scaled_dot_product_flash_attention_for_cpu:
        return sdpa_flop_count(*(t.shape for t in args[:3]))
    if packet is _ATEN._scaled_dot_product_flash_attention_for_cpu_backward:
        return sdpa_backward_flop_count(*(t.shape for t in args[:4]))
    formula: Callable[..., int] | None = flop_registry.get(packet)
    return formula(*args, **kwargs, out_val=result) if formula else None


def _grouped_flops(a: Tensor, b: Tensor, result: Tensor) -> int:
    """Rows of one matrix times as many of the other, whichever group they fall in.

    [N, K] · [E, K, M] gives [N, M]; [K, N] · [N, M], cut along N, gives [E, K, M].
    """
    if b.ndim == 3:
        return 2 * a.shape[0] * a.shape[1] * b.shape[2]
    return 2 * a.shape[0] * a.shape[1] * b.shape[1]
