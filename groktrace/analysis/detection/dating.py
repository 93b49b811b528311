"""When changes of phase happen: midpoints with their intervals, edges, and levels."""

import math
from dataclasses import dataclass

import numpy as np

from groktrace.analysis.detection.changes import find_changes
from groktrace.analysis.detection.ramp import Ramp, fit_ramp
from groktrace.analysis.detection.segmentation import Data, Fit, draw_curves
from groktrace.analysis.detection.settings import DEFAULTS, DetectionSettings

# Rounds in which changes are fitted in turn, each beside the others; and how many snapshots to either side it takes.
SWEEPS = 3
REACH = 150


@dataclass(frozen=True)
class Measured:
    """A change that is dated.

    Attributes:
        first, last: index of the last point before it, and of the first after it.
        before, after: levels that it leads between.
        error: standard error of after − before.
        middle: abscissa of its midpoint.
        low, high: the midpoint's 90 % interval.
    """

    first: int
    last: int
    before: float
    after: float
    error: float
    middle: float
    low: float
    high: float


def measure_changes(fit: Fit, changes: list[tuple[int, int]], settings: DetectionSettings = DEFAULTS) -> list[Measured]:
    """Date and measure changes: by a ramp between two phases where that describes them, else by the pieces themselves.

    Pieces need not meet, so that they leave the edges of a ramp open; a ramp joined to its phases is dated better. Two
    changes that one ramp describes nearly as well are one, the same way or not: where pieces overshoot the corner of a
    ramp, a small change the other way lies beside it. So are a change and a phase beside it that moves the same way.

    Args:
        fit: of the curve.
        changes: first and last index of each.
        settings: how they are dated.
    """
    x, pending, changes = fit.data.x, list(changes), []
    while pending:
        first, last = pending.pop(0)
        if pending:
            both = first, pending[0][1]
            if _exceeds_its_error(fit, both) and _is_one_ramp(fit, both, changes, pending[1:], settings):
                pending[0] = both
                continue
        changes.append((first, last))
    changes = _widened(fit, changes, settings)
    price = math.log(len(x))
    ramps: list[Ramp | None] = [None] * len(changes)
    for _ in range(SWEEPS if len(changes) > 1 else 1):
        for i, (first, last) in enumerate(changes):
            window = max(first - REACH, 0), min(last + REACH, len(x) - 1)
            edges = [
                (x[a], x[b]) if ramp is None else ramp.edges
                for (a, b), ramp, j in zip(changes, ramps, range(len(changes)), strict=True)
                if j != i and b > window[0] and a < window[1]
            ]
            phases = _phases(fit, (first, last), changes[:i], changes[i + 1 :])
            sloped = tuple(
                bool(abs(a - b) > 2 and fit.value[a] != fit.value[b]) and not _within(a, b, changes)
                for a, b in ((phases[0], first), (last, phases[1]))
            )
            ramps[i] = fit_ramp(fit.data, (first, last), window, edges, sloped, settings)
    draws = None
    found = []
    for i, (change, ramp) in enumerate(zip(changes, ramps, strict=True)):
        first, last = change
        delta = float(fit.value[last] - fit.value[first])
        window = _phases(fit, change, changes[:i], changes[i + 1 :])
        fits = ramp.cost(price) <= fit.cost_within(window, settings.slope_price) + 2 * price
        # Where a phase's slope has carried the levels off, the pieces' own are better.
        near = max(abs(ramp.before - fit.value[first]), abs(ramp.after - fit.value[last])) < 0.5 * abs(delta)
        if fits and near and _is_measured(ramp, fit.data):
            levels = ramp.before, ramp.after, ramp.error
            # Edges lie between snapshots; a change begins no earlier than the one before it ends.
            begin = min(max(ramp.begin, found[-1].last if found else 0), ramp.end - 1)
            found.append(Measured(begin, ramp.end, *levels, ramp.middle, ramp.low, ramp.high))
            continue
        if draws is None:
            generator = np.random.default_rng(0)
            draws = draw_curves(fit.data, settings.draws, generator, settings.slope_price)
        done = (fit.value[first : last + 1] - fit.value[first]) / delta
        # The last point before the change has begun, the first after which it is done.
        onset = first + max(int(np.argmax(done > settings.edge)) - 1, 0)
        end = first + int(np.argmax(done >= 1 - settings.edge))
        error = math.sqrt(fit.variance[first] + fit.variance[last])
        dates = _date(fit, change, slice(window[0], window[1] + 1), *draws, settings)
        found.append(Measured(onset, end, float(fit.value[first]), float(fit.value[last]), error, *dates))
    return found


def _is_measured(ramp: Ramp, data: Data) -> bool:
    """Whether a ramp's change is no mere error, and no level of it lies beyond all points by more than theirs."""
    spread = 2 * np.sqrt(data.variance)
    low, high = float((data.value - spread).min()), float((data.value + spread).max())
    inside = all(low <= level <= high for level in (ramp.before, ramp.after))
    return inside and abs(ramp.after - ramp.before) > 2 * ramp.error


def _exceeds_its_error(fit: Fit, change: tuple[int, int]) -> bool:
    """Whether a change is no mere error, as that of a rise and the fall that undoes it is."""
    first, last = change
    return abs(fit.value[last] - fit.value[first]) > 2 * math.sqrt(fit.variance[first] + fit.variance[last])


