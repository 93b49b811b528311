"""Phase transitions of a trajectory: what stands out from the phases of a piecewise fit, dated and labelled."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from groktrace.analysis.changes import find_changes
from groktrace.analysis.dating import Measured, measure_changes
from groktrace.analysis.labels import doubt_of, high_loss, label_of, peak_level, since_risen
from groktrace.analysis.segmentation import Fit, segment, straight_cost
from groktrace.analysis.trajectory import Curve, Trajectory

MIN_POINTS = 5
# A curve that one straight line describes nearly as well, in units of log(T), drifts and has no transition.
DRIFT_FAVOUR = 3.0
# Levels within so many errors of zero may be positive.
ZERO = 2.0
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
        curve: "llc_centred" where the levels are those of λ_c, "llc" where they are those of λ̂; None if unknown.
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
    curve: str | None = None

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


@dataclass(frozen=True, eq=False)
class Fitted:
    """The curve of a trajectory and its fit by pieces.

    Attributes:
        position: of the points that are used, among the trajectory's, [T].
        axis: the better of the two.
        x: abscissa, [T].
        value: λ, [T].
        variance: of each value, [T].
        fit: of the three above.
        drifts: whether a single straight line describes it nearly as well.
    """

    position: np.ndarray
    axis: _Axis
    x: np.ndarray
    value: np.ndarray
    variance: np.ndarray
    fit: Fit
    drifts: bool


def usable_points(trajectory: Trajectory) -> int:
    """How many snapshots the search for transitions can use; below five nothing can be said.

    Args:
        trajectory: λ̂ along a run.
    """
    return int(np.isfinite(trajectory.curve.value).sum())


def find_transitions(trajectory: Trajectory) -> list[Transition]:
    """The transitions of λ along a run, in step order.

    The curve is the centred estimate λ_c where every point has it (it holds off a minimum too), else λ̂. It is fitted
    by flat and straight pieces, on the step axis or its logarithm, whichever costs less. Rises and falls of the fit are
    kept that exceed both 5 % of the largest level and their own error at the 1 % level, corrected for the number of
    points, and that stand out from a phase beside them: a curve that drifts throughout has no transition. Nor is one
    where λ is not positive, where no snapshot before or after has been measured in its own basin, or where the training
    loss has risen and stays high. Intervals of midpoints come from draws of the fit's posterior.

    Args:
        trajectory: with at least five usable points; with fewer, nothing can be said and the list is empty.
    """
    return [each for each, objection in find_changes_of_phase(trajectory) if objection is None]


def find_changes_of_phase(trajectory: Trajectory) -> list[tuple[Transition, str | None]]:
    """The transitions, see `find_transitions`, and what would be some but for an objection; each with that, or None.

    Args:
        trajectory: λ̂ along a run.
    """
    fitted = fit_curve(trajectory)
    if fitted is None or fitted.drifts:
        return []
    position, x, value, fit = fitted.position, fitted.x, fitted.value, fitted.fit
    steps, loss = trajectory.column("step")[position], trajectory.column("train_loss")
    curve, high, risen = trajectory.curve, high_loss(loss), since_risen(trajectory)
    since = 0
    found: list[tuple[Transition, str | None]] = []
    dated = measure_changes(x, value, fitted.variance, fit, find_changes(x, value, fitted.variance, fit))
    for i, measured in enumerate(dated):
        onset, end = position[measured.first], position[measured.last]
        before = dated[i - 1].last if i else 0
        after = dated[i + 1] if i + 1 < len(dated) else None
        # A phase may go on falling until the next change.
        lowest = min(measured.after, fit.value[-1 if after is None else after.first])
        peak = None
        if measured.after < measured.before:
            peak = peak_level(loss[position], high[position], fit.value, value, since, measured)
        doubt = doubt_of(trajectory, onset, end, measured, after)
        label, evidence = label_of(trajectory, onset, end, measured, peak, lowest, doubt)
        objection = None
        if not _positive(curve, fit, measured):
            objection = f"{curve.symbol} is not positive on one side of it"
        elif not _sound(curve.sound[position], x, measured, before, len(x) - 1 if after is None else after.first):
            objection = "no snapshot on one side of it was measured in its own basin"
        elif risen is not None and end > risen and (measured.after < measured.before or high[end]):
            objection = "the training loss has risen"
        described = _describe(trajectory, steps.astype(int), position, measured, fitted.axis, label, evidence)
        found.append((described, objection))
        if label is not None or measured.after > measured.before:
            since = measured.last
    return found


def fit_curve(trajectory: Trajectory) -> Fitted | None:
    """The curve and its fit; None where too few points can be used.

    Args:
        trajectory: λ̂ along a run.
    """
    curve = trajectory.curve
    position = np.flatnonzero(np.isfinite(curve.value))
    if len(position) < MIN_POINTS:
        return None
    value, error = curve.value[position], (curve.error * np.where(curve.doubtful, DOUBT, 1.0))[position]
    steps = trajectory.column("step")[position]
    axes = [_Axis(float(np.diff(steps).min()), logarithmic) for logarithmic in (False, True)]
    variance = error**2 + min(_roughness(axis.of(steps), value, error) for axis in axes) ** 2
    fits = [segment(axis.of(steps), value, variance) for axis in axes]
    axis, fit = min(zip(axes, fits, strict=True), key=lambda pair: pair[1].cost)
    straight = min(straight_cost(axis.of(steps), value, variance) for axis in axes)
    drifts = straight <= fit.cost + DRIFT_FAVOUR * math.log(len(position))
    return Fitted(position, axis, axis.of(steps), value, variance, fit, drifts)


def _positive(curve: Curve, fit: Fit, change: Measured) -> bool:
    """Whether λ is positive before and after a change, as that of a basin is.

    Curves that were measured elsewhere may fall short of zero by their errors.
    """
    slack = np.sqrt(fit.variance[[change.first, change.last]]) * (ZERO if curve.name == "llc" else 0.0)
    return change.before + slack[0] > 0 and change.after + slack[1] > 0


def _sound(sound: np.ndarray, x: np.ndarray, change: Measured, before: int, after: int) -> bool:
    """Whether some snapshot on either side of a change's middle was measured in its own basin.

    Args:
        sound: whether a point was, [T].
        x: abscissa, [T].
        change: dated.
        before: index of the last point of the change before, or the first point.
        after: index of the first point of the change after, or the last point.
    """
    middle = min(max(int(np.searchsorted(x, change.middle)), change.first + 1), change.last)
    return bool(sound[min(before, change.first) : middle].any() and sound[middle : max(after, change.last) + 1].any())


def _describe(
    trajectory: Trajectory,
    steps: np.ndarray,
    position: np.ndarray,
    measured: Measured,
    axis: _Axis,
    label: str | None,
    evidence: str,
) -> Transition:
    """A change in units of training steps."""
    first, last = measured.first, measured.last
    delta = measured.after - measured.before
    loss = trajectory.column("train_loss")[position[[first, last]]]
    energy = None
    if trajectory.n is not None and trajectory.n > 0 and np.isfinite(loss).all():
        energy = trajectory.n * float(loss[1] - loss[0]) + delta * math.log(trajectory.n)
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
        curve=trajectory.curve.name,
    )


def _roughness(x: np.ndarray, value: np.ndarray, error: np.ndarray) -> float:
    """Standard deviation of the training's jitter: how far points lie off the line between their neighbours.

    Less the sampling error, which they have too.
    """
    left = (x[2:] - x[1:-1]) / (x[2:] - x[:-2])
    off = value[1:-1] - left * value[:-2] - (1 - left) * value[2:]
    spread = np.sqrt(1 + left**2 + (1 - left) ** 2)
    # Median absolute deviation, of what white noise of variance 1 gives the variance 1.
    seen = (1.4826 * float(np.median(np.abs(off) / spread))) ** 2
    floor = 1e-4 * float(np.max(np.abs(value))) + 1e-12
    return math.sqrt(max(seen - float(np.median(error**2)), floor**2))
