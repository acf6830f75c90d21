"""Where a rank is, as its Python frames tell it: in which collective, or in which line of code."""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Literal

import torch.distributed as dist

from megaswitch.parallel.mesh import Axis, Mesh


@dataclass(frozen=True)
class Place:
    """Where the main work of a rank is.

    Attributes:
        kind: "collective" if it waits for others there, else "code".
        name: of the collective and its axis, or of the function with file and line.
        step: of training, if told.
        phase: within the step, if told.
    """

    kind: Literal["collective", "code"]
    name: str
    step: int = 0
    phase: str = ""

    def during(self, step: int, phase: str) -> Place:
        """The same place at this time."""
        return replace(self, step=step, phase=phase)

    def __str__(self) -> str:
        when = f" at step {self.step}" if self.step else ""
        when += f" ({self.phase})" if self.phase else ""
        return f"{'waits in' if self.kind == 'collective' else 'is in'} {self.name}{when}"


def place_now(mesh: Mesh) -> Place:
    """Where this process is. The backward pass may run in a thread of autograd's own."""
    frames, mine = sys._current_frames(), threading.get_ident()
    main = frames.pop(threading.main_thread().ident or 0, None)
    frames.pop(mine, None)
    places = [_place(_stack(frame), mesh) for frame in (main, *frames.values()) if frame]
    # In the main thread or any other, what waits for other ranks explains most.
    return next((p for p in places if p.kind == "collective"), places[0])


def wait_for(work: dist.Work, collective: str, axis: Axis) -> None:
    """Wait for a collective that runs in the background; whoever looks here sees which it is."""
    work.wait()


def place_of_error(error: BaseException, mesh: Mesh) -> Place:
    """Where `error` was raised."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return _place(frames[::-1], mesh)


def _stack(frame: FrameType | None) -> list[FrameType]:
    frames = []
    while frame:
        frames.append(frame)
        frame = frame.f_back
    return frames


def _place(frames: Sequence[FrameType], mesh: Mesh) -> Place:
    """The place that frames, innermost first, show."""
    depth = _collective(frames)
    if depth is None:
        ours = (f for f in frames if _module(f).split(".")[0] in ("megaswitch", "__main__"))
        return _code(next(ours, frames[0]))
    frame = frames[depth]
    waiting = frame.f_code is wait_for.__code__
    name = frame.f_locals["collective"] if waiting else frame.f_code.co_name
    axis = _axis(frames[depth:], mesh)
    return Place("collective", f"{name} over {axis}" if axis else name)


def _collective(frames: Sequence[FrameType]) -> int | None:
    """The frame that waits for other ranks, unless one of our own code is further in."""
    for depth, frame in enumerate(frames):
        module = _module(frame)
        # The wrapper is torch's logging decorator.
        in_torch = module.startswith("torch.distributed.") and frame.f_code.co_name != "wrapper"
        if in_torch or frame.f_code is wait_for.__code__:
            return depth
        if module.split(".")[0] in ("megaswitch", "__main__"):
            return None
    return None


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))


def _code(frame: FrameType) -> Place:
    file = Path(frame.f_code.co_filename).name
    return Place("code", f"{frame.f_code.co_qualname} ({file}:{frame.f_lineno})")


def _axis(frames: Iterable[FrameType], mesh: Mesh) -> str | None:
    """The axis that a collective runs over: its caller's `axis`, or that of its `group`."""
    for frame in frames:
        held = frame.f_locals
        if isinstance(axis := held.get("axis"), Axis):
            return axis.name
        if (group := held.get("group")) is not None:
            names = [a.name for a in mesh.axes.values() if a.group is group]
            if names:  # the plainest of axes with the same ranks, as "dp" of "dp" and "world"
                return min(names, key=len)
    return None


def story(answers: dict[int, Place], size: int) -> str:
    """One sentence on where `size` ranks are, those first that the others wait for."""
    parts = []
    if silent := [rank for rank in range(size) if rank not in answers]:
        verb = "does" if len(silent) == 1 else "do"
        parts.append(f"{rank_list(silent)} {verb} not answer (gone or stopped)")
    groups: dict[Place, list[int]] = {}
    for rank, place in sorted(answers.items()):
        groups.setdefault(place, []).append(rank)
    for place, ranks in sorted(groups.items(), key=lambda item: item[0].kind == "collective"):
        text = str(place)
        if len(ranks) > 1:
            verb, _, rest = text.partition(" ")
            text = f"{ {'waits': 'wait', 'is': 'are'}[verb] } {rest}"
        parts.append(f"{rank_list(ranks)} {text}")
    return "; ".join(parts)


def rank_list(ranks: Sequence[int]) -> str:
    """[0, 1, 2, 4] as "ranks 0-2, 4"."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and runs[-1][-1] == rank - 1:
            runs[-1][1:] = [rank]
        else:
            runs.append([rank])
    listed = ", ".join("-".join(map(str, run)) for run in runs)
    return f"rank {listed}" if len(ranks) == 1 else f"ranks {listed}"