def _widened(fit: Fit, changes: list[tuple[int, int]], settings: DetectionSettings = DEFAULTS) -> list[tuple[int, int]]:
    """The changes, with a phase beside one that moves its way where one ramp describes both nearly as well.

    Pieces need not meet: where a fall is fitted by a straight piece and a last jump, the jump alone is the steepest.
    """
    changes = list(changes)
    for i, (first, last) in enumerate(changes):
        before, after = changes[:i], changes[i + 1 :]
        low, high = _phases(fit, (first, last), before, after)
        for wide in ((low, last), (first, high)):
            share = (fit.value[wide[1]] - fit.value[wide[0]]) / (fit.value[last] - fit.value[first])
            if share > 1 and _is_one_ramp(fit, wide, before, after, settings):
                changes[i] = wide
                break
    return changes


def _is_one_ramp(
    fit: Fit,
    change: tuple[int, int],
    before: list[tuple[int, int]],
    after: list[tuple[int, int]],
    settings: DetectionSettings,
) -> bool:
    """Whether one ramp describes a change and the phases beside it nearly as well as the pieces of the fit do."""
    price, window = math.log(len(fit.value)), _phases(fit, change, before, after)
    ramp = fit_ramp(fit.data, change, window, settings=settings)
    return ramp.cost(price) <= fit.cost_within(window, settings.slope_price) + price


def _phases(
    fit: Fit, change: tuple[int, int], before: list[tuple[int, int]], after: list[tuple[int, int]]
) -> tuple[int, int]:
    """First and last index of a change and of the phases beside it, up to the changes before and after."""
    low = max((a for a, _ in fit.pieces() if a < change[0]), default=0)
    high = min((b for _, b in fit.pieces() if b > change[1]), default=len(fit.value) - 1)
    if before:
        low = max(low, before[-1][1])
    if after:
        high = min(high, after[0][0])
    return min(low, change[0]), max(high, change[1])


def _within(first: int, last: int, changes: list[tuple[int, int]]) -> bool:
    """Whether what lies between two points is part of a change."""
    return any(a <= first and last <= b for a, b in changes)


def _date(
    fit: Fit,
    change: tuple[int, int],
    window: slice,
    curves: np.ndarray,
    begins: np.ndarray,
    settings: DetectionSettings,
) -> tuple[float, float, float]:
    """Midpoint of a change, where the curve crosses its half level: the posterior's median, and its 90 % interval.

    Each draw has a change of its own, so that what is open of the levels, and of where a change that slows down is
    over, is open in the date too. Where the curve jumps between two snapshots, the crossing may be anywhere between
    them.

    Args:
        fit: of the curve.
        change: its first and last index.
        window: where draws may have their crossing.
        curves: drawn, [draws, T].
        begins: where their pieces begin, [draws, T].
        settings: what counts as a change.
    """
    x, (first, last) = fit.data.x, change
    sign = math.copysign(1.0, fit.value[last] - fit.value[first])
    half = 0.5 * (fit.value[first] + fit.value[last])
    starts = np.zeros(len(x), dtype=bool)
    starts[fit.starts] = True
    done = fit.value[None, first : last + 1]
    _, middle = _crossings(x[first : last + 1], sign * (done - half), starts[None, first : last + 1], np.array([0.5]))
    middle = float(middle[0])
    generator = np.random.default_rng(1)
    error = 0.5 * math.sqrt(fit.variance[first] + fit.variance[last])
    halves = half + error * generator.standard_normal(len(curves))
    for i, (curve, begin) in enumerate(zip(curves[:, window], begins[:, window], strict=True)):
        inside = first - window.start, last - window.start
        own = _own_change(x[window], curve, fit.variance[window], begin, inside, settings)
        if own is not None:
            halves[i] = 0.5 * (curve[own[0]] + curve[own[1]])
    places = generator.random(len(curves))
    draw, at = _crossings(x[window], sign * (curves[:, window] - halves[:, None]), begins[:, window], places)
    # Of several crossings of one draw, the one nearest to the midpoint.
    nearest: dict[int, float] = {}
    for i, crossing in zip(draw.tolist(), at.tolist(), strict=True):
        if i not in nearest or abs(crossing - middle) < abs(nearest[i] - middle):
            nearest[i] = crossing
    low, median, high = np.quantile([*nearest.values(), middle], [0.05, 0.5, 0.95])
    return float(median), float(low), float(high)


def _own_change(
    x: np.ndarray,
    curve: np.ndarray,
    variance: np.ndarray,
    begins: np.ndarray,
    change: tuple[int, int],
    settings: DetectionSettings = DEFAULTS,
) -> tuple[int, int] | None:
    """First and last index of a change as one drawn curve has it, in one part or several; None where it has none.

    Args:
        x: abscissa, [T].
        curve: drawn, [T].
        variance: of the fitted curve, [T].
        begins: where the drawn curve's pieces begin, [T].
        change: first and last index in the fitted curve.
        settings: what counts as a change.
    """
    starts = np.flatnonzero(begins)
    drawn = Fit(Data(x, curve, variance), curve, variance, [0, *starts[starts > 0].tolist()], 0.0)
    sign = curve[change[1]] - curve[change[0]]
    found = find_changes(drawn, settings)
    parts = [(a, b) for a, b in found if (curve[b] - curve[a]) * sign > 0 and a < change[1] and b > change[0]]
    return (parts[0][0], parts[-1][1]) if parts else None


def _crossings(
    x: np.ndarray, height: np.ndarray, begins: np.ndarray, places: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Where curves pass upwards through zero: the curves' numbers and the abscissae, [crossings] each.

    Args:
        x: abscissa, [T].
        height: of the curves, [curves, T].
        begins: where their pieces begin, [curves, T].
        places: where between two snapshots each curve jumps, from 0 to 1, [curves].
    """
    curve, j = np.nonzero((height[:, :-1] < 0) & (height[:, 1:] >= 0))
    below, above = height[curve, j], height[curve, j + 1]
    share = np.where(begins[curve, j + 1], places[curve], -below / (above - below))
    return curve, x[j] + share * (x[j + 1] - x[j])
