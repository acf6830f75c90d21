"""Timing variants against each other: interleaved, in CPU-seconds, as ratios to the first."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def compare(
    variants: dict[str, Callable[[], Any]], *, rounds: int = 15, warmup: int = 2
) -> dict[str, dict[str, float]]:
    """Time each variant once a round, in turn, so that drift of the machine hits all alike.

    Args:
        variants: name to function; the first is the reference.

    Returns:
        Per variant the median and the inter-quartile range of its CPU-seconds, and the ratio of
        its median to the reference's.
    """
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(warmup + rounds):
        for name, function in variants.items():
            start = time.process_time()
            function()
            if turn >= warmup:
                times[name].append(time.process_time() - start)
    reference = statistics.median(next(iter(times.values())))
    result = {}
    for name, seconds in times.items():
        low, median, high = statistics.quantiles(seconds, n=4)
        ratio = median / reference
        result[name] = {"cpu_seconds": median, "spread": high - low, "ratio": ratio}
        print(f"{name:32s} {median * 1e3:10.3f} ms  ± {(high - low) * 1e3:7.3f}   ×{ratio:.3f}")
    return result


def record(script: str, results: dict[str, Any], output: Path | None) -> None:
    """Write results with what they were measured on."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    content = {
        "script": script,
        "commit": commit,
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {_cpu()}, {torch.get_num_threads()} thread(s)",
        "results": results,
    }
    if output:
        output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        print(f"wrote {output}")


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())
