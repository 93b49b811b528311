"""What a change of phase is called, and what it rests on."""

import math

import numpy as np

from groktrace.analysis.detection.dating import Measured
from groktrace.analysis.detection.settings import DEFAULTS, DetectionSettings
from groktrace.analysis.results.trajectory import Trajectory


def doubt_of(
    trajectory: Trajectory,
    onset: int,
    end: int,
    fall: Measured,
    after: Measured | None,
    settings: DetectionSettings = DEFAULTS,
) -> str | None:
    """Why a fall of λ is no evidence of generalisation; None where nothing speaks against it.

    Under cross-entropy all curvatures shrink as margins grow, and λ at one nβ falls whether or not the network
    generalises.

    Args:
        trajectory: of the run.
        onset: point at which the fall begins.
        end: point at which it is over.
        fall: the change.
        after: the next change.
        settings: within which bounds curvature and noise speak against nothing.
    """
    clear = settings.min_errors_following
    errors = abs(fall.after - fall.before) / max(fall.error, 1e-300)
    if trajectory.follows_curvature and errors < clear:
        return f"that is {errors:.1f} standard errors; where nβ follows the curvature fewer than {clear:g} tell nothing"
    if trajectory.follows_curvature and trajectory.weight_decay is False:
        return "without weight decay margins grow without end, and λ may fall for that alone"
    if after is not None and after.after > after.before and after.first <= fall.last:
        return "it lasts for one snapshot"
    curvature = [point.diagnostics.get("top_curvature") for point in trajectory.points]
    begun, ended = curvature[onset], curvature[end]
    if not begun or ended is None:
        return None
    if ended > settings.curvature_rise * begun:
        return f"the largest curvature grows {ended / begun:.3g}-fold, and λ counts what is stiff beside it"
    if trajectory.follows_curvature:
        return None
    before = curvature[end - 1]
    if end - 1 > onset and before is not None:
        ended = min(ended, before)  # it may spring up for a snapshot
    if ended <= 0:
        return "the curvature vanishes with it"
    halves = ended < settings.curvature_fall * begun
    # It may still rise as λ begins to fall: a fall that is dated a little early would look as if it had not shrunk.
    tops = [top or 0.0 for top in curvature[onset : end + 1]]
    peak = onset + int(np.argmax(tops))
    if not (halves or _shrinks_with_loss(trajectory, peak, end, fall, ended / max(tops), settings)):
        return None
    return (
        f"the largest curvature falls too, {max(tops) / ended:.3g}-fold, as it does under cross-entropy whether or not "
        "the network generalises; analyse at --nbeta curvature"
    )


def _shrinks_with_loss(
    trajectory: Trajectory, onset: int, end: int, fall: Measured, curvature: float, settings: DetectionSettings
) -> bool:
    """Whether all curvature shrinks with the training loss, by as much as λ falls: more than that tells another thing.

    Where all curvatures shrink to a fraction, λ at one nβ shrinks to no less: ½Σ nβh/(nβh + γ) is concave in their
    size. Of squared losses, they do not follow the loss; of cross-entropy, they do.
    """
    loss = trajectory.column("train_loss")[[onset, end]]
    if not 0 < curvature <= fall.after / fall.before < 1 or not 0 < loss[1] < loss[0]:
        return False
    return math.log(curvature) < settings.curvature_power * math.log(loss[1] / loss[0])


def peak_level(
    loss: np.ndarray, high: np.ndarray, fitted: np.ndarray, value: np.ndarray, since: int, fall: Measured
) -> float | None:
    """The highest level before a fall while the training loss is low; None where it is not low in time.

    Args:
        loss: at the usable points, as the other three.
        high: whether it is known not to be low.
        fitted: λ of the fit.
        value: λ as measured.
        since: index of the point from which on to look.
        fall: the change.
    """
    if not np.isfinite(loss[[fall.first, fall.last]]).all():
        return None
    while_high = np.flatnonzero(high[since : fall.last + 1])
    start = since + int(while_high[-1]) + 1 if len(while_high) else since
    if start <= fall.first:
        return max(fall.before, float(fitted[start : fall.first + 1].max()))
    # Of a fall that begins before, what is left of it counts.
    return min(fall.before, float(value[start])) if start < fall.last else None


def high_loss(loss: np.ndarray, low_loss: float = DEFAULTS.low_loss) -> np.ndarray:
    """Whether the training loss is known not to be low, at each point.

    It is low once it has fallen to a tenth of the way from where it was to its lowest; a loss that only rises is low at
    its first point alone.

    Args:
        loss: at each point of a run, [T].
        low_loss: the fraction of the way.
    """
    known = loss[np.isfinite(loss)]
    if not len(known):
        return np.isinf(loss)
    least = known.min()
    most = np.fmax.accumulate(np.where(np.isfinite(loss), loss, least))
    return loss > least + low_loss * (most - least)


