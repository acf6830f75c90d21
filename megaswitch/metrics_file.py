"""Reading the metrics that a run wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megaswitch.log import warn


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`; those that a crash or a power cut spoilt are left out."""
    if not path.is_file():
        return []
    metrics = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            entry = json.loads(line)
            if type(entry["step"]) is not int:
                raise ValueError
        except (ValueError, KeyError, TypeError, RecursionError):
            warn(f"line {number} of {path} is damaged and was left out")
        else:
            metrics.append(entry)
    return metrics
