"""Timing on a GPU: interleaved, by events of the device, as medians and ratios."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping

import torch


def device_seconds(function: Callable[[], object], calls: int) -> float:
    """Seconds of one of so many calls in a row, on the GPU."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        function()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / calls


def compare_on_gpu(
    variants: Mapping[str, Callable[[], object]], *, rounds: int = 15, calls: int = 5
) -> dict[str, dict[str, float]]:
    """Per variant seconds, their inter-quartile range, and the first variant's share of them.

    `speed` is the first one's time by the variant's of the same round: 1 is as fast, 0.5 half so.
    """
    for function in variants.values():  # compilers, caches, the allocator
        for _ in range(3):
            function()
    torch.cuda.synchronize()
    laps: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, function in variants.items():
            laps[name].append(device_seconds(function, calls))
    reference = next(iter(laps.values()))
    results = {}
    for name, seconds in laps.items():
        low, median, high = statistics.quantiles(seconds, n=4)
        speed = statistics.median(r / s for r, s in zip(reference, seconds, strict=True))
        results[name] = {"seconds": median, "spread": high - low, "speed": speed}
        print(f"{name:44s} {median * 1e3:9.3f} ms ± {(high - low) * 1e3:6.3f}  ×{speed:.3f}")
    return results


def peak_memory(function: Callable[[], object]) -> int:
    """Most bytes in use during a call."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated())


def ceilings() -> dict[str, float]:
    """What this GPU reaches: bf16 FLOP/s of a large product, and bytes/s of a large copy."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    b = torch.empty(1 << 29, device="cuda", dtype=torch.bfloat16)
    c = torch.empty_like(b)
    product, copy = (lambda: a @ a), (lambda: c.copy_(b))
    for function in (product, copy):
        device_seconds(function, 5)
    flops = 2 * 8192**3 / min(device_seconds(product, 10) for _ in range(5))
    return {"flops": flops, "bytes": 2 * b.nbytes / min(device_seconds(copy, 10) for _ in range(5))}
