"""Phase transitions of a trajectory: what stands out from the phases of a piecewise fit, dated and labelled."""

import itertools
import math
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from groktrace.analysis.llc import OFF_MINIMUM
from groktrace.analysis.segmentation import EDGE, Fit, Ramp, draw_curves, fit_ramp, segment, straight_cost
from groktrace.analysis.trajectory import Trajectory

# A change counts from this fraction of the curve's largest level on, however small its error; below it a slow drift of
# the curvature, or of the sampler, would do.
MIN_CHANGE = 0.05
SIGNIFICANCE = 0.01
# Errors by which the lines on either side of a break differ where the curve jumps.
JUMP = 3.0
# A phase drifts at less than this fraction of the rate of the transition beside it.
DRIFT = 0.25
# A fall is read as generalisation only from this fraction of the level before: networks that merely lose weight norm
# after memorising fall by up to a tenth.
MIN_GENERALISATION = 0.15
MIN_POINTS = 5
# A curve that one straight line describes nearly as well, in units of log(T), drifts and has no transition.
DRIFT_FAVOUR = 3.0
DRAWS = 400
# Rounds in which changes are fitted in turn, each beside the others; and how many snapshots to either side it takes.
SWEEPS = 3
REACH = 150
# A fall of λ is no evidence where the largest curvature has fallen below this fraction of what it was.
MIN_CURVATURE = 0.5
# Standard errors of unreliable snapshots count as so many times larger.
DOUBT = 3.0


