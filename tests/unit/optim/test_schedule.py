"""Learning rates at chosen steps, and no jumps between the parts of a schedule."""

import math
from itertools import pairwise
from types import SimpleNamespace

import pytest

from megaswitch.optim.schedule import learning_rate


def rate(step, schedule, total=100, peak=1.0, warmup=10, floor=0.0, decay=None):
    config = SimpleNamespace(
        schedule=schedule,
        learning_rate=peak,
        warmup_steps=warmup,
        min_learning_rate=floor,
        decay_steps=decay,
    )
    return learning_rate(step, config, total)


def test_rsqrt_is_that_of_t5():
    steps = [0, 1, 9_999, 10_000, 40_000, 1_000_000]
    rates = [rate(step, "rsqrt", total=550_000, warmup=10_000) for step in steps]
    assert rates == pytest.approx([0.01, 0.01, 0.01, 0.01, 0.005, 0.001])
    assert rate(0, "rsqrt", warmup=0) == 1.0


@pytest.mark.parametrize(
    ("schedule", "options", "expected"),
    [
        ("constant", {}, {0: 0.2, 4: 1.0, 9: 2.0, 10: 2.0, 99: 2.0, 500: 2.0}),
        ("constant", {"warmup": 0}, {0: 2.0, 99: 2.0}),
        (
            "linear",
            {"floor": 0.2},
            {0: 0.2, 9: 2.0, 10: 2.0, 55: 1.1, 99: 0.22, 100: 0.2, 500: 0.2},
        ),
        (
            "cosine",
            {"floor": 0.2},
            {
                0: 0.2,
                10: 2.0,
                40: 0.2 + 0.9 * (1 + 0.5),
                55: 1.1,
                70: 0.2 + 0.9 * (1 - 0.5),
                100: 0.2,
                500: 0.2,
            },
        ),
        (
            "wsd",
            {"floor": 0.2, "decay": 20},
            {0: 0.2, 9: 2.0, 10: 2.0, 79: 2.0, 80: 2.0, 90: 1.1, 99: 0.29, 100: 0.2, 500: 0.2},
        ),
        ("wsd", {"decay": 90}, {9: 2.0, 10: 2.0, 55: 1.0}),
    ],
)
def test_values(schedule, options, expected):
    rates = {step: rate(step, schedule, peak=2.0, **options) for step in expected}
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["rsqrt", "constant", "linear", "cosine", "wsd"])
@pytest.mark.parametrize("warmup", [0, 50])
def test_no_jumps(schedule, warmup):
    rates = [rate(s, schedule, 1000, warmup=warmup, floor=0.1, decay=100) for s in range(1200)]
    jumps = [abs(b - a) for a, b in pairwise(rates)]
    # With no warm-up rsqrt falls steeply at first, by its definition.
    limit = 1 - math.sqrt(0.5) if schedule == "rsqrt" and warmup == 0 else 0.02
    assert max(jumps) <= limit + 1e-12
    assert min(rates) > 0


def test_a_run_shorter_than_its_warm_up_stays_on_the_ramp():
    assert rate(49, "cosine", total=50, warmup=100) == 0.5
    assert rate(100, "cosine", total=50, warmup=100, floor=0.1) == 0.1
