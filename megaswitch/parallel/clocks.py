"""Whether the clocks of all hosts agree, as logs, certificates and file times want it."""

from __future__ import annotations

import statistics
import time

import torch.distributed as dist

from megaswitch.parallel.mesh import Mesh

_ROUNDS = 3
TOLERANCE = 1.0  # seconds; messages between hosts take far less, busy machines included


def clock_offsets(mesh: Mesh) -> list[float]:
    """Seconds that each rank's clock is ahead of the median one, by rank; ranks call it together.

    Each round all read their clocks as they leave a barrier. What a rank is late there looks like a
    skew, so that the smallest of several readings counts.
    """
    best = [float("inf")] * mesh.size
    for _ in range(_ROUNDS if mesh.size > 1 else 0):
        dist.barrier(group=mesh.group)
        times = mesh.gather(time.time())
        middle = statistics.median(times)
        best = [min(b, t - middle, key=abs) for b, t in zip(best, times, strict=True)]
    return best if mesh.size > 1 else [0.0]
