"""The default detector: what stands out from the phases of a piecewise fit, dated and labelled."""

import math
from dataclasses import dataclass

import numpy as np

from groktrace.analysis.detection.base import Detector, Transition
from groktrace.analysis.detection.changes import find_changes
from groktrace.analysis.detection.dating import Measured, measure_changes
from groktrace.analysis.detection.labels import doubt_of, high_loss, label_of, peak_level, since_risen
from groktrace.analysis.detection.segmentation import Data, Fit, segment, straight_cost
from groktrace.analysis.detection.settings import DetectionSettings
from groktrace.analysis.results.trajectory import Curve, Trajectory


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
        fit: of the curve on that axis.
        drifts: whether a single straight line describes it nearly as well.
    """

    position: np.ndarray
    axis: _Axis
    fit: Fit
    drifts: bool


@dataclass(frozen=True, kw_only=True)
class PiecewiseDetector(DetectionSettings):
    """Finds the rises and falls of λ that stand out from the phases beside them, and labels them from training data.

    The curve is the centred estimate λ_c where every point has it (it holds off a minimum too), else λ̂. It is fitted
    by flat and straight pieces, on the step axis or its logarithm, whichever costs less. Rises and falls of the fit are
    kept that exceed both 5 % of the largest level and their own error at the 1 % level, corrected for the number of
    points, and that stand out from a phase beside them: a curve that drifts throughout has no transition. Nor is one
    where λ is not positive, where no snapshot before or after has been measured in its own basin, or where the training
    loss has risen and stays high. Intervals of midpoints come from draws of the fit's posterior.

    Its settings are those of `groktrace.analysis.detection.settings.DetectionSettings`, each with where its default
    comes from.
    """

    def detect(self, trajectory: Trajectory) -> list[Transition]:
        """The transitions in step order; none where fewer than five points can be used, as nothing can be said then.

        Args:
            trajectory: λ̂ along a run.
        """
        return [change for change, objection in self.candidates(trajectory) if objection is None]

    def candidates(self, trajectory: Trajectory) -> list[tuple[Transition, str | None]]:
        """The transitions, and what would be some but for an objection; each with that, or None.

        Args:
            trajectory: λ̂ along a run.
        """
        fitted = self.fit(trajectory)
        if fitted is None or fitted.drifts:
            return []
        position, fit = fitted.position, fitted.fit
        x, value = fit.data.x, fit.data.value
        loss, curve = trajectory.column("train_loss"), trajectory.curve
        high, risen = high_loss(loss, self.low_loss), since_risen(trajectory, self)
        since = 0
        found: list[tuple[Transition, str | None]] = []
        dated = measure_changes(fit, find_changes(fit, self), self)
        for i, measured in enumerate(dated):
            onset, end = position[measured.first], position[measured.last]
            before = dated[i - 1].last if i else 0
            after = dated[i + 1] if i + 1 < len(dated) else None
            # A phase may go on falling until the next change.
            lowest = min(measured.after, fit.value[-1 if after is None else after.first])
            peak = None
            if measured.after < measured.before:
                peak = peak_level(loss[position], high[position], fit.value, value, since, measured)
            doubt = doubt_of(trajectory, onset, end, measured, after, self)
            label, evidence = label_of(trajectory, onset, end, measured, peak, lowest, doubt, self)
            objection = None
            if not _positive(curve, fit, measured, self.zero_errors):
                objection = f"{curve.symbol} is not positive on one side of it"
            elif not _sound(curve.sound[position], x, measured, before, len(x) - 1 if after is None else after.first):
                objection = "no snapshot on one side of it was measured in its own basin"
            elif risen is not None and end > risen and (measured.after < measured.before or high[end]):
                objection = "the training loss has risen"
            step = fitted.axis.step
            described = Transition.between(
                trajectory,
                int(onset),
                int(end),
                levels=(measured.before, measured.after),
                stderr=measured.error,
                dates=(step(measured.middle), step(measured.low), step(measured.high)),
                label=label,
                evidence=evidence,
            )
            found.append((described, objection))
            if label is not None or measured.after > measured.before:
                since = measured.last
        return found

    def fit(self, trajectory: Trajectory) -> Fitted | None:
        """The curve and its fit; None where too few points can be used.

        Args:
            trajectory: λ̂ along a run.
        """
        curve = trajectory.curve
        position = np.flatnonzero(np.isfinite(curve.value))
        if len(position) < self.min_points:
            return None
        value, error = curve.value[position], (curve.error * np.where(curve.doubtful, self.doubt_factor, 1.0))[position]
        steps = trajectory.column("step")[position]
        axes = [_Axis(float(np.diff(steps).min()), logarithmic) for logarithmic in (False, True)]
        variance = error**2 + min(_roughness(axis.of(steps), value, error) for axis in axes) ** 2
        on_axes = [Data(axis.of(steps), value, variance) for axis in axes]
        fits = [segment(data, self.slope_price) for data in on_axes]
        axis, fit = min(zip(axes, fits, strict=True), key=lambda pair: pair[1].cost)
        straight = min(straight_cost(data, self.slope_price) for data in on_axes)
        drifts = straight <= fit.cost + self.drift_margin * math.log(len(position))
        return Fitted(position, axis, fit, drifts)


def usable_points(trajectory: Trajectory) -> int:
    """How many snapshots the search for transitions can use.

    Args:
        trajectory: λ̂ along a run.
    """
    return int(np.isfinite(trajectory.curve.value).sum())


def find_transitions(trajectory: Trajectory, detector: Detector | None = None) -> list[Transition]:
    """The transitions of λ along a run, in step order.

    Args:
        trajectory: λ̂ along a run.
        detector: how they are found; `PiecewiseDetector()` by default, whose thresholds are its arguments.
    """
    return (PiecewiseDetector() if detector is None else detector).detect(trajectory)


def _positive(curve: Curve, fit: Fit, change: Measured, zero_errors: float) -> bool:
    """Whether λ is positive before and after a change, as that of a basin is.

    Curves that were measured elsewhere may fall short of zero by their errors.
    """
    slack = np.sqrt(fit.variance[[change.first, change.last]]) * (zero_errors if curve.name == "llc" else 0.0)
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
