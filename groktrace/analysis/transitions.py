"""Phase transitions of a trajectory: weighted segmentation, then the rises and falls that are significant."""

import itertools
import math
import statistics
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from groktrace.analysis.trajectory import Trajectory

# A change counts from this fraction of the curve's largest level on, however small its error; below it a slow drift of
# the curvature, or of the sampler, would do.
MIN_CHANGE = 0.05
SIGNIFICANCE = 0.01
# A fall is read as generalisation only from this fraction of the level before: networks that merely lose weight norm
# after memorising fall by up to a tenth.
MIN_GENERALISATION = 0.15
# Where within a change its onset and its end are put.
EDGE = 0.05
MIN_POINTS = 5


@dataclass(frozen=True)
class Transition:
    """A change of phase.

    Attributes:
        kind: "complexification" (λ rises) or "simplification" (λ falls).
        label: "memorisation", "generalisation", or None where the evidence allows neither.
        step: the midpoint, where half of the change is done.
        step_low, step_high: 90 % interval of the midpoint.
        onset, end: the steps between which the change happens, less a twentieth of it at either end.
        llc_before, llc_after: fitted λ at the extremes that the change leads between.
        delta_llc: llc_after − llc_before.
        stderr: standard error of delta_llc.
        evidence: one sentence on what the label rests on.
    """

    kind: str
    label: str | None
    step: int
    step_low: int
    step_high: int
    onset: int
    end: int
    llc_before: float
    llc_after: float
    delta_llc: float
    stderr: float
    evidence: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Fit:
    """A piecewise linear fit.

    Attributes:
        value: fitted value at each point, [T].
        variance: its variance at each point, [T].
        starts: first index of each piece.
    """

    value: np.ndarray
    variance: np.ndarray
    starts: list[int]


def find_transitions(trajectory: Trajectory) -> list[Transition]:
    """The significant rises and falls of λ along a run, in step order.

    The curve is the centred estimate λ_c where every point has it (it holds off a minimum too), else λ̂. It is fitted by
    linear pieces with the least penalised χ²; of the fit, the rises and falls are kept that exceed both 5 % of the
    largest level and their own error at the 1 % level, corrected for the number of points.

    Args:
        trajectory: with at least five usable points; with fewer, nothing can be said and the list is empty.
    """
    position, value, error = _curve(trajectory)
    if len(value) < MIN_POINTS:
        return []
    variance = error**2 + _roughness(value, error) ** 2
    fit = segment(value, variance)
    least = MIN_CHANGE * float(np.max(np.abs(fit.value)))
    steps = trajectory.column("step")[position].astype(int)
    quantile = statistics.NormalDist().inv_cdf(1 - SIGNIFICANCE / (2 * len(value)))
    return [
        _describe(trajectory, steps, position, fit, first, last)
        for first, last in _swings(fit.value, fit.variance, least, quantile)
    ]


def segment(value: np.ndarray, variance: np.ndarray) -> Fit:
    """The partition into linear pieces that minimises χ² + 3·log(T) a piece, exactly, by dynamic programming.

    Three parameters a piece (two of its line, one of its place), each at BIC's price (Killick et al. 2012 for the
    recursion). The points' order, not their steps, is the abscissa, so that log-spaced snapshots are treated as they
    were meant.

    Args:
        value: [T].
        variance: of each value, positive, [T].
    """
    count = len(value)
    centre = np.average(value, weights=1 / variance)
    x, y, w = np.arange(count, dtype=float) - count / 2, value - centre, 1 / variance
    sums = [np.concatenate([[0.0], np.cumsum(term)]) for term in (w, w * x, w * x * x, w * y, w * x * y, w * y * y)]
    best = np.zeros(count + 1)
    previous = np.zeros(count + 1, dtype=int)
    best[1] = np.inf
    penalty = 3 * math.log(count)
    for end in range(2, count + 1):
        starts = np.arange(0, end - 1)
        *_, chi2 = _line([total[end] - total[starts] for total in sums])
        costs = best[starts] + chi2 + penalty
        previous[end] = starts[np.argmin(costs)]
        best[end] = costs[previous[end]]
    bounds = [count]
    while bounds[-1]:
        bounds.append(int(previous[bounds[-1]]))
    bounds.reverse()
    fitted, spread = np.empty(count), np.empty(count)
    for start, end in itertools.pairwise(bounds):
        piece = [total[end] - total[start] for total in sums]
        level, slope, middle, _ = _line(piece)
        offset = x[start:end] - middle
        curvature = piece[2] - piece[1] * middle
        fitted[start:end] = centre + level + slope * offset
        spread[start:end] = 1 / piece[0] + (offset**2 / curvature if curvature > 0 else 0.0)
    return Fit(fitted, spread, bounds[:-1])


def _line(sums: list[Any]) -> tuple[Any, Any, Any, Any]:
    """Level at the mean abscissa, slope, mean abscissa and χ² of weighted straight lines, from their moments."""
    w, wx, wxx, wy, wxy, wyy = sums
    middle = wx / w
    level = wy / w
    sxx = np.maximum(wxx - wx * middle, 1e-300)
    sxy = wxy - wx * level
    slope = sxy / sxx
    return level, slope, middle, np.maximum(wyy - wy * level - slope * sxy, 0.0)


