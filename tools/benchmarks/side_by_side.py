"""Timing variants against each other: interleaved, in CPU-seconds, as ratios."""

from __future__ import annotations

import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Lap:
    """What running something once took.

    Attributes:
        cpu: seconds of all threads and of child processes that have ended, in user and in kernel
            mode.
        wall: seconds.
        faults: pages of memory that the kernel had to supply.
    """

    cpu: float
    wall: float
    faults: int

    @classmethod
    def of(cls, function: Callable[[], Any]) -> Lap:
        """Run `function`."""
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        wall, cpu = time.perf_counter(), _cpu_seconds()
        function()
        cpu, wall = _cpu_seconds() - cpu, time.perf_counter() - wall
        return cls(cpu, wall, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults)

    def __add__(self, other: Lap) -> Lap:
        return Lap(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


def _cpu_seconds() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def measure(
    variants: Mapping[str, Sequence[Callable[[], Any]]], *, rounds: int, warmup: int = 2
) -> dict[str, list[list[Lap]]]:
    """Run each variant once a round, in turn, so that drift of the machine hits all alike.

    Args:
        variants: name to the phases of a run, which are timed apart.

    Returns:
        Per variant and phase the laps of all rounds.
    """
    laps: dict[str, list[list[Lap]]] = {n: [[] for _ in phases] for n, phases in variants.items()}
    for turn in range(warmup + rounds):
        for name, phases in variants.items():
            for phase, function in enumerate(phases):
                lap = Lap.of(function)
                if turn >= warmup:
                    laps[name][phase].append(lap)
    return laps


def summary(laps: Sequence[Lap]) -> dict[str, float]:
    """Medians, and the inter-quartile range of the CPU-seconds."""
    low, cpu, high = statistics.quantiles([lap.cpu for lap in laps], n=4)
    return {
        "cpu_seconds": cpu,
        "spread": high - low,
        "wall_seconds": statistics.median(lap.wall for lap in laps),
        "page_faults": int(statistics.median(lap.faults for lap in laps)),
    }


def ratio(laps: Sequence[Lap], reference: Sequence[Lap]) -> dict[str, float]:
    """Median and inter-quartile range of the CPU-seconds by the reference's of the same round."""
    pairs = [ours.cpu / theirs.cpu for ours, theirs in zip(laps, reference, strict=True)]
    low, median, high = statistics.quantiles(pairs, n=4)
    return {"ratio": median, "ratio_spread": high - low}


def compare(
    variants: Mapping[str, Callable[[], Any]], *, rounds: int = 15
) -> dict[str, dict[str, float]]:
    """Per variant its `summary`, and its `ratio` to the first."""
    measured = measure({name: [function] for name, function in variants.items()}, rounds=rounds)
    reference = next(iter(measured.values()))[0]
    result = {}
    for name, (laps,) in measured.items():
        result[name] = summary(laps) | ratio(laps, reference)
        print(line(name, result[name]), f"×{result[name]['ratio']:.3f}")
    return result


def line(name: str, numbers: Mapping[str, float]) -> str:
    """A row of a table for people."""
    cpu, spread = numbers["cpu_seconds"] * 1e3, numbers["spread"] * 1e3
    return f"{name:32s} {cpu:10.3f} ms  ± {spread:7.3f}"


def record(script: str, results: dict[str, Any], output: Path | None) -> None:
    """Write results with what they were measured on."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    ).stdout.strip()
    content = {
        "script": script,
        "command": " ".join(["python", *sys.argv]),
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
