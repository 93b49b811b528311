"""A fall of λ that has just begun: less than a transition, which takes longer to tell from a bend, and earlier."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from groktrace.analysis.detection.settings import DEFAULTS, WARNING
from groktrace.analysis.results.trajectory import Trajectory
from groktrace.records import Record


@dataclass(frozen=True)
class EarlyWarning(Record):
    """λ has begun to fall while the training loss is low.

    Attributes:
        step: of the last snapshot.
        rate: by how much log λ falls for each e-fold of the training, over its last 45 %.
        stderr: standard error of that.
        threshold: how fast it falls in networks that only memorise.
        kind: what kind of news this is.
    """

    step: int
    rate: float
    stderr: float
    threshold: float = WARNING.rate
    kind: Literal["warning"] = "warning"

    @property
    def is_significant(self) -> bool:
        """Whether it falls faster than in networks that only memorise."""
        return self.rate - WARNING.errors * self.stderr > self.threshold


def last_fall(trajectory: Trajectory) -> EarlyWarning | None:
    """How fast λ falls at the last snapshot, from training data alone.

    Args:
        trajectory: up to that snapshot.

    Returns:
        The rate; None before the training loss is low, where fewer than four snapshots since then can be used, on other
        data than those that were trained on, and at one nβ where the largest curvature has halved: under cross-entropy
        it does, and λ then falls whether or not the network generalises.
    """
    step, loss, curve = trajectory.column("step"), trajectory.column("train_loss"), trajectory.curve
    low = np.flatnonzero(loss <= DEFAULTS.low_loss * np.fmax.accumulate(loss))
    if trajectory.data is not None or not len(low) or not np.isfinite(curve.value[-1]):
        return None
    curvature = np.array([point.diagnostics.get("top_curvature") or np.nan for point in trajectory.points])
    # The lower of the last two, as it may spring up for a snapshot.
    lowest, most = np.fmin.reduce(curvature[-2:]), np.fmax.reduce(curvature)
    if not trajectory.follows_curvature and lowest < DEFAULTS.curvature_fall * most:
        return None
    since = np.arange(low[0], len(step))
    used = since[curve.value[since] > 0]
    value = curve.value[used]
    error = curve.error[used] * np.where(curve.doubtful[used], DEFAULTS.doubt_factor, 1.0)
    x = np.log1p(step / np.diff(step).min(initial=math.inf))
    found = last_slope(x[used], np.log(value), (error / value) ** 2 + WARNING.jitter**2, WARNING.window)
    threshold = WARNING.rate_following if trajectory.follows_curvature else WARNING.rate
    return None if found is None else EarlyWarning(int(step[-1]), -found[0], found[1], threshold)


def last_slope(x: np.ndarray, y: np.ndarray, variance: np.ndarray, window: float) -> tuple[float, float] | None:
    """Slope of the straight line through the last points, and its standard error.

    Args:
        x: ascending, [T].
        y: [T].
        variance: of y, [T].
        window: how far x reaches back.

    Returns:
        Both; None where there are fewer than four points, or they reach back by less than half of the window.
    """
    first = int(np.searchsorted(x, x[-1] - window)) if len(x) else 0
    x, y, weight = x[first:], y[first:], 1 / variance[first:]
    if len(x) < WARNING.min_points or x[-1] - x[0] < window / 2:
        return None
    dx = x - weight @ x / weight.sum()
    spread = float(weight @ dx**2)
    return float(weight @ (dx * y)) / spread, 1 / math.sqrt(spread)
