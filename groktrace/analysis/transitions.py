"""Phase transitions of a trajectory: what stands out from the phases of a piecewise fit, dated and labelled."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from groktrace.analysis.changes import find_changes
from groktrace.analysis.dating import Measured, measure_changes
from groktrace.analysis.llc import OFF_MINIMUM
from groktrace.analysis.segmentation import segment, straight_cost
from groktrace.analysis.trajectory import Trajectory

# A fall, with those before it since λ rose and the drift of the phases between, is read as generalisation from this
# fraction of the highest level: networks that merely lose weight norm after memorising fall by up to an eighth.
MIN_GENERALISATION = 0.15
# Where nβ follows the curvature, perceptrons with too few pairs fell by up to 17 %, those that grokked by 22 % or more.
MIN_FOLLOWING = 0.2
MIN_POINTS = 5
# A curve that one straight line describes nearly as well, in units of log(T), drifts and has no transition.
DRIFT_FAVOUR = 3.0
# The training loss is low once it has fallen to this fraction of the run's range.
LOW = 0.1
# Within these factors the largest curvature stays what it was.
MIN_CURVATURE = 0.5
MAX_CURVATURE = 3.0
# Where nβ follows the curvature, so many errors tell a fall from noise: memorising transformers fell by up to 5.8.
CLEAR = 6.0
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
    axes = [_Axis(float(np.diff(steps).min()), logarithmic) for logarithmic in (False, True)]
    variance = error**2 + min(_roughness(axis.of(steps), value, error) for axis in axes) ** 2
    fits = [segment(axis.of(steps), value, variance) for axis in axes]
    axis, fit = min(zip(axes, fits, strict=True), key=lambda pair: pair[1].cost)
    x = axis.of(steps)
    straight = min(straight_cost(axis.of(steps), value, variance) for axis in axes)
    if straight <= fit.cost + DRIFT_FAVOUR * math.log(len(x)):
        return []
    changes = find_changes(x, value, variance, fit)
    found: list[Transition] = []
    since, loss = 0, trajectory.column("train_loss")[position]
    dated = measure_changes(x, value, variance, fit, changes)
    for i, measured in enumerate(dated):
        onset, end = position[measured.first], position[measured.last]
        after = dated[i + 1] if i + 1 < len(dated) else None
        # A phase may go on falling until the next change.
        lowest = min(measured.after, fit.value[-1 if after is None else after.first])
        peak = _peak(loss, fit.value, value, since, measured) if measured.after < measured.before else None
        doubt = _doubt(trajectory, onset, end, measured, after)
        label, evidence = _label(trajectory, onset, end, measured, peak, lowest, doubt)
        found.append(_describe(trajectory, steps.astype(int), position, measured, axis, label, evidence))
        if label is not None or measured.after > measured.before:
            since = measured.last
    return found


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
    )


def _curve(trajectory: Trajectory) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Indices of the usable points, their λ and its standard error, larger where a point is doubtful."""
    value, error = trajectory.column("llc_centred"), trajectory.column("stderr_centred")
    usable = np.isfinite(trajectory.column("llc"))
    doubtful = np.array([bool(set(each.reasons) - {OFF_MINIMUM}) for each in trajectory.points], dtype=bool)
    if not len(value) or not np.isfinite(value[usable]).all():
        value, error = trajectory.column("llc"), trajectory.column("stderr")
        # λ̂ off a minimum measures the slope, not the basin, whatever else is wrong with it.
        usable &= (trajectory.column("reliable") > 0) | (
            doubtful & np.array([OFF_MINIMUM not in each.reasons for each in trajectory.points], dtype=bool)
        )
    usable = usable & np.isfinite(value) & np.isfinite(error)
    position = np.flatnonzero(usable)
    return position, value[position], (error * np.where(doubtful, DOUBT, 1.0))[position]


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