@dataclass(frozen=True)
class Transition:
    """A change of phase.

    Attributes:
        kind: "complexification" (λ rises) or "simplification" (λ falls).
        label: "memorisation", "generalisation", or None where the evidence allows neither.
        step: the midpoint, where half of the change is done.
        step_low, step_high: 90 % interval of the midpoint.
        onset, end: the steps between which the change happens, less a twentieth of it at either end.
        llc_before, llc_after: fitted λ of the phases that the change leads between.
        delta_llc: llc_after − llc_before.
        stderr: standard error of delta_llc.
        delta_free_energy: ΔF = n·ΔL + Δλ·log n, L the training loss at onset and end (negative favours what comes
            after); None where n or L is not known.
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
    delta_free_energy: float | None = None
    evidence: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class _Axis:
    """Training steps as abscissa, or the logarithm of them, in units of the least gap between snapshots."""

    gap: float
    logarithmic: bool

    def of(self, steps: np.ndarray) -> np.ndarray:
        return np.log1p(steps / self.gap) if self.logarithmic else steps / self.gap

    def step(self, x: float) -> int:
        return round(self.gap * (math.expm1(x) if self.logarithmic else x))


def usable_points(trajectory: Trajectory) -> int:
    """How many snapshots the search for transitions can use; below five nothing can be said.

    Args:
        trajectory: λ̂ along a run.
    """
    return len(_curve(trajectory)[0])


def find_transitions(trajectory: Trajectory) -> list[Transition]:
    """The transitions of λ along a run, in step order.

    The curve is the centred estimate λ_c where every point has it (it holds off a minimum too), else λ̂. It is fitted
    by flat and straight pieces, on the step axis or its logarithm, whichever costs less. Rises and falls of the fit are
    kept that exceed both 5 % of the largest level and their own error at the 1 % level, corrected for the number of
    points, and that stand out from a phase beside them: a curve that drifts throughout has no transition. Intervals of
    midpoints come from draws of the fit's posterior.

    Args:
        trajectory: with at least five usable points; with fewer, nothing can be said and the list is empty.
    """
    position, value, error = _curve(trajectory)
    if len(value) < MIN_POINTS:
        return []
    steps = trajectory.column("step")[position]
    variance = error**2 + _roughness(value, error) ** 2
    axes = [_Axis(float(np.diff(steps).min()), logarithmic) for logarithmic in (False, True)]
    fits = [segment(axis.of(steps), value, variance) for axis in axes]
    axis, fit = min(zip(axes, fits, strict=True), key=lambda pair: pair[1].cost)
    x = axis.of(steps)
    straight = min(straight_cost(axis.of(steps), value, variance) for axis in axes)
    if straight <= fit.cost + DRIFT_FAVOUR * math.log(len(x)):
        return []
    changes = _changes(x, fit)
    if not changes:
        return []
    return [
        _describe(trajectory, steps.astype(int), position, measured, axis)
        for measured in _measure(x, value, variance, fit, changes)
    ]


@dataclass(frozen=True)
class _Measured:
    """A change: its place among the snapshots, its levels, and where its midpoint is, as abscissae."""

    first: int
    last: int
    before: float
    after: float
    error: float
    middle: float
    low: float
    high: float


def _measure(
    x: np.ndarray, value: np.ndarray, variance: np.ndarray, fit: Fit, changes: list[tuple[int, int]]
) -> list[_Measured]:
    """Date and measure changes: by a ramp between two phases where that describes them, else by the pieces themselves.

    Pieces need not meet, so that they leave the edges of a ramp open; a ramp joined to its phases is dated better. Two
    changes the same way that one ramp describes as well are one.
    """
    price = math.log(len(x))
    pending, changes = list(changes), []
    while pending:
        first, last = pending.pop(0)
        if pending and (fit.value[last] > fit.value[first]) == (fit.value[pending[0][1]] > fit.value[pending[0][0]]):
            both = first, pending[0][1]
            window = _phases(fit, both, changes, pending[1:])
            ramp = fit_ramp(x, value, variance, both, window)
            if ramp.cost(price) <= fit.cost_within(value, variance, window):
                pending[0] = both
                continue
        changes.append((first, last))
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
            ramps[i] = fit_ramp(x, value, variance, (first, last), window, edges, sloped)
    draws = None
    found = []
    for i, (change, ramp) in enumerate(zip(changes, ramps, strict=True)):
        first, last = change
        delta = float(fit.value[last] - fit.value[first])
        window = _phases(fit, change, changes[:i], changes[i + 1 :])
        fits = ramp.cost(price) <= fit.cost_within(value, variance, window) + 2 * price
        # Where a phase's slope has carried the levels off, the pieces' own are better.
        near = max(abs(ramp.before - fit.value[first]), abs(ramp.after - fit.value[last])) < 0.5 * abs(delta)
        if fits and near:
            levels = ramp.before, ramp.after, ramp.error
            found.append(_Measured(ramp.begin, ramp.end, *levels, ramp.middle, ramp.low, ramp.high))
            continue
        if draws is None:
            draws = draw_curves(x, value, variance, DRAWS, np.random.default_rng(0))
        done = (fit.value[first : last + 1] - fit.value[first]) / delta
        # The last point before the change has begun, the first after which it is done.
        onset, end = first + max(int(np.argmax(done > EDGE)) - 1, 0), first + int(np.argmax(done >= 1 - EDGE))
        error = math.sqrt(fit.variance[first] + fit.variance[last])
        dates = _date(x, fit, change, slice(window[0], window[1] + 1), *draws)
        found.append(_Measured(onset, end, float(fit.value[first]), float(fit.value[last]), error, *dates))
    return found


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


def _changes(x: np.ndarray, fit: Fit) -> list[tuple[int, int]]:
    """First and last index of each change that is large, significant and stands out from a phase beside it."""
    least = MIN_CHANGE * float(np.max(np.abs(fit.value)))
    quantile = statistics.NormalDist().inv_cdf(1 - SIGNIFICANCE / (2 * len(x)))

    def counts(first: int, last: int) -> bool:
        size = abs(fit.value[last] - fit.value[first])
        return size >= least and size >= quantile * math.sqrt(fit.variance[first] + fit.variance[last])

    swings = _swings(fit.value, counts)
    if not swings:
        return []
    # What comes before the first and after the last is part of their phases.
    swings[0] = (0, swings[0][1])
    swings[-1] = (swings[-1][0], len(x) - 1)
    found = []
    for first, last in swings:
        changes = _stand_out(x, fit.value, _moves(fit, first, last), least)
        if changes != [(0, len(x) - 1)]:  # else the curve drifts throughout
            found += [change for change in changes if counts(*change)]
    return found


def _swings(value: np.ndarray, counts: Callable[[int, int], bool]) -> list[tuple[int, int]]:
    """Alternating rises and falls between extremes of the fit, each of which counts."""
    extremes = [0]
    candidate = direction = lowest = highest = 0
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
    return [*itertools.pairwise([*extremes, candidate])] if direction else []


def _moves(fit: Fit, first: int, last: int) -> list[tuple[int, int]]:
    """What a swing is made of: its pieces and the significant jumps between them, as first and last index.

    A jump that is not significant goes with the steeper of its two pieces: it is where a bend was found late or early.
    """
    pieces = [(max(a, first), min(b, last)) for a, b in fit.pieces() if a <= last and b >= first]
    moves = [pieces[0]]
    for piece in pieces[1:]:
        left, right = moves[-1][1], piece[0]
        jump = abs(fit.value[right] - fit.value[left])
        if jump > JUMP * math.sqrt(fit.variance[left] + fit.variance[right]):
            moves += [(left, right), piece]
        elif _steepness(fit, piece) > _steepness(fit, moves[-1]):
            moves.append((left, piece[1]))
        else:
            moves[-1] = (moves[-1][0], right)
            moves.append(piece)
    return [(a, b) for a, b in moves if b > a]


def _steepness(fit: Fit, move: tuple[int, int]) -> float:
    return abs(fit.value[move[1]] - fit.value[move[0]]) / max(move[1] - move[0], 1)


def _stand_out(x: np.ndarray, value: np.ndarray, moves: list[tuple[int, int]], least: float) -> list[tuple[int, int]]:
    """The changes within one swing, apart from phases that stay or drift the same way.

    Args:
        x: abscissa, [T].
        value: fitted curve, [T].
        moves: that the swing is made of.
        least: what a change has to be.
    """
    first, last = moves[0][0], moves[-1][1]
    sign = math.copysign(1.0, value[last] - value[first])
    size = np.array([sign * (value[b] - value[a]) for a, b in moves])
    rate = size / np.array([x[b] - x[a] for a, b in moves])
    # What is fast but small is part of a joint, no transition of its own.
    peak = np.where(size >= least, rate, -np.inf)
    if not np.isfinite(peak).any():
        return [(first, last)]
    before = np.concatenate([[-np.inf], np.maximum.accumulate(peak)[:-1]])
    after = np.concatenate([np.maximum.accumulate(peak[::-1])[::-1][1:], [-np.inf]])
    valley = rate < DRIFT * np.minimum(before, after)
    found = []
    for between, group in itertools.groupby(range(len(moves)), key=lambda i: bool(valley[i])):
        if between:
            continue
        kept = list(group)
        fastest = peak[kept].max()
        for outer in (0, -1):
            phase = -np.inf
            # The phase before or after; what is faster than that, though slow, is the change's beginning or tail.
            while (
                len(kept) > 1
                and rate[kept[outer]] < DRIFT * fastest
                and (phase == -np.inf or rate[kept[outer]] <= 2 * phase)
            ):
                phase = max(rate[kept.pop(outer)], 0.0)
        found.append((moves[kept[0]][0], moves[kept[-1]][1]))
    return found


def _date(
    x: np.ndarray, fit: Fit, change: tuple[int, int], window: slice, curves: np.ndarray, begins: np.ndarray
) -> tuple[float, float, float]:
    """Midpoint of a change, where the curve crosses its half level, and the midpoint's 90 % interval.

    Where the curve jumps between two snapshots, the crossing may be anywhere between them.

    Args:
        x: abscissa, [T].
        fit: of the curve.
        change: its first and last index.
        window: where draws may have their crossing.
        curves: drawn, [draws, T].
        begins: where their pieces begin, [draws, T].
    """
    first, last = change
    sign = math.copysign(1.0, fit.value[last] - fit.value[first])
    half = 0.5 * (fit.value[first] + fit.value[last])
    error = 0.5 * math.sqrt(fit.variance[first] + fit.variance[last])
    starts = np.zeros(len(x), dtype=bool)
    starts[fit.starts] = True
    done = fit.value[None, first : last + 1]
    _, middle = _crossings(x[first : last + 1], sign * (done - half), starts[None, first : last + 1], np.array([0.5]))
    middle = float(middle[0])
    generator = np.random.default_rng(1)
    halves = half + error * generator.standard_normal((len(curves), 1))
    places = generator.random(len(curves))
    draw, at = _crossings(x[window], sign * (curves[:, window] - halves), begins[:, window], places)
    # Of several crossings of one draw, the one nearest to the midpoint.
    nearest: dict[int, float] = {}
    for i, crossing in zip(draw.tolist(), at.tolist(), strict=True):
        if i not in nearest or abs(crossing - middle) < abs(nearest[i] - middle):
            nearest[i] = crossing
    low, high = np.quantile([*nearest.values(), middle], [0.05, 0.95])
    return middle, min(float(low), middle), max(float(high), middle)


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


def _describe(
    trajectory: Trajectory, steps: np.ndarray, position: np.ndarray, measured: _Measured, axis: _Axis
) -> Transition:
    """Name and label a change."""
    first, last = measured.first, measured.last
    delta = measured.after - measured.before
    loss = trajectory.column("train_loss")[position[[first, last]]]
    energy = None
    if trajectory.n is not None and trajectory.n > 0 and np.isfinite(loss).all():
        energy = trajectory.n * float(loss[1] - loss[0]) + delta * math.log(trajectory.n)
    label, evidence = _label(trajectory, position[first], position[last], measured.before, measured.after)
    return Transition(
        kind="complexification" if delta > 0 else "simplification",
        label=label,
        step=axis.step(measured.middle),
        step_low=axis.step(measured.low),
        step_high=axis.step(measured.high),
        onset=int(steps[first]),
        end=int(steps[last]),
        llc_before=measured.before,
        llc_after=measured.after,
        delta_llc=delta,
        stderr=measured.error,
        delta_free_energy=energy,
        evidence=evidence,
    )


def _curve(trajectory: Trajectory) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Indices of the usable points, their λ and its standard error, larger where a point is doubtful."""
    value, error = trajectory.column("llc_centred"), trajectory.column("stderr_centred")
    usable = np.isfinite(trajectory.column("llc"))
    # λ̂ off a minimum measures the slope, not the basin; λ_c does not mind.
    minimum = np.array(
        [bool(set(each.reasons) - {OFF_MINIMUM}) or each.reliable for each in trajectory.points], dtype=bool
    )
    doubtful = np.array([bool(set(each.reasons) - {OFF_MINIMUM}) for each in trajectory.points], dtype=bool)
    if not len(value) or not np.isfinite(value[usable]).all():
        value, error = trajectory.column("llc"), trajectory.column("stderr")
        usable = usable & minimum
    usable = usable & np.isfinite(value) & np.isfinite(error)
    position = np.flatnonzero(usable)
    return position, value[position], (error * np.where(doubtful, DOUBT, 1.0))[position]


