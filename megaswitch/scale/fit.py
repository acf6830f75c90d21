"""Power laws through measured points, with intervals by the bootstrap.

loss = a · x^-b, a straight line in logarithms, fitted by least squares. Kaplan et al. 2020 is the
source of the form. The interval comes from fits to the fitted line plus residuals drawn anew with
replacement, which are made larger by √(n / (n - 2)) as a fit of two numbers makes them smaller.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megaswitch.log import UserError

_DRAWS = 2000
_INTERVAL = 0.95

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class PowerLaw:
    """A fit of y = a · x^-b.

    Attributes:
        a: y at x = 1.
        b: the exponent; positive where y falls.
        a_interval: 95% of the bootstrap's values, lowest and highest.
        b_interval: likewise.
        residual: root mean square of what the fit leaves of ln y.
        points: how many it went through.
    """

    a: float
    b: float
    a_interval: tuple[float, float]
    b_interval: tuple[float, float]
    residual: float
    points: int

    def at(self, x: float) -> float:
        """The fitted y."""
        return float(self.a * x**-self.b)

    @property
    def text(self) -> str:
        """In one line."""
        low, high = self.b_interval
        first, last = self.a_interval
        return (
            f"{self.a:.4g} · x^-{self.b:.4f}   (a in [{first:.4g}, {last:.4g}], b in "
            f"[{low:.4f}, {high:.4f}] with 95%; rms residual {self.residual:.4f} in ln y)"
        )


def fit_power_law(x: Sequence[float], y: Sequence[float], *, seed: int = 0) -> PowerLaw:
    """Fit points; several with the same x are seeds of one thing.

    Raises:
        UserError: fewer than three different x, or a number that has no logarithm.
    """
    if len(set(x)) < 3 or min(x) <= 0 or min(y) <= 0:
        raise UserError(
            f"a power law needs at least three different positive x, each with a positive y, but x "
            f"is {sorted(set(x))}; run more jobs, or leave out [fit]"
        )
    logs = np.log(np.asarray(x, dtype=np.float64)), np.log(np.asarray(y, dtype=np.float64))
    line = _line(*logs)
    fitted = line[0] + line[1] * logs[0]
    left = logs[1] - fitted
    draws = np.random.default_rng(seed)
    wide = left * np.sqrt(len(x) / (len(x) - 2))
    again = np.array(
        [_line(logs[0], fitted + draws.choice(wide, len(x))) for _ in range(_DRAWS)]
    )  # fmt: skip
    ends = [(1 - _INTERVAL) / 2, (1 + _INTERVAL) / 2]
    a, b = np.quantile(np.exp(again[:, 0]), ends), np.quantile(-again[:, 1], ends)
    return PowerLaw(
        a=float(np.exp(line[0])),
        b=float(-line[1]),
        a_interval=(float(a[0]), float(a[1])),
        b_interval=(float(b[0]), float(b[1])),
        residual=float(np.sqrt(np.mean(left**2))),
        points=len(x),
    )


def _line(x: Floats, y: Floats) -> Floats:
    """Intercept and slope by least squares."""
    centred = x - x.mean()
    slope = (centred * y).sum() / (centred**2).sum()
    return np.array([y.mean() - slope * x.mean(), slope])
