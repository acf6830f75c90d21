"""Whether a step may change the weights, and what is to be done if not."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from megaswitch.checkpoint.manager import TrainState
from megaswitch.schema_fault import FaultConfig

_LEAST = 8  # steps without which no loss is called a spike
_NARROWEST = 0.01  # of the median: a deviation smaller than that is luck
_MAD = 1.4826  # median absolute deviation × this = standard deviation, of normal numbers

Verdict = Literal["good", "spike", "skip", "rewind", "stop"]


class Judge:
    """Decides alike on all ranks: by sums over all of them, and by the state of the run.

    Args:
        config: what to do.
    """

    def __init__(self, config: FaultConfig) -> None:
        self.config = config

    def verdict(self, state: TrainState, loss: float, norm: float) -> Verdict:
        """Of a step that was calculated, but has not changed the weights yet.

        Returns:
            "good"; "spike": good, but to be reported; "skip": bad, the run goes on with the next;
            "rewind": bad, the run goes back; "stop": bad, and all that was allowed is used up.
        """
        spike = self.is_spike(state.recent, loss)
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite and not (spike and self.config.spike_action == "bad"):
            return "spike" if spike else "good"
        if state.row < self.config.skip:
            return "skip"
        return "rewind" if state.rewinds < self.config.rewinds else "stop"

    def is_spike(self, recent: Sequence[float], loss: float) -> bool:
        """Whether `loss` is far above the median of recent ones, which spikes do not move."""
        if self.config.spike is None or len(recent) < _LEAST:
            return False
        median = statistics.median(recent)
        deviation = _MAD * statistics.median([abs(value - median) for value in recent])
        return loss - median > self.config.spike * max(deviation, _NARROWEST * abs(median))

    def after(self, state: TrainState, size: int, loss: float, *, good: bool) -> TrainState:
        """The state after a step of `size` samples, whether it changed the weights or was bad."""
        state = replace(state, step=state.step + 1, samples=state.samples + size)
        if not good:
            return replace(
                state,
                row=state.row + 1,
                bad_steps=state.bad_steps + 1,
                left_out=state.left_out + size,
            )
        recent = [*state.recent, loss] if self.config.spike is not None else []
        return replace(state, row=0, recent=recent[-self.config.spike_window :])

    def why(self, state: TrainState, loss: float, norm: float) -> str:
        """What is wrong with a bad step, in words."""
        numbers = f"the loss is {loss:.4g} and the gradient norm {norm:.4g} at step "
        numbers += str(state.step + 1)
        if math.isfinite(loss) and math.isfinite(norm):
            median = statistics.median(state.recent)
            return f"{numbers}; the median loss of recent steps is {median:.4g}, so it is a spike"
        return f"{numbers}; both must be finite"
