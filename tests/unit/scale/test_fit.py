"""Fits recover what was planted, and say how sure they are."""

import numpy as np
import pytest

from megaswitch.log import UserError
from megaswitch.scale.fit import fit_power_law


def planted(a, b, noise, seeds, draw):
    x = np.repeat([1, 2, 4, 8, 16, 32, 64], seeds)
    y = a * x**-b * np.exp(noise * draw.standard_normal(len(x)))
    return x.tolist(), y.tolist()


def test_an_exact_law_is_found_exactly():
    law = fit_power_law(*planted(5.0, 0.07, 0.0, 1, np.random.default_rng(0)))
    assert law.a == pytest.approx(5.0, rel=1e-12)
    assert law.b == pytest.approx(0.07, rel=1e-12)
    assert law.residual < 1e-12
    assert law.b_interval == pytest.approx((0.07, 0.07), rel=1e-9)
    assert law.at(16) == pytest.approx(5.0 * 16**-0.07)


@pytest.mark.parametrize("seeds", [1, 3])
def test_intervals_hold_the_planted_law_about_as_often_as_they_say(seeds):
    draw = np.random.default_rng(1)
    hits = np.zeros(2)
    for _ in range(60):
        law = fit_power_law(*planted(5.0, 0.07, 0.01, seeds, draw))
        low, high = law.b_interval
        hits += [low <= 0.07 <= high, law.a_interval[0] <= 5.0 <= law.a_interval[1]]
        assert low < law.b < high
    # Few points make the bootstrap's 95% somewhat too narrow; it must not be far off.
    assert (hits >= 60 * 0.8).all()
    assert law.points == 7 * seeds


def test_more_seeds_narrow_the_interval():
    draw = np.random.default_rng(2)
    widths = []
    for seeds in (1, 16):
        low, high = fit_power_law(*planted(3.0, 0.1, 0.02, seeds, draw)).b_interval
        widths.append(high - low)
    assert widths[1] < widths[0] / 2


def test_the_same_points_give_the_same_interval():
    points = planted(3.0, 0.1, 0.02, 2, np.random.default_rng(3))
    assert fit_power_law(*points) == fit_power_law(*points)


WRONG = [([1, 2], [3, 2]), ([1, 1, 2], [3, 2, 1]), ([1, 2, 0], [1, 1, 1]), ([1, 2, 3], [1, 1, -1])]


@pytest.mark.parametrize("points", WRONG)
def test_what_has_no_law_is_refused(points):
    with pytest.raises(UserError, match="at least three different positive x"):
        fit_power_law(*points)
