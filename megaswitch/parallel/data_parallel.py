"""Summing gradients over data-parallel ranks.

Gradients are sums: the loss was divided by global counts, so no rank divides again. Buckets follow
the order of the parameters and never change, so a resumed run adds in the same order as the run it
continues (torch's DDP re-forms its buckets after the first step, which may change the last bits).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

import torch.distributed as dist
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from megaswitch.parallel.mesh import Mesh

_BUCKET_BYTES = 32 << 20
_BUCKETS_UNDER_WAY = 2


def sum_gradients(parameters: Iterable[nn.Parameter], mesh: Mesh) -> None:
    """Replace every gradient by its sum over all ranks; all ranks must have the same gradients."""
    if mesh.group is None:
        return
    pending: deque[tuple[list[Tensor], Tensor, dist.Work]] = deque()

    def finish() -> None:
        bucket, flat, work = pending.popleft()
        work.wait()
        for gradient, summed in zip(bucket, _unflatten_dense_tensors(flat, bucket), strict=True):
            gradient.copy_(summed)

    for bucket in _buckets([p.grad for p in parameters if p.grad is not None]):
        if len(pending) == _BUCKETS_UNDER_WAY:  # no more copies than overlap needs
            finish()
        flat = _flatten_dense_tensors(bucket)
        pending.append((bucket, flat, dist.all_reduce(flat, group=mesh.group, async_op=True)))
    while pending:
        finish()


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Runs of tensors of one dtype, of about `_BUCKET_BYTES` each."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and (tensor.dtype != bucket[0].dtype or size + tensor.nbytes > _BUCKET_BYTES):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        yield bucket
