"""What there is to see of a run: the files of its folder, read once."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaswitch.checkpoint.manager import checkpoints, read_config
from megaswitch.config import RunConfig
from megaswitch.events import read_events
from megaswitch.files import holder
from megaswitch.log import UserError
from megaswitch.metrics_file import read_metrics
from megaswitch.train.expert_log import EXPERTS


@dataclass(frozen=True)
class RunView:
    """A run at one moment.

    Attributes:
        path: its folder.
        config: of its newest start.
        metrics: logged lines, oldest first.
        experts: lines of loads, likewise.
        events: what happened, likewise.
        starts: environments, likewise.
        checkpoints: (step, age in seconds) of each, oldest first.
        holder: who trains it just now, or None.
    """

    path: Path
    config: RunConfig
    metrics: list[dict[str, Any]]
    experts: list[dict[str, Any]]
    events: list[dict[str, Any]]
    starts: list[dict[str, Any]]
    checkpoints: list[tuple[int, float]]
    holder: str | None

    @classmethod
    def read(cls, path: Path) -> RunView:
        """Read a run's folder, also while it trains.

        Raises:
            UserError: it is none.
        """
        if not (path / "config.toml").is_file():
            raise UserError(
                f"{path} is no run folder: it has no config.toml, which every run writes when it "
                "starts; give the train.run_dir of a run"
            )
        now = time.time()
        saved = []
        for one in checkpoints(path / "checkpoints"):
            try:
                age = now - (one / "state.json").stat().st_mtime
            except OSError:  # the run removed it just now
                continue
            saved.append((int(one.name.removeprefix("step_")), age))
        return cls(
            path,
            read_config(path),
            read_metrics(path / "metrics.jsonl"),
            [line for line in read_metrics(path / EXPERTS) if _are_loads(line.get("loads"))],
            read_events(path),
            _read_lines(path / "environment.jsonl"),
            saved,
            holder(path),
        )

    @property
    def step(self) -> int:
        """The last one logged."""
        return max((line["step"] for line in self.metrics), default=0)

    def series(self, key: str) -> list[tuple[int, float]]:
        """(step, value) of a metric."""
        return [
            (line["step"], line[key])
            for line in self.metrics
            if isinstance(line.get(key), int | float)
        ]


def _are_loads(loads: Any) -> bool:
    return isinstance(loads, dict) and all(
        isinstance(row, list) and row and all(isinstance(v, int | float) for v in row)
        for row in loads.values()
    )


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file's lines; spoilt ones are left out."""
    found = []
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def duration(seconds: float) -> str:
    """For people: 42 s, 12 min, 5.1 h, 2.0 days."""
    for limit, unit, size in ((120, "s", 1), (7200, "min", 60), (172800, "h", 3600)):
        if seconds < limit:
            return f"{seconds / size:.{0 if unit != 'h' else 1}f} {unit}"
    return f"{seconds / 86400:.1f} days"


def words_of(event: dict[str, Any]) -> str:
    """What an event says beside its time, kind and step."""
    rest = {k: v for k, v in event.items() if k not in ("time", "event", "step")}
    return ", ".join(f"{key} {value}" for key, value in rest.items())
