"""What has to be said beside the transitions of a trajectory, or in their place; one sentence each."""

import itertools
import math
import statistics
from collections import Counter

import numpy as np

from groktrace.analysis.detection import Detector, PiecewiseDetector
from groktrace.analysis.detection.labels import risen_in_words
from groktrace.analysis.detection.piecewise import Fitted, usable_points
from groktrace.analysis.detection.settings import DEFAULTS, DetectionSettings
from groktrace.analysis.measurement.llc import NOT_THE_BASIN, OFF_MINIMUM, PERHAPS_OFF
from groktrace.analysis.results.trajectory import Trajectory
from groktrace.analysis.tuning import PILOT
from groktrace.reporting.numbers import number

# From this fraction of the level on, the points' errors are named with the curve.
NOISY = 0.05
# More rises and falls than these are counted, not told.
MAX_TOLD = 3
# From this share of the loss on, it is said that it is no mean over samples; class weights move it by less.
BATCH_EFFECT = 0.05


def none_found(trajectory: Trajectory, detector: Detector | None = None) -> str:
    """What to say where there is no transition: that there is none and what the curve does, or that it cannot be told.

    Args:
        trajectory: λ̂ along the run.
        detector: that found none; the default one also says why.
    """
    own = PiecewiseDetector() if detector is None else detector
    if not isinstance(own, PiecewiseDetector):
        return f"No transition found in {usable_points(trajectory)} snapshots."
    fitted = own.fit(trajectory)
    if fitted is None:
        usable = f"{usable_points(trajectory)} of {len(trajectory.points)}"
        text = f"Too few usable snapshots to look for transitions: {usable}, and it takes {own.min_points}"
        reasons = Counter(reason_kind(point.reasons) for point in trajectory.points if not point.reliable)
        (why, count), *_ = reasons.most_common(1) or [("", 0)]
        return text + (f"; {count} are unreliable ({why})." if count else ".")
    shape = describe_curve(trajectory, fitted, own)
    objections = [candidate for candidate in own.candidates(trajectory) if candidate[1] is not None]
    more = ""
    if objections:
        (change, why), *others = objections
        kind = "rise" if change.delta_llc > 0 else "fall"
        more = f" The {kind} about step {change.step} does not count: {why}."
        more += f" Nor do {len(others)} others." if others else ""
    return f"No transition found in {len(fitted.position)} snapshots: {shape}.{more}"


def describe_curve(trajectory: Trajectory, fitted: Fitted, settings: DetectionSettings = DEFAULTS) -> str:
    """What the fit of a curve does, in words.

    Args:
        trajectory: λ̂ along the run.
        fitted: its curve.
        settings: what counts as a change.
    """
    symbol, steps, measured = trajectory.curve.symbol, trajectory.column("step")[fitted.position], fitted.fit.data.value
    # Straight pieces may lead beyond all points at their ends.
    value = np.clip(fitted.fit.value, measured.min(), measured.max())
    level = max(float(np.abs(value).max()), 1e-300)
    scatter = float(np.median(np.sqrt(fitted.fit.data.variance)))
    quantile = statistics.NormalDist().inv_cdf(1 - settings.significance / (2 * len(value)))
    error = quantile * math.sqrt(2 * float(np.median(fitted.fit.variance)))
    noise = f", though the points scatter by {100 * scatter / level:.0f} %" if scatter > NOISY * level else ""
    turns = _turns(value, max(settings.min_change * level, error))
    if len(turns) < 2:
        data, span = fitted.fit.data, float(np.ptp(value))
        mean = float(np.average(data.value, weights=1 / data.variance))
        within = (
            f"within its errors of {_percent(scatter / level)} %"
            if span <= error
            else f"within {_percent(span / level)} %"
        )
        return f"{symbol} stays at {number(mean)}, {within}"
    if len(turns) > MAX_TOLD + 1:
        between = f"between {number(value.min())} and {number(value.max())}"
        return f"{symbol} goes up and down {len(turns) - 1} times {between}{noise}"
    parts = []
    for i, j in itertools.pairwise(turns):
        a, b = float(value[i]), float(value[j])
        share = f" by {100 * (1 - b / a):.0f} %" if b < a and a > 0 and b > 0 else ""
        verb, when = "rises" if b > a else "falls", f"over steps {steps[i]:.0f}-{steps[j]:.0f}"
        parts.append(f"{verb}{share} from {number(a)} to {number(b)} {when}")
    drift = ", too steadily to part one phase from another" if fitted.drifts and len(parts) == 1 else ""
    return f"{symbol} {', then '.join(parts)}{drift}{noise}"


def remarks(trajectory: Trajectory) -> list[str]:
    """What speaks against drawing conclusions from this trajectory, one sentence each.

    Args:
        trajectory: λ̂ along the run.
    """
    found = (
        other_data(trajectory),
        partial(trajectory),
        unused_samples(trajectory),
        no_sample_mean(trajectory),
        risen_in_words(trajectory),
        single_chain(trajectory),
    )
    return [remark for remark in found if remark]


def other_data(trajectory: Trajectory) -> str:
    """That λ is not of the run's own training samples, and whether it compares with that; empty where it is of these.

    Args:
        trajectory: λ̂ along the run.
    """
    if trajectory.data is None:
        return ""
    scale = {
        True: "; nβ and γ are those of the run's own analysis, so that λ compares",
        False: "; nβ and γ are not those of an analysis of the run's own: λ compares where both are given the same "
        "--nbeta and --localization",
        None: "",
    }[trajectory.data.own_scale]
    return f"Measured on {trajectory.data}, not on the run's training samples{scale}."


