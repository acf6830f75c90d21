"""When each stage of a pipeline works: torch's own order of actions, laid out in time."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaswitch.log import UserError

_COLOURS = {"forward": "#4c78a8", "backward": "#f58518", "weights": "#54a24b"}
_NAMES = {"FORWARD": "forward", "FULL_BACKWARD": "backward", "BACKWARD_INPUT": "backward",
          "BACKWARD_WEIGHT": "weights"}  # fmt: skip


@dataclass(frozen=True)
class Span:
    """One action of a pipeline rank; times in the unit of the costs."""

    rank: int
    stage: int
    kind: str
    micro_batch: int
    start: float
    end: float


def lay_out(
    orders: Mapping[int, Sequence[Any]], stages: int, costs: Sequence[Mapping[str, float]]
) -> list[Span]:
    """Let every rank start its next action as soon as what that needs is there.

    Args:
        orders: by pipeline rank, torch's actions (or None where it leaves a gap).
        stages: of all ranks.
        costs: by stage, of "FORWARD", "FULL_BACKWARD", "BACKWARD_INPUT" and "BACKWARD_WEIGHT".
    """
    queues = {rank: _numbered(actions, len(orders) == stages) for rank, actions in orders.items()}
    free = dict.fromkeys(queues, 0.0)
    ends: dict[tuple[str, int, int], float] = {}
    spans: list[Span] = []
    while any(queues.values()):
        moved = False
        for rank, queue in queues.items():
            while queue and (ready := _ready(queue[0], ends, stages)) is not None:
                moved = True
                kind, stage, number = queue.pop(0)
                start = max(free[rank], ready)
                free[rank] = end = start + costs[stage][kind]
                ends[_NAMES[kind], stage, number] = end
                spans.append(Span(rank, stage, _NAMES[kind], number, start, end))
        assert moved, "the schedule waits for itself"
    return spans


def _numbered(actions: Sequence[Any], single: bool) -> list[tuple[str, int, int]]:
    """Computations with the numbers of their micro-batches.

    torch's lists for one stage a rank number forward passes from 1 on the last, which is not what
    runs; there the n-th is of micro-batch n.
    """
    seen: dict[str, int] = {}
    numbered = []
    for action in actions:
        if action is None or (kind := action.computation_type.name) not in _NAMES:
            continue
        number = seen.get(kind, 0)
        seen[kind] = number + 1
        numbered.append((kind, action.stage_index, number if single else action.microbatch_index))
    return numbered


def _ready(
    action: tuple[str, int, int], ends: Mapping[tuple[str, int, int], float], stages: int
) -> float | None:
    """When everything is there that the action needs; None while that is not known."""
    kind, stage, number = action
    needs = []
    if kind == "FORWARD" and stage > 0:
        needs.append(("forward", stage - 1, number))
    if kind in ("FULL_BACKWARD", "BACKWARD_INPUT"):
        needs.append(("forward", stage, number))
        if stage < stages - 1:
            needs.append(("backward", stage + 1, number))
    if kind == "BACKWARD_WEIGHT":
        needs.append(("backward", stage, number))
    if any(need not in ends for need in needs):
        return None
    return max((ends[need] for need in needs), default=0.0)


def bubble(spans: Sequence[Span]) -> float:
    """Share of the time that ranks wait, of all ranks together."""
    length = max(span.end for span in spans)
    ranks = len({span.rank for span in spans})
    return 1.0 - sum(span.end - span.start for span in spans) / (length * ranks)


def write_trace(spans: Sequence[Span], path: Path) -> None:
    """As a picture, or with the suffix .json for chrome://tracing and Perfetto.

    Raises:
        UserError: matplotlib, which draws pictures, is missing.
    """
    if path.suffix == ".json":
        path.write_text(json.dumps({"traceEvents": [_event(s) for s in spans]}), encoding="utf-8")
        return
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(
            f"--plot {path} needs matplotlib ({error}); install it with pip install "
            "'megaswitch[plot]', or write a .json for chrome://tracing"
        ) from error
    ranks = len({span.rank for span in spans})
    figure = Figure(figsize=(12, 1 + 0.4 * ranks), layout="constrained")
    axes = figure.subplots()
    for kind, colour in _COLOURS.items():
        chosen = [span for span in spans if span.kind == kind]
        if chosen:
            axes.barh(
                [s.rank for s in chosen], [s.end - s.start for s in chosen],
                left=[s.start for s in chosen], color=colour, edgecolor="w", linewidth=0.3,
                label=kind,
            )  # fmt: skip
    axes.set(xlabel="time", ylabel="pipeline rank", yticks=range(ranks))
    axes.set_title(f"bubble {bubble(spans):.1%}")
    axes.invert_yaxis()
    axes.legend(frameon=False, ncols=3, loc="upper right")
    figure.savefig(path, dpi=120)


def _event(span: Span) -> dict[str, Any]:
    name = f"{span.kind} {span.micro_batch}"
    times = {"ts": span.start * 1e6, "dur": (span.end - span.start) * 1e6}
    return {"name": name, "ph": "X", "pid": 0, "tid": span.rank, "cat": span.kind} | times
