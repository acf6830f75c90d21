"""How the tokens of each Switch layer were spread over its experts, as a run went on.

One JSON line for a logged step in `experts.jsonl` of the run folder: for each layer the experts'
loads ÷ an even share. Neighbouring experts are put together so that there are at most 64 numbers,
and older lines are thinned out, so that the file stays small.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from megaswitch.files import write_durably
from megaswitch.metrics_file import read_metrics
from megaswitch.train.metrics import LayerLoad

EXPERTS = "experts.jsonl"
_BINS = 64
_LINES = 512  # at which every other one goes


class ExpertLog:
    """The file, open for writing.

    Args:
        run_dir: the run's folder.
        first_step: steps from here on are about to be written.
    """

    def __init__(self, run_dir: Path, first_step: int) -> None:
        self.path = run_dir / EXPERTS
        self.cut(first_step)

    def cut(self, first_step: int) -> None:
        """Drop the lines of steps from here on."""
        self._lines = [m for m in read_metrics(self.path) if m["step"] < first_step]
        self._rewrite()

    def write(self, step: int, loads: Mapping[str, LayerLoad]) -> None:
        """Append a line, if there are Switch layers."""
        if not loads:
            return
        line = {"step": step, "loads": {k: spread(v.tokens_per_expert) for k, v in loads.items()}}
        self._lines.append(line)
        if len(self._lines) >= _LINES:
            self._lines = self._lines[1::2]
            self._rewrite()
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _rewrite(self) -> None:
        if not self._lines and not self.path.exists():
            return
        aside = self.path.with_suffix(".unfinished")
        write_durably(aside, "".join(json.dumps(line) + "\n" for line in self._lines))
        os.replace(aside, self.path)


def spread(tokens: Sequence[int]) -> list[float]:
    """Tokens of each expert, or of neighbouring ones, ÷ an even share."""
    bins = min(len(tokens), _BINS)
    edges = [len(tokens) * i // bins for i in range(bins + 1)]
    whole = max(sum(tokens), 1)
    return [round(sum(tokens[a:b]) * len(tokens) / (b - a) / whole, 3) for a, b in pairwise(edges)]
