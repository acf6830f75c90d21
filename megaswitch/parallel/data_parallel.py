"""Summing gradients over data-parallel ranks.

Gradients are sums: the loss was divided by global counts, so no rank divides again. Buckets follow
the order of the parameters and never change, so a resumed run adds in the same order as the run it
continues (torch's DDP re-forms its buckets after the first step, which may change the last bits).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch.distributed as dist
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from megaswitch.parallel.mesh import Mesh

_BUCKET_BYTES = 32 << 20


def sum_gradients(parameters: Iterable[nn.Parameter], mesh: Mesh) -> None:
    """Replace every gradient by its sum over all ranks; all ranks must have the same gradients."""
    if mesh.group is None:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    pending = []
    for bucket in _buckets(gradients):
        flat = _flatten_dense_tensors(bucket)
        pending.append((bucket, flat, dist.all_reduce(flat, group=mesh.group, async_op=True)))
    for bucket, flat, work in pending:
        work.wait()
        for gradient, summed in zip(bucket, _unflatten_dense_tensors(flat, bucket), strict=True):
            gradient.copy_(summed)


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
