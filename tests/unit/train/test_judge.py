"""Which steps may change the weights."""

import math
from dataclasses import replace

import pytest

from megaswitch.checkpoint.manager import TrainState
from megaswitch.config import FaultConfig
from megaswitch.train.judge import Judge

START = TrainState(0, 0, "")
CALM = replace(START, recent=[3.0 + 0.01 * (i % 5) for i in range(20)])


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (2.0, math.nan)])
def test_what_is_not_finite_is_bad(loss, norm):
    judge = Judge(FaultConfig(skip=2, rewinds=1))
    verdicts = []
    state = START
    for _ in range(4):
        verdicts.append(judge.verdict(state, loss, norm))
        state = judge.after(state, 8, loss, good=False)
    assert verdicts == ["skip", "skip", "rewind", "rewind"]
    assert (state.step, state.samples, state.left_out, state.row, state.bad_steps) == (
        *(4, 32, 32, 4, 4),
    )
    assert judge.verdict(replace(state, rewinds=1), loss, norm) == "stop"
    assert judge.after(state, 8, 2.0, good=True).row == 0
    assert Judge(FaultConfig()).verdict(START, loss, norm) == "stop"


def test_a_spike_stands_out_of_its_window():
    judge = Judge(FaultConfig(spike=6.0))
    assert judge.verdict(CALM, 3.1, 1.0) == "good"
    assert judge.verdict(CALM, 4.0, 1.0) == "spike"
    assert judge.verdict(CALM, -4.0, 1.0) == "good"  # a fall is none
    assert judge.verdict(replace(CALM, recent=CALM.recent[:7]), 400.0, 1.0) == "good"
    assert Judge(FaultConfig()).verdict(CALM, 400.0, 1.0) == "good"
    bad = Judge(FaultConfig(spike=6.0, spike_action="bad", skip=1))
    assert bad.verdict(CALM, 4.0, 1.0) == "skip"
    assert "median loss of recent steps is 3.02" in bad.why(CALM, 4.0, 1.0)


def test_a_spike_does_not_move_what_it_is_compared_with():
    judge = Judge(FaultConfig(spike=6.0, spike_window=8, spike_action="bad", skip=100))
    state = judge.after(CALM, 8, 900.0, good=False)
    assert state.recent == CALM.recent
    for _ in range(20):
        state = judge.after(state, 8, 3.0, good=True)
    assert state.recent == [3.0] * 8
    assert judge.verdict(state, 3.1, 1.0) == "good"  # deviations are at least a hundredth


def test_a_run_that_looks_for_no_spikes_keeps_no_losses():
    assert Judge(FaultConfig()).after(START, 8, 3.0, good=True).recent == []