def _curve(trajectory: Trajectory) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Indices of the usable points, their λ and its standard error."""
    value, error = trajectory.column("llc_centred"), trajectory.column("stderr_centred")
    usable = np.isfinite(trajectory.column("llc"))
    if not len(value) or not np.isfinite(value[usable]).all():
        value, error = trajectory.column("llc"), trajectory.column("stderr")
        # λ̂ off a minimum measures the slope, not the basin.
        usable &= trajectory.column("reliable") > 0
    usable &= np.isfinite(value) & np.isfinite(error)
    position = np.flatnonzero(usable)
    return position, value[position], error[position]


def _roughness(value: np.ndarray, error: np.ndarray) -> float:
    """Standard deviation of the training's own jitter: what second differences show beyond the sampling error."""
    second = value[2:] - 2 * value[1:-1] + value[:-2]
    # Median absolute deviation; a second difference of white noise has six times its variance.
    seen = (1.4826 * float(np.median(np.abs(second)))) ** 2 / 6
    floor = 1e-6 * float(np.max(np.abs(value))) + 1e-12
    return math.sqrt(max(seen - float(np.median(error**2)), floor**2))


def _swings(value: np.ndarray, variance: np.ndarray, least: float, quantile: float) -> list[tuple[int, int]]:
    """Alternating rises and falls between extremes of the fit, each at least `least` and significant."""
    extremes = [0]
    candidate = 0
    direction = 0

    def counts(a: int, b: int) -> bool:
        size = abs(value[b] - value[a])
        return size >= least and size >= quantile * math.sqrt(variance[a] + variance[b])

    lowest = highest = 0
    for i in range(1, len(value)):
        if direction == 0:
            lowest, highest = (i if value[i] < value[lowest] else lowest), (i if value[i] > value[highest] else highest)
            if highest == i and counts(lowest, i):
                extremes, candidate, direction = [lowest], i, 1
            elif lowest == i and counts(highest, i):
                extremes, candidate, direction = [highest], i, -1
        elif direction * (value[i] - value[candidate]) > 0:
            candidate = i
        elif counts(candidate, i):
            extremes.append(candidate)
            candidate, direction = i, -direction
    return [*zip(extremes, [*extremes[1:], candidate], strict=True)] if direction else []


def _describe(
    trajectory: Trajectory, steps: np.ndarray, position: np.ndarray, fit: Fit, first: int, last: int
) -> Transition:
    """Place and label the change between two extremes of the fit."""
    before, after = float(fit.value[first]), float(fit.value[last])
    change = after - before
    done = (fit.value[first : last + 1] - before) / change
    error = math.sqrt(fit.variance[first] + fit.variance[last])
    # The midpoint lies where the curve crosses its half level, which is known to 1.645 errors at 90 %.
    slack = 1.645 * math.sqrt(error**2 / 4 + float(np.median(fit.variance[first : last + 1]))) / abs(change)
    middle = _crossing(steps[first : last + 1], done, 0.5)
    below = np.flatnonzero(done <= 0.5 - slack)
    above = np.flatnonzero(done >= 0.5 + slack)
    low = int(steps[first + below[below <= np.argmax(done >= 0.5)][-1]]) if len(below) else int(steps[first])
    high = int(steps[first + above[above >= np.argmax(done >= 0.5)][0]]) if len(above) else int(steps[last])
    kind = "complexification" if change > 0 else "simplification"
    # The last point before the change has begun, the first after which it is done.
    begun, ended = int(np.argmax(done > EDGE)), int(np.argmax(done >= 1 - EDGE))
    onset, end = int(steps[first + max(begun - 1, 0)]), int(steps[first + ended])
    label, evidence = _label(trajectory, position[first + max(begun - 1, 0)], position[first + ended], before, after)
    return Transition(
        kind, label, middle, min(low, middle), max(high, middle), onset, end, before, after, change, error, evidence
    )


def _crossing(steps: np.ndarray, done: np.ndarray, level: float) -> int:
    """Step at which `done` first passes `level`, interpolated between snapshots."""
    i = int(np.argmax(done >= level))
    if i == 0:
        return int(steps[0])
    share = (level - done[i - 1]) / (done[i] - done[i - 1])
    return round(float(steps[i - 1] + share * (steps[i] - steps[i - 1])))


def _label(trajectory: Trajectory, onset: int, end: int, before: float, after: float) -> tuple[str | None, str]:
    """What the training loss allows to say of a change, and whether validation data agree."""
    loss = trajectory.column("train_loss")
    if not np.isfinite(loss[[onset, end]]).all():
        return None, "no label: the training loss is not known"
    low = np.nanmin(loss) + 0.1 * (np.nanmax(loss) - np.nanmin(loss))
    if after > before:
        if loss[end] < 0.5 * loss[onset]:
            return "memorisation", f"λ rises while the training loss falls from {loss[onset]:.3g} to {loss[end]:.3g}"
        return None, "no label: λ rises, but the training loss does not fall with it"
    if np.nanmax(loss[onset : end + 1]) > low:
        return None, "no label: λ falls while the training loss is not yet low"
    share = 1 - after / before if before > 0 else 0.0
    if share < MIN_GENERALISATION:
        return None, f"no label: λ falls by only {100 * share:.0f} % while the training loss stays low"
    evidence = f"λ falls by {100 * share:.0f} % while the training loss stays low"
    accuracy = trajectory.column("val_accuracy")
    if np.isfinite(accuracy[end]) and np.isfinite(accuracy).any():
        start = np.nanmin(accuracy[: onset + 1]) if np.isfinite(accuracy[: onset + 1]).any() else math.nan
        verb = "confirms" if accuracy[end] >= start + 0.2 else "contradicts"
        evidence += f"; validation {verb}: accuracy {start:.2f} before, {accuracy[end]:.2f} at its end"
    return "generalisation", evidence
