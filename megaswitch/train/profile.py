"""Where a training step goes: a trace for a viewer, and a table for people.

Time is counted where it is spent: on a GPU that of kernels, else that of a thread in an operator
and not in another that it called. Backward passes count for the part whose forward pass they undo.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from rich.table import Table
from torch.profiler import ProfilerActivity, schedule
from torch.profiler import profile as torch_profile

from megaswitch.files import write_durably
from megaswitch.log import console, info
from megaswitch.parallel.mesh import Mesh
from megaswitch.parallel.regions import PREFIX, watched

# Steps that warm up caches and the profiler, and steps that are measured.
WARM_UP, MEASURED = 2, 3
_BACKWARD = "autograd::engine::evaluate_function: "
_REST = "other operators"


@dataclass
class Times:
    """Seconds of one step, by part.

    Attributes:
        step: from its start to its end.
        forward: of each part.
        backward: likewise.
    """

    step: float = 0.0
    forward: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    backward: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    @property
    def idle(self) -> float:
        """Seconds in no operator: Python, and what it waits for; on a GPU, without a kernel."""
        return max(0.0, self.step - sum(self.forward.values()) - sum(self.backward.values()))


def times_of(events: Iterable[Any], *, steps: int, on_gpu: bool) -> Times:
    """Add up a profiler's events.

    Args:
        events: `torch.autograd.profiler_util.FunctionEvent`s of so many steps.
        steps: see above.
        on_gpu: count kernels, not the operators that started them.
    """
    events = [e for e in events if e.device_type == torch.autograd.DeviceType.CPU]
    labels: dict[int, str | None] = {}
    passes: dict[int, bool] = {}
    part_of_number: dict[int, str] = {}
    for event in sorted(events, key=lambda e: (e.time_range.start, -e.time_range.end)):
        parent = event.cpu_parent
        label = labels.get(id(parent)) if parent is not None else None
        backward = passes.get(id(parent), False) if parent is not None else False
        if event.name.startswith(PREFIX):
            label = event.name.removeprefix(PREFIX)
        elif event.name.startswith(_BACKWARD):
            backward = True
            label = part_of_number.get(event.sequence_nr)
            if "AccumulateGrad" in event.name:
                label = "gradient sums"
        elif label and event.sequence_nr >= 0 and not backward:
            part_of_number[event.sequence_nr] = label
        labels[id(event)], passes[id(event)] = label, backward
    times = Times()
    for event in events:
        spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        seconds = spent / 1e6 / steps
        if event.name.startswith("ProfilerStep"):
            times.step += event.cpu_time_total / 1e6 / steps
            continue
        by_part = times.backward if passes[id(event)] else times.forward
        by_part[labels[id(event)] or _REST] += seconds
    return times


class StepProfile:
    """Profiles some steps of a run; `__call__` after each step of it.

    Args:
        run_dir: gets `profile/`: a trace of rank 0 and the table of all ranks.
        mesh: the ranks, all of which have such an object.
    """

    def __init__(self, run_dir: Path, mesh: Mesh) -> None:
        self.folder, self.mesh = run_dir / "profile", mesh
        self.on_gpu = mesh.device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.on_gpu else [])]
        self._profile = torch_profile(
            activities=activities,
            schedule=schedule(wait=0, warmup=WARM_UP, active=MEASURED, repeat=1),
            on_trace_ready=self._ready,
        )
        self._steps = 0
        self.times: Times | None = None

    @contextmanager
    def running(self) -> Iterator[StepProfile]:
        """What the run runs in."""
        with watched(), self._profile:
            yield self
        if self.times is None and self.mesh.rank == 0:
            info(f"nothing was profiled: that takes {WARM_UP + MEASURED} steps of a run")

    def __call__(self) -> None:
        """End a step. All ranks do so together."""
        self._steps += 1
        if self._steps > WARM_UP + MEASURED:
            return
        self._profile.step()
        if self.times is not None:
            table = summary(self.mesh.gather(self.times))
            if self.mesh.rank == 0:
                write_durably(self.folder / "profile.json", json.dumps(table, indent=1))
                show(table, on_gpu=self.on_gpu)
                info(f"trace for ui.perfetto.dev or chrome://tracing: {self.trace}")

    @property
    def trace(self) -> Path:
        """The trace of rank 0."""
        return self.folder / "trace.json.gz"

    def _ready(self, profile: torch_profile) -> None:
        if self._steps < WARM_UP + MEASURED:
            return  # the run ended before
        if self.mesh.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            profile.export_chrome_trace(str(self.trace))
        self.times = times_of(profile.events(), steps=MEASURED, on_gpu=self.on_gpu)


def summary(ranks: list[Times]) -> dict[str, Any]:
    """Means over ranks, and the least and the most of any, in seconds a step."""
    names = {name for t in ranks for name in (*t.forward, *t.backward)}
    parts = {}
    for name in names:
        pairs = [(t.forward.get(name, 0.0), t.backward.get(name, 0.0)) for t in ranks]
        sums = [sum(pair) for pair in pairs]
        parts[name] = {
            "forward": mean(f for f, _ in pairs),
            "backward": mean(b for _, b in pairs),
            "least": min(sums),
            "most": max(sums),
        }
    idle = [t.idle for t in ranks]
    return {
        "ranks": len(ranks),
        "step": mean(t.step for t in ranks),
        "idle": {"mean": mean(idle), "least": min(idle), "most": max(idle)},
        "parts": dict(sorted(parts.items(), key=lambda item: -item[1]["most"])),
    }


def show(table: dict[str, Any], *, on_gpu: bool) -> None:
    """Print a summary, in milliseconds."""
    step = table["step"] or 1.0
    grid = Table("part", box=None)
    several = table["ranks"] > 1
    for title in ("forward", "backward", "share", *(("least", "most") if several else ())):
        grid.add_column(title, justify="right")

    def add(name: str, forward: float, backward: float, *extremes: float) -> None:
        cells = [f"{1e3 * forward:.1f}", f"{1e3 * backward:.1f}" if backward else ""]
        cells.append(f"{100 * (forward + backward) / step:.1f}%")
        grid.add_row(name, *cells, *(f"{1e3 * x:.1f}" for x in extremes if several))

    for name, part in table["parts"].items():
        add(name, part["forward"], part["backward"], part["least"], part["most"])
    idle = table["idle"]
    name = "no kernel runs" if on_gpu else "Python and waiting"
    add(name, idle["mean"], 0.0, idle["least"], idle["most"])
    over = f", means over {table['ranks']} ranks" if several else ""
    info(f"a step takes {1e3 * table['step']:.1f} ms{over}; milliseconds of each part:")
    console().print(grid)
