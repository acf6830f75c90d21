"""What a rank was doing when the job ended: a JSON file for people and programs."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
import traceback
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from megaswitch.parallel.places import Place

_COLLECTIVES = 50  # of the last ones
_KEYS = ("collective_seq_id", "profiling_name", "state", "process_group", "input_sizes",
         "time_created_ns", "time_discovered_completed_ns")  # fmt: skip


def write_flight_record(folder: Path, rank: int, place: Place, reason: str) -> Path:
    """Write `rank_00002.json`, over that of an earlier failure; returns `folder`.

    Args:
        folder: of the run's records.
        rank: of this process.
        place: where its main work is.
        reason: what this rank noticed; empty if others did.

    Raises:
        OSError: it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "rank": rank,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "time": time.time(),
        "reason": reason,
        **asdict(place),
        "threads": _stacks(),
        "collectives": _collectives(),
    }
    path = folder / f"rank_{rank:05d}.json"
    path.write_text(json.dumps(record, indent=1), encoding="utf-8")
    return folder


def _stacks() -> dict[str, list[str]]:
    """Each thread's frames, outermost first."""
    names = {t.ident: t.name for t in threading.enumerate()}
    return {
        f"{names.get(ident, 'unnamed')} ({ident})": [
            f"{f.name} ({f.filename}:{f.lineno})" for f in traceback.extract_stack(frame)
        ]
        for ident, frame in sys._current_frames().items()
        if ident != threading.get_ident()
    }


def _collectives() -> Any:
    """The last ones in torch's flight recorder, and what each group completed; or why not."""
    try:
        c10d: Any = import_module("torch._C._distributed_c10d")
        found = json.loads(c10d._dump_fr_trace_json(True, False))
    except (ImportError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        return f"this build of torch {torch.__version__} has no record of them: {error}"
    last = found.get("entries", [])[-_COLLECTIVES:]
    entries = [{key: entry[key] for key in _KEYS if key in entry} for entry in last]
    return {"groups": found.get("pg_status", {}), "last": entries}
