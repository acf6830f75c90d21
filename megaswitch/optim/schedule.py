"""Learning rate as a pure function of the step, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megaswitch.config import OptimConfig


def learning_rate(step: int, config: OptimConfig, total_steps: int) -> float:
    """The learning rate of one update.

    With peak = `config.learning_rate` and floor = `config.min_learning_rate`:

    - "rsqrt": peak / √max(step, warmup_steps). The first steps are flat, not a ramp, and nothing
      falls at the end: T5's `rsqrt_no_ramp_down`, which with the defaults is 1 / √max(step, 10⁴).
    - "constant": peak.
    - "linear", "cosine": from peak after the warm-up to floor at `total_steps`.
    - "wsd" (warm-up, stable, decay): peak, then linearly to floor in the last `decay_steps`.

    All but "rsqrt" begin with a linear ramp, peak · (step + 1) / warmup_steps, whose last step
    reaches the peak. The floor would be met at step `total_steps`, one after the last update, and
    holds from there on.

    Args:
        step: number of updates made before this one; 0 for the first.
        config: the schedule and its numbers.
        total_steps: number of updates of the whole run; "rsqrt" and "constant" do not read it.

    Returns:
        The rate, in the units of `config.learning_rate`.
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    if config.schedule == "rsqrt":
        return peak / math.sqrt(max(step, warmup, 1))
    decay_start = _wsd_decay_start(config, total_steps) if config.schedule == "wsd" else warmup
    if step < warmup:
        return peak * (step + 1) / warmup
    if config.schedule == "constant" or step < decay_start:
        return peak
    if step >= total_steps:
        return config.min_learning_rate
    progress = (step - decay_start) / (total_steps - decay_start)
    if config.schedule == "cosine":
        remaining = 0.5 * (1.0 + math.cos(math.pi * progress))
    else:
        remaining = 1.0 - progress
    return config.min_learning_rate + (peak - config.min_learning_rate) * remaining


def _wsd_decay_start(config: OptimConfig, total_steps: int) -> int:
    """First step of the final decay."""
    assert config.decay_steps is not None, "the configuration's rules let no wsd pass without it"
    return total_steps - config.decay_steps
