"""Sequential tests for a fall: at each snapshot a number, from what was seen so far, that an announcement waits for."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from groktrace.analysis.detection.early_warning import last_slope
from groktrace.analysis.detection.settings import WARNING

# Standard deviation of the logarithm where a line begins.
LEVELS = 0.05


@dataclass(frozen=True, eq=False)
class Signal:
    """The logarithm of something that is measured while a network trains.

    Attributes:
        x: logarithm of the steps, [T].
        y: logarithm of what is measured, [T]; NaN where it is not known.
        error: standard error of y, [T]; zeros where there is none.
        begun: index of the first snapshot that may be announced at.
    """

    x: np.ndarray
    y: np.ndarray
    error: np.ndarray
    begun: int

    @property
    def known(self) -> np.ndarray:
        """Indices of the snapshots that may be used."""
        return self.begun + np.flatnonzero(np.isfinite(self.y[self.begun :]))


class Test(Protocol):
    """A sequential test."""

    def statistics(self, signal: Signal) -> np.ndarray:
        """How much speaks for a fall at each snapshot, by that and those before alone, [T]; −∞ where nothing is known.

        Args:
            signal: what is tested.
        """
        ...


@dataclass(frozen=True)
class Cusum:
    """The largest fall from an earlier snapshot, less what a drift explains (Page 1954).

    Attributes:
        drift: fall of the logarithm for each e-fold of the training.
    """

    drift: float

    def statistics(self, signal: Signal) -> np.ndarray:
        """See `Test`."""
        known = signal.known
        level = signal.y[known] + self.drift * signal.x[known]
        found = np.full(len(signal.y), -np.inf)
        found[known[1:]] = np.maximum.accumulate(level)[:-1] - level[1:]
        return found


@dataclass(frozen=True)
class Slope:
    """How fast the logarithm falls for each e-fold of the training, over its last part; the lower bound of that.

    Attributes:
        window: of the logarithm of the steps.
        errors: standard errors that are taken off.
    """

    window: float
    errors: float

    def statistics(self, signal: Signal) -> np.ndarray:
        """See `Test`."""
        known = signal.known
        x, y, variance = signal.x[known], signal.y[known], signal.error[known] ** 2 + WARNING.jitter**2
        found = np.full(len(signal.y), -np.inf)
        for i in range(len(known)):
            fit = last_slope(x[: i + 1], y[: i + 1], variance[: i + 1], self.window)
            if fit is not None:
                found[known[i]] = -fit[0] - self.errors * fit[1]
        return found


@dataclass(frozen=True)
class OnlineChangePoints:
    """The log odds of a fall by Bayesian online change points (Adams and MacKay 2007).

    Between change points the logarithm is a straight line in log steps, whose slope is normal about zero.

    Attributes:
        rate: fall for each e-fold beyond which it counts.
        hazard: probability of a change point at a snapshot.
        slopes: standard deviation of slopes.
    """

    rate: float
    hazard: float
    slopes: float = 0.3

    def statistics(self, signal: Signal) -> np.ndarray:
        """See `Test`."""
        known = signal.known
        found = np.full(len(signal.y), -np.inf)
        if not len(known):
            return found
        x, y, variance = signal.x[known], signal.y[known], signal.error[known] ** 2 + WARNING.jitter**2
        # By the start of the current line: its log weight, level now, slope, and their variances and covariance.
        weight, level, slope = np.zeros(1), y[:1].copy(), np.zeros(1)
        var, cov, var_slope = np.full(1, LEVELS**2), np.zeros(1), np.full(1, self.slopes**2)
        for i in range(1, len(known)):
            step = x[i] - x[i - 1]
            level, var = level + slope * step, var + 2 * cov * step + var_slope * step**2
            cov = cov + var_slope * step
            weight = np.append(weight + math.log1p(-self.hazard), math.log(self.hazard))
            level, slope, cov = np.append(level, y[i - 1]), np.append(slope, 0.0), np.append(cov, 0.0)
            var, var_slope = np.append(var, LEVELS**2), np.append(var_slope, self.slopes**2)
            total, off = var + variance[i], y[i] - level
            weight = weight - 0.5 * (np.log(total) + off**2 / total)
            weight -= np.logaddexp.reduce(weight)
            level, slope = level + var / total * off, slope + cov / total * off
            var_slope, cov, var = var_slope - cov**2 / total, cov * variance[i] / total, var * variance[i] / total
            z = (-slope - self.rate) / np.sqrt(np.maximum(var_slope, 1e-12))
            falls = float(np.exp(weight) @ [0.5 * math.erfc(-value / math.sqrt(2)) for value in z])
            found[known[i]] = math.log(max(falls, 1e-12)) - math.log(max(1 - falls, 1e-12))
        return found


def tests() -> Iterator[Test]:
    """All that are tried; which, and at what threshold, is decided on runs that they are not judged on."""
    for drift in (0.0, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0):
        yield Cusum(drift)
    for window in (0.2, 0.4, 0.6, 0.8):
        for errors in (0.0, 1.0, 2.0, 3.0):
            yield Slope(window, errors)
    for rate in (0.0, 0.05, 0.1, 0.2):
        for hazard in (0.01, 0.1):
            yield OnlineChangePoints(rate, hazard)
