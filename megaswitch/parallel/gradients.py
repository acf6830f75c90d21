"""Completing gradients after the backward pass, so that each is the gradient of the whole batch.

Gradients are sums: losses were divided by global counts, so no rank divides again. What is summed
over whom follows from each parameter's declaration:

- over dp (experts: over edp), unless FSDP2 has done it;
- over tp, if it is not sliced over tp and each rank saw only some of the tokens;
- over pp, if several stages hold it (a tie).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.distributed.tensor import DTensor

from megaswitch.parallel.mesh import Axis, Mesh
from megaswitch.parallel.places import wait_for
from megaswitch.parallel.regions import named
from megaswitch.parallel.weights import Weight

_BUCKET_BYTES = 32 << 20
_BUCKETS_UNDER_WAY = 2


class GradientSums:
    """Sums the gradients of a rank's weights.

    Args:
        weights: of this rank, in the same order on all ranks that hold them; frozen ones are
            passed over.
        mesh: the ranks.
        sharded: names of those whose gradients FSDP2 sums over data-parallel ranks.
        sequence_parallel: whether tensor-parallel ranks see different tokens.
        ties: by name, the pipeline ranks that hold a parameter, where there are several.
    """

    def __init__(
        self,
        weights: Mapping[str, Weight],
        mesh: Mesh,
        *,
        sharded: frozenset[str] = frozenset(),
        sequence_parallel: bool = False,
        ties: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        self.weights = [w for w in weights.values() if w.parameter.requires_grad]
        plain = [w for w in self.weights if w.name not in sharded]
        # Backward reaches the last layers first.
        groups = {
            "dp": [w for w in reversed(plain) if not w.spec.is_expert],
            "edp": [w for w in reversed(plain) if w.spec.is_expert],
        }
        self._data = [
            _Buckets(members, mesh.axis(name))
            for name, members in groups.items()
            if members and mesh.axis(name).size > 1
        ]
        tp = mesh.axis("tp")
        divided = sequence_parallel and tp.size > 1
        whole = [w for w in self.weights if "tp" not in w.spec.axes] if divided else []
        self._tensor = _Buckets(whole, tp)
        tied = [(weights[n], ranks) for n, ranks in (ties or {}).items()]
        self._ties = _Ties([pair for pair in tied if pair[0].parameter.requires_grad], mesh)

    def during_backward(self) -> None:
        """Let the next backward pass, the last of the step, start sums as gradients get ready."""
        for buckets in self._data:
            buckets.arm()

    @named("gradient sums")
    def finish(self) -> None:
        """Complete all gradients and hand each to its `Weight.local`."""
        for buckets in self._data:
            buckets.finish()
        for w in self.weights:
            grad = w.parameter.grad
            assert grad is not None, f"{w.name} got no gradient"
            if w.local is not w.parameter:
                w.local.grad = _local(grad)
        self._tensor.finish()
        self._ties.finish()

    def clear(self) -> None:
        """Forget all gradients."""
        for w in self.weights:
            w.parameter.grad = w.local.grad = None


def _local(gradient: Tensor) -> Tensor:
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


class _Buckets:
    """Sums of gradients over one axis, in buckets that never change.

    A resumed run then adds in the same order as the run it continues (torch's DDP re-forms its
    buckets after the first step, which may change the last bits), and ranks agree on the order.
    """

    def __init__(self, weights: list[Weight], axis: Axis) -> None:
        self.axis = axis
        self.buckets = list(_split(weights))
        self._bucket_of = {w.name: i for i, b in enumerate(self.buckets) for w in b}
        self._missing: list[int] | None = None
        self._next = 0
        self._pending: deque[tuple[list[Tensor], Tensor, dist.Work]] = deque()
        self._hooked = False

    def arm(self) -> None:
        """Start every bucket's sum as soon as its gradients are there."""
        self._missing = [len(bucket) for bucket in self.buckets]
        if not self._hooked:
            self._hooked = True
            for w in (w for bucket in self.buckets for w in bucket):
                w.parameter.register_post_accumulate_grad_hook(self._hook(w.name))

    def finish(self) -> None:
        """Start what has not been started, and wait for all."""
        while self._next < len(self.buckets):
            self._launch()
        while self._pending:
            self._collect()
        self._next, self._missing = 0, None

    def _hook(self, name: str) -> Callable[[Tensor], None]:
        bucket = self._bucket_of[name]

        def ready(_: Tensor) -> None:
            if self._missing is None:
                return
            self._missing[bucket] -= 1
            while self._next < len(self.buckets) and not self._missing[self._next]:
                self._launch()

        return ready

    @named("gradient sums")
    def _launch(self) -> None:
        if len(self._pending) == _BUCKETS_UNDER_WAY:  # no more copies than overlap needs
            self._collect()
        gradients = []
        for w in self.buckets[self._next]:
            assert w.parameter.grad is not None, f"{w.name} got no gradient"
            gradients.append(_local(w.parameter.grad))
        flat = _flatten_dense_tensors(gradients)
        work = dist.all_reduce(flat, group=self.axis.group, async_op=True)
        self._pending.append((gradients, flat, work))
        self._next += 1

    def _collect(self) -> None:
        gradients, flat, work = self._pending.popleft()
        wait_for(work, "all_reduce", self.axis)
        for gradient, summed in zip(
            gradients, _unflatten_dense_tensors(flat, gradients), strict=True
        ):
            gradient.copy_(summed)


def _split(weights: Iterable[Weight]) -> Iterator[list[Weight]]:
    """Runs of weights of one dtype, of about `_BUCKET_BYTES` each."""
    bucket: list[Weight] = []
    size = 0
    for w in weights:
        local = w.local
        if bucket and (local.dtype != bucket[0].local.dtype or size + local.nbytes > _BUCKET_BYTES):
            yield bucket
            bucket, size = [], 0
        bucket.append(w)
        size += local.nbytes
    if bucket:
        yield bucket


class _Ties:
    """Parameters that several pipeline stages hold: their gradients are added up on each."""

    def __init__(self, tied: Sequence[tuple[Weight, Sequence[int]]], mesh: Mesh) -> None:
        self.axis = mesh.axis("pp")
        self.by_ranks: dict[tuple[int, ...], list[Weight]] = {}
        for w, ranks in tied:
            if len(ranks) > 1 and self.axis.rank in ranks:
                self.by_ranks.setdefault(tuple(ranks), []).append(w)

    def finish(self) -> None:
        """Exchange and add in the order of the ranks, so that all get the same bits."""
        for ranks, weights in sorted(self.by_ranks.items()):
            gradients = [w.local.grad for w in weights if w.local.grad is not None]
            mine = _flatten_dense_tensors(gradients)
            of_rank = {r: torch.empty_like(mine) for r in ranks if r != self.axis.rank}
            operations = []
            for rank, buffer in of_rank.items():
                operations += [
                    dist.P2POp(dist.isend, mine, group=self.axis.group, group_peer=rank),
                    dist.P2POp(dist.irecv, buffer, group=self.axis.group, group_peer=rank),
                ]
            for work in dist.batch_isend_irecv(operations):
                wait_for(work, "batch_isend_irecv", self.axis)
            of_rank[self.axis.rank] = mine
            total = of_rank[ranks[0]].clone()
            for rank in ranks[1:]:
                total += of_rank[rank]
            for gradient, summed in zip(
                gradients, _unflatten_dense_tensors(total, gradients), strict=True
            ):
                gradient.copy_(summed)