def _roughness(value: np.ndarray, error: np.ndarray) -> float:
    """Standard deviation of the training's own jitter: what second differences show beyond the sampling error."""
    second = value[2:] - 2 * value[1:-1] + value[:-2]
    # Median absolute deviation; a second difference of white noise has six times its variance.
    seen = (1.4826 * float(np.median(np.abs(second)))) ** 2 / 6
    floor = 1e-4 * float(np.max(np.abs(value))) + 1e-12
    return math.sqrt(max(seen - float(np.median(error**2)), floor**2))


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
    curvature = [point.diagnostics.get("top_curvature") for point in trajectory.points]
    begun, ended = curvature[onset], curvature[end]
    if begun and ended is not None and ended < MIN_CURVATURE * begun:
        # Under cross-entropy all curvatures shrink as margins grow, and λ falls whether or not the network generalises.
        return None, (
            f"no label: λ falls by {100 * share:.0f} %, but the largest curvature falls too, {begun / ended:.3g}-fold, "
            "as it does under cross-entropy whether or not the network generalises"
            if ended > 0
            else "no label: the curvature vanishes with λ"
        )
    evidence = f"λ falls by {100 * share:.0f} % while the training loss stays low"
    accuracy = trajectory.column("val_accuracy")
    if np.isfinite(accuracy[end]) and np.isfinite(accuracy).any():
        start = np.nanmin(accuracy[: onset + 1]) if np.isfinite(accuracy[: onset + 1]).any() else math.nan
        verb = "confirms" if accuracy[end] >= start + 0.2 else "contradicts"
        evidence += f"; validation {verb}: accuracy {start:.2f} before, {accuracy[end]:.2f} at its end"
    return "generalisation", evidence