def unused_samples(trajectory: Trajectory) -> str:
    """That λ on all training samples would be larger than on those that are used; empty where it hardly would.

    Args:
        trajectory: λ̂ along the run.
    """
    shares = {
        point.step: point.diagnostics.get("unseen") or 0.0
        for point in trajectory.points
        if not any(reason.startswith(NOT_THE_BASIN) for reason in point.reasons)
    }
    step = max(shares, key=shares.__getitem__, default=0)
    if not shares or shares[step] <= PILOT.max_bias:
        return ""
    n = "" if trajectory.n is None else f"n = {trajectory.n:,} "
    return (
        f"λ is that of some of the {n}training samples. On all it would be larger, by about {100 * shares[step]:.0f} % "
        f"where that is most (step {step})."
    )


def no_sample_mean(trajectory: Trajectory) -> str:
    """That the loss depends on which samples are evaluated together; empty where it hardly does.

    Args:
        trajectory: λ̂ along the run.
    """
    effect = max((point.diagnostics.get("batch_effect") or 0.0 for point in trajectory.points), default=0.0)
    if effect <= BATCH_EFFECT:
        return ""
    return (
        f"The loss is no mean over samples: that of 256 or fewer together is off the mean over their quarters by "
        f"{100 * effect:.0f} %, at the first snapshot. Losses and λ are those of all stored samples together, not of "
        "the batches of the training."
    )


def partial(trajectory: Trajectory) -> str:
    """That snapshots are still to be sampled; empty where none are.

    Args:
        trajectory: λ̂ along the run.
    """
    if not trajectory.unsampled:
        return ""
    done = len(trajectory.points)
    return (
        f"Partial: {done} of {done + trajectory.unsampled} snapshots are sampled so far; "
        "the same command goes on from there, for as many minutes as --time says."
    )


def single_chain(trajectory: Trajectory) -> str:
    """Warn where a single chain gives no λ_c although it is needed; empty where it is not.

    Args:
        trajectory: λ̂ along the run.
    """
    points = [point for point in trajectory.points if point.llc is not None]
    if trajectory.method is None or not points or any(point.llc_centred is not None for point in points):
        return ""
    off = sum(bool({OFF_MINIMUM, PERHAPS_OFF} & set(point.reasons)) for point in points)
    if trajectory.follows_curvature:
        why = "where nβ follows the curvature, transitions are found on it, as λ̂ may be a slope's"
    elif off:
        why = f"{off} of {len(points)} snapshots are not, or perhaps not, at a minimum, where λ̂ measures the slope"
    else:
        return ""
    return f"A single chain gives no λ_c: {why}. Analyse with 2 chains or more."


def untrusted(trajectory: Trajectory) -> list[str]:
    """A line for each reason for which snapshots are unreliable: how many of how many, which, and why.

    Args:
        trajectory: λ̂ along the run.
    """
    points, by_kind = trajectory.points, {}
    for i, point in enumerate(points):
        if not point.reliable:
            for reason in point.reasons or ("no reason given",):
                by_kind.setdefault(reason_kind((reason,)), {}).setdefault(i, reason)
    lines = []
    for found in by_kind.values():
        first, reason = next(iter(found.items()))
        alike = len(set(found.values())) == 1
        where = "" if alike else f" (at step {points[first].step})"
        lines.append(f"{len(found)} of {len(points)} snapshots, {_steps(trajectory, list(found))}: {reason}{where}")
    if len(lines) > 1:
        lines.append(f"{sum(not point.reliable for point in points)} of {len(points)} snapshots in all")
    return lines


def _steps(trajectory: Trajectory, chosen: list[int]) -> str:
    """All steps of some points, neighbours as ranges: "steps 0-300, 500".

    Args:
        trajectory: whose points they are.
        chosen: their indices, ascending.
    """
    ranges: list[list[int]] = []
    for i in chosen:
        if ranges and ranges[-1][1] == i - 1:
            ranges[-1][1] = i
        else:
            ranges.append([i, i])
    steps = [point.step for point in trajectory.points]
    words = [f"{steps[a]}" if a == b else f"{steps[a]}-{steps[b]}" for a, b in ranges]
    return f"step{'' if len(chosen) == 1 else 's'} {', '.join(words)}"


def _percent(share: float) -> str:
    """Two digits, or all before the point."""
    return f"{100 * share:.2g}" if share < 0.995 else f"{100 * share:.0f}"


def _turns(value: np.ndarray, least: float) -> list[int]:
    """Indices between which the curve rises and falls by turns, each time by `least` or more, if it does."""
    turns: list[int] = []
    low = high = direction = 0
    levels = value.tolist()
    for i, level in enumerate(levels):
        # The first swing begins where a level that stays ends.
        if level > levels[high] or (level == levels[high] and not direction):
            high = i
        if level < levels[low] or (level == levels[low] and not direction):
            low = i
        if direction <= 0 and level - levels[low] >= least:
            turns.append(low)
            direction, high = 1, i
        elif direction >= 0 and levels[high] - level >= least:
            turns.append(high)
            direction, low = -1, i
    return [*turns, high if direction > 0 else low] if turns else []


def reason_kind(reasons: tuple[str, ...]) -> str:
    """The first words of the first reason: enough to look it up."""
    return reasons[0].split(":")[0].split(" (")[0] if reasons else "without a reason"
