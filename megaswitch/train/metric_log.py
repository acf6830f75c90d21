"""Where a run writes its metrics."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from torch.utils.tensorboard import SummaryWriter

from megaswitch.config import RunConfig
from megaswitch.files import lock, write_durably
from megaswitch.metrics_file import read_metrics
from megaswitch.train.expert_log import ExpertLog
from megaswitch.train.trackers import open_trackers


class MetricLog:
    """`metrics.jsonl`, TensorBoard files and, if asked for, other services: the same names in all.

    While it is open no other process can open one in the same folder.

    Args:
        run_dir: the run's folder.
        first_step: steps from here on are about to be written; a resumed run drops what an
            interrupted one had written beyond its checkpoint, so a curve has no step twice.
        config: of the run; None: nothing but files.
    """

    def __init__(self, run_dir: Path, first_step: int, config: RunConfig | None = None) -> None:
        self.lock = lock(run_dir)
        self.path = run_dir / "metrics.jsonl"
        self.file: IO[str] | None = None
        self.board: SummaryWriter | None = None
        self.experts = ExpertLog(run_dir, first_step)
        self.cut(first_step)
        self.trackers = open_trackers(config.train.trackers, config) if config else []

    def cut(self, first_step: int) -> None:
        """Drop the lines of steps from here on, which are about to be written again."""
        self._close()
        self.experts.cut(first_step)
        kept = [m for m in read_metrics(self.path) if m["step"] < first_step]
        aside = self.path.with_suffix(".unfinished")
        write_durably(aside, "".join(json.dumps(m) + "\n" for m in kept))
        os.replace(aside, self.path)
        self.file = self.path.open("a", encoding="utf-8")
        folder = self.path.with_name("tensorboard")
        self.board = SummaryWriter(str(folder), purge_step=first_step or None)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append one line and its TensorBoard scalars."""
        assert self.file
        assert self.board
        self.file.write(json.dumps({"step": step, **metrics}) + "\n")
        self.file.flush()
        for key, value in metrics.items():
            self.board.add_scalar(key, value, step)
        for tracker in self.trackers:
            tracker.log(step, metrics)

    def close(self) -> None:
        """Flush and close both, and let others have the run folder."""
        self._close()
        for tracker in self.trackers:
            tracker.close()
        self.lock.close()

    def _close(self) -> None:
        for open_file in (self.file, self.board):
            if open_file:
                open_file.close()