def since_risen(trajectory: Trajectory, settings: DetectionSettings = DEFAULTS) -> int | None:
    """The point of the lowest training loss where it rises from there and stays high, off any minimum; else None.

    That is what targets do that move, as in reinforcement learning, and trainings that diverge: there is no one loss
    that λ could be of. A last quarter (three points at least) that is high by its median stays so.

    Args:
        trajectory: of the run.
        settings: what is low, and how many snapshots may be at a minimum.
    """
    loss = trajectory.column("train_loss")
    position = np.flatnonzero(np.isfinite(loss))
    if not len(position) or trajectory.data is not None:  # of other data, it may well rise
        return None
    lowest = int(position[np.argmin(loss[position])])
    after = position[position > lowest]
    last = after[-max(3, len(position) // 4) :]
    if len(last) < 3:
        return None
    end, fallen = float(np.median(loss[last])), float(loss[position[position <= lowest]].max() - loss[lowest])
    if end <= max(loss[lowest] + settings.low_loss * fallen, 2 * loss[lowest]):
        return None
    at_minimum = trajectory.column("reliable")[after].mean()
    return lowest if at_minimum <= settings.max_at_minimum else None


def risen_in_words(trajectory: Trajectory) -> str:
    """One sentence on a training loss that rises and stays high; empty where it does not.

    Args:
        trajectory: of the run.
    """
    lowest = since_risen(trajectory)
    if lowest is None:
        return ""
    points = [point for point in trajectory.points[lowest:] if point.train_loss is not None]
    begun, ended = points[0], points[-1]
    return (
        f"The training loss rises from {begun.train_loss:.3g} at step {begun.step} to {ended.train_loss:.3g} at step "
        f"{ended.step}: targets that move, or training that diverges. λ is then not that of one loss, and nothing is "
        "called a transition there."
    )


def label_of(
    trajectory: Trajectory,
    onset: int,
    end: int,
    measured: Measured,
    peak: float | None,
    lowest: float,
    doubt: str | None,
    settings: DetectionSettings = DEFAULTS,
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
        settings: from which changes on there is a label.
    """
    before, after = measured.before, measured.after
    loss = trajectory.column("train_loss")
    if trajectory.data is not None:
        return None, "no label: not measured on the run's training samples"
    if not np.isfinite(loss[[onset, end]]).all():
        return None, "no label: the training loss is not known"
    if after > before:
        fall = f"λ rises while the training loss falls from {loss[onset]:.3g} to {loss[end]:.3g}"
        floor = min(0.0, float(np.nanmin(loss)))  # of a likelihood's losses zero is no bound
        bound = floor + settings.memorisation_loss * (loss[onset] - floor)
        if np.nanmin(loss[: onset + 1]) < bound:
            return None, f"no label: {fall}; before, it has risen from {np.nanmin(loss[: onset + 1]):.3g}"
        if loss[end] < bound:
            return "memorisation", fall
        if loss[end] < loss[onset]:
            return None, f"no label: {fall} only"
        return None, "no label: λ rises, but the training loss does not fall with it"
    if peak is None:
        if np.nanargmin(loss) < onset:
            return (
                None,
                f"no label: λ falls while the training loss, {loss[onset]:.3g}, has risen from {np.nanmin(loss):.3g}",
            )
        return None, "no label: λ falls while the training loss is not yet low"
    share, error = (1 - lowest / peak, measured.error / peak) if peak > 0 else (0.0, 0.0)
    following = trajectory.follows_curvature
    least = settings.min_generalisation_following if following else settings.min_generalisation
    if share - error < least:
        known = f"{100 * share:.0f}" if share < least else f"{100 * share:.0f} ± {100 * error:.0f}"
        return None, f"no label: λ falls by only {known} % while the training loss stays low"
    if doubt is not None:
        return None, f"no label: λ falls by {100 * share:.0f} %, but {doubt}"
    more = " in all" if peak > before or lowest < after else ""
    evidence = f"λ falls by {100 * share:.0f} %{more} while the training loss stays low"
    accuracy = trajectory.column("val_accuracy")
    if np.isfinite(accuracy[end]) and np.isfinite(accuracy).any():
        # As it is when λ begins to fall: where any training begins, it is that of chance.
        start = next((value for value in accuracy[onset::-1] if np.isfinite(value)), math.nan)
        verb = "confirms" if accuracy[end] >= start + settings.min_validation_gain else "contradicts"
        evidence += f"; validation {verb}: accuracy {start:.2f} before, {accuracy[end]:.2f} at its end"
    return "generalisation", evidence