def _doubt(trajectory: Trajectory, onset: int, end: int, fall: Measured, after: Measured | None) -> str | None:
    """Why a fall of λ is no evidence of generalisation; None where nothing speaks against it.

    Under cross-entropy all curvatures shrink as margins grow, and λ at one nβ falls whether or not the network
    generalises.

    Args:
        trajectory: of the run.
        onset: point at which the fall begins.
        end: point at which it is over.
        fall: the change.
        after: the next change.
    """
    errors = abs(fall.after - fall.before) / max(fall.error, 1e-300)
    if trajectory.follows_curvature and errors < CLEAR:
        return f"that is {errors:.1f} standard errors; where nβ follows the curvature fewer than {CLEAR:g} tell nothing"
    if trajectory.follows_curvature and trajectory.weight_decay is False:
        return "without weight decay margins grow without end, and λ may fall for that alone"
    if after is not None and after.after > after.before and after.first <= fall.last:
        return "it lasts for one snapshot"
    curvature = [point.diagnostics.get("top_curvature") for point in trajectory.points]
    begun, ended = curvature[onset], curvature[end]
    if not begun or ended is None:
        return None
    if ended > MAX_CURVATURE * begun:
        return f"the largest curvature grows {ended / begun:.3g}-fold, and λ counts what is stiff beside it"
    if ended >= MIN_CURVATURE * begun or trajectory.follows_curvature:
        return None
    if ended <= 0:
        return "the curvature vanishes with it"
    return (
        f"the largest curvature falls too, {begun / ended:.3g}-fold, as it does under cross-entropy whether or not the "
        "network generalises; analyse at --nbeta curvature"
    )


def _peak(loss: np.ndarray, fitted: np.ndarray, value: np.ndarray, since: int, fall: Measured) -> float | None:
    """The highest level before a fall while the training loss is low; None where it is not low in time.

    Args:
        loss: at the usable points, as the other two.
        fitted: λ of the fit.
        value: λ as measured.
        since: index of the point from which on to look.
        fall: the change.
    """
    if not np.isfinite(loss[[fall.first, fall.last]]).all():
        return None
    high = np.flatnonzero(_high(loss)[since : fall.last + 1])
    start = since + int(high[-1]) + 1 if len(high) else since
    if start <= fall.first:
        return max(fall.before, float(fitted[start : fall.first + 1].max()))
    # Of a fall that begins before, what is left of it counts.
    return min(fall.before, float(value[start])) if start < fall.last else None


def _high(loss: np.ndarray) -> np.ndarray:
    """Whether the training loss is known not to be low, at each point."""
    known = loss[~np.isnan(loss)]
    return loss > known.min() + LOW * np.ptp(known) if len(known) else np.zeros(len(loss), dtype=bool)


def _label(
    trajectory: Trajectory,
    onset: int,
    end: int,
    measured: Measured,
    peak: float | None,
    lowest: float,
    doubt: str | None,
) -> tuple[str | None, str]:
    """What the training loss allows to say of a change, and whether validation data agree.

    Args:
        trajectory: of the run.
        onset: point at which the change begins.
        end: point at which it is over.
        measured: the change.
        peak: the highest level since the last rise or label while the training loss is low; None where it is not low.
        lowest: the level that is reached until the next change.
        doubt: what speaks against reading a fall as generalisation.
    """
    before, after = measured.before, measured.after
    loss = trajectory.column("train_loss")
    if not np.isfinite(loss[[onset, end]]).all():
        return None, "no label: the training loss is not known"
    if after > before:
        if loss[end] < 0.5 * loss[onset]:
            return "memorisation", f"λ rises while the training loss falls from {loss[onset]:.3g} to {loss[end]:.3g}"
        return None, "no label: λ rises, but the training loss does not fall with it"
    if peak is None:
        return None, "no label: λ falls while the training loss is not yet low"
    share = 1 - lowest / peak if peak > 0 else 0.0
    if share < (MIN_FOLLOWING if trajectory.follows_curvature else MIN_GENERALISATION):
        return None, f"no label: λ falls by only {100 * share:.0f} % while the training loss stays low"
    if doubt is not None:
        return None, f"no label: λ falls by {100 * share:.0f} %, but {doubt}"
    more = " in all" if peak > before or lowest < after else ""
    evidence = f"λ falls by {100 * share:.0f} %{more} while the training loss stays low"
    accuracy = trajectory.column("val_accuracy")
    if np.isfinite(accuracy[end]) and np.isfinite(accuracy).any():
        start = np.nanmin(accuracy[: onset + 1]) if np.isfinite(accuracy[: onset + 1]).any() else math.nan
        verb = "confirms" if accuracy[end] >= start + 0.2 else "contradicts"
        evidence += f"; validation {verb}: accuracy {start:.2f} before, {accuracy[end]:.2f} at its end"
    return "generalisation", evidence
