"""What happened to a run, one JSON line each, in the order in which it happened.

Metrics beyond a checkpoint are dropped when a run goes on from it; events never are.
"""

from __future__ import annotations

import datetime as dt
import json
from pathlib import Path
from typing import Any

from megaswitch.log import warn

EVENTS = "events.jsonl"


def write_event(run_dir: Path, kind: str, step: int, **details: Any) -> None:
    """Append an event. One that cannot be written is no reason to end a run, and is told.

    Args:
        run_dir: the run's folder.
        kind: such as "resumed" or "skipped".
        step: of training.
        details: numbers, texts and lists of these.
    """
    now = dt.datetime.now(dt.UTC).isoformat(timespec="milliseconds")
    line = json.dumps({"time": now, "event": kind, "step": step, **details})
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with (run_dir / EVENTS).open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        warn(f"event {kind!r} could not be written to {run_dir / EVENTS}: {error.strerror}")


def read_events(run_dir: Path) -> list[dict[str, Any]]:
    """All events of a run; lines that a crash spoilt are left out."""
    path = run_dir / EVENTS
    if not path.is_file():
        return []
    events = []
    for line in path.read_bytes().splitlines():
        try:
            event = json.loads(line)
            known = [type(event[key]) for key in ("time", "event", "step")] == [str, str, int]
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
        if known:
            events.append(event)
    return events
