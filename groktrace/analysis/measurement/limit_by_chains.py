"""The learning coefficient of networks too large for particles: chains at ever higher resolution."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from groktrace.analysis.measurement.limit import LadderPoint, LearningCoefficient, in_double, refuse_scale
from groktrace.analysis.measurement.llc import (
    LEAVING,
    LEFT,
    NOT_LOCAL,
    OFF_MINIMUM,
    PERHAPS_OFF,
    TOO_FEW_DRAWS,
    LLCEstimate,
)
from groktrace.analysis.measurement.measure import Objective, SnapshotMetrics
from groktrace.analysis.measurement.pilot import choose_sampling, choose_scale
from groktrace.analysis.progress import ProgressCallback, silent
from groktrace.analysis.tuning import LIMIT
from groktrace.sampling.calibration import Scale
from groktrace.sampling.mode import Mode

_DESCENT, _CHOICE, _RUNGS = "descent", "locality, samples, batches", "sampling at each nβ"
# What does not end a ladder. Where directions are singular, w̄ is off w* at a minimum, too; and where the loss flattens
# out, higher rungs show what λ̂ comes to.
_GOES_ON = (OFF_MINIMUM, PERHAPS_OFF, LEAVING, TOO_FEW_DRAWS)
# What chains that are held closer to w* may not do.
_TOO_WIDE = (LEAVING, LEFT, NOT_LOCAL)


@dataclass(frozen=True)
class _Climb:
    """What the rungs of one γ gave.

    Attributes:
        scale: γ, and nβ of the last rung.
        ladder: λ̂ at each nβ.
        within: bounds of λ; None where there are none.
        spent: steps of all chains, and gradients of the descent.
        reasons: why the ladder is none towards λ; empty where it is.
    """

    scale: Scale
    ladder: tuple[LadderPoint, ...]
    within: tuple[float, float] | None
    spent: int
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class _Bottom:
    """Where a snapshot's loss is least nearby.

    Attributes:
        weights: tensors by name.
        metrics: of these.
        distance: from w*.
        spent: gradients that it took.
    """

    weights: Mapping[str, Tensor]
    metrics: SnapshotMetrics
    distance: float
    spent: int


def limit_by_chains(
    objective: Objective,
    weights: Mapping[str, Tensor],
    metrics: SnapshotMetrics,
    key: int = 0,
    progress: ProgressCallback = silent,
) -> LearningCoefficient:
    """λ of the basin of a snapshot, from chains whose nβ grows tenfold from rung to rung at one γ.

    They begin, and are held, where the loss is least near w*: a trained network is hardly ever there.

    Args:
        objective: loss, data and settings.
        weights: tensors by name.
        metrics: of the same snapshot.
        key: what the noise is keyed by beside the seed.
        progress: called with (phase, rungs done, rungs at most).

    Raises:
        SettingsError: a setting is given that a limit does not have.
        TaskError: the loss cannot be computed in double precision.
    """
    refuse_scale(objective.settings)
    stored = len(objective.loss.tensors[0])
    most = min(LIMIT.max_chain_steps, LIMIT.max_operations // (stored * objective.layout.size))
    # λ of fewer samples is another one.
    settings = replace(objective.settings, samples=stored if objective.large_set else None)
    objective = replace(objective, settings=settings)
    bottom = _descend(objective, weights, metrics, key, most, progress)
    norm = math.sqrt(metrics.norm_squared)
    if bottom.distance > LIMIT.max_mode_distance * norm > 0:
        lower = f"it is {bottom.metrics.train_loss:.3g} where it is {bottom.distance / norm:.2f}‖w*‖ away"
        reason = f"no minimum: the loss, {metrics.train_loss:.3g} at the snapshot, goes on falling; {lower}"
        climb = _Climb(_first_scale(objective, metrics), (), None, bottom.spent, (reason,))
    else:
        climb = _climb_where_chains_stay(objective, bottom, key, most, progress)
    progress(_RUNGS, LIMIT.max_rungs, LIMIT.max_rungs)
    ladder, within, reasons = climb.ladder, climb.within, climb.reasons
    if not reasons and (within is None or _half_width(within) > LIMIT.max_extrapolation):
        last, spent = ladder[-1], climb.spent
        end = "the ladder ends" if len(ladder) == LIMIT.max_rungs else f"{spent} steps of chains are spent"
        reasons = (f"not reached: λ̂ still depends on nβ, and is {last.llc:.4g} at nβ = {last.nbeta:.3g}, where {end}",)
    value = low = high = None
    if within is not None and not reasons:
        value = 0.5 * sum(within)
        half = value * max(_half_width(within), LIMIT.chain_error)
        low, high = value - half, value + half
    return LearningCoefficient(
        llc=value,
        low=low,
        high=high,
        reached=not reasons,
        reasons=reasons,
        plateau=None if reasons else (ladder[-LIMIT.min_rungs].nbeta, ladder[-1].nbeta),
        multiplicity=(),
        ladder=ladder,
        localization=climb.scale.localization,
        loss=metrics.train_loss,
        minimum=bottom.metrics.train_loss,
        distance=bottom.distance / norm if norm else None,
        gradients=climb.spent,
    )


def _first_scale(objective: Objective, metrics: SnapshotMetrics) -> Scale:
    """γ, and nβ of the first rung."""
    return choose_scale(objective, [metrics], resolution=LIMIT.first_resolution)


def _descend(
    objective: Objective,
    weights: Mapping[str, Tensor],
    metrics: SnapshotMetrics,
    key: int,
    most: int,
    progress: ProgressCallback,
) -> _Bottom:
    """Follow the posterior's mode from w* along all rungs, as γ lets it go.

    Args:
        objective: loss and data.
        weights: tensors by name.
        metrics: of these.
        key: what the start of a power iteration is keyed by.
        most: gradients of all that follows; a share of them may be spent here.
        progress: see `limit_by_chains`.
    """
    if objective.loss.micro_batch is not None:  # of networks this large no ladder comes to an end
        return _Bottom(weights, metrics, 0.0, 0)
    scale, loss = _first_scale(objective, metrics), objective.loss
    loss, anchor = in_double(loss.subset(None) if objective.large_set else loss, weights)
    mode = Mode(loss, anchor, scale.localization)
    for rung in range(LIMIT.max_rungs):
        progress(_DESCENT, rung, LIMIT.max_rungs)
        nbeta, before = scale.nbeta * LIMIT.rung_ratio**rung, math.inf
        while mode.gradients < LIMIT.descent_share * most and before - mode.energy(nbeta) > LIMIT.descended:
            before = mode.energy(nbeta)
            mode.descend(nbeta)
    progress(_DESCENT, LIMIT.max_rungs, LIMIT.max_rungs)
    distance = float(mode.displacement.norm())
    moved = {**weights, **objective.layout.unflatten((anchor + mode.displacement).float())}
    (found,) = objective.metrics([moved], [metrics.step], [key])
    if not found.train_loss < metrics.train_loss:
        return _Bottom(weights, metrics, 0.0, mode.gradients)
    return _Bottom(moved, found, distance, mode.gradients)


def _climb_where_chains_stay(
    objective: Objective, bottom: _Bottom, key: int, most: int, progress: ProgressCallback
) -> _Climb:
    """The rungs at the first γ at which chains stay in the basin, or at the last that is tried.

    Args:
        objective: loss, data and settings.
        bottom: where chains begin.
        key: see `limit_by_chains`.
        most: steps of all chains, at most.
        progress: see `limit_by_chains`.
    """
    settings = objective.settings
    progress(_CHOICE, 0, 1)
    first = replace(objective, settings=replace(settings, resolution=LIMIT.first_resolution))
    scale = choose_sampling(first, lambda step: dict(bottom.weights), [bottom.metrics], lambda step: key)
    progress(_CHOICE, 1, 1)

    def estimate(scale: Scale) -> LLCEstimate:
        return objective.estimate([bottom.weights], [bottom.metrics], scale, [key])[0]

    climb = _climb(estimate, scale, bottom.spent, most, settings.rtol, progress)
    tries = LIMIT.narrowings if settings.localization is None and settings.locality is None else 0
    while tries and any(reason.startswith(_TOO_WIDE) for reason in climb.reasons):
        tries, held = tries - 1, 1 / LIMIT.narrower**2
        scale = scale._replace(nbeta=held * scale.nbeta, localization=held * scale.localization)
        climb = _climb(estimate, scale, climb.spent, most, settings.rtol, progress)
    return climb


def _climb(
    estimate: Callable[[Scale], LLCEstimate],
    scale: Scale,
    spent: int,
    most: int,
    rtol: float,
    progress: ProgressCallback,
) -> _Climb:
    """λ̂ at ever larger nβ, until λ is between close bounds, the budget ends or something speaks against it.

    Args:
        estimate: gives λ̂.
        scale: of the first rung.
        spent: gradients before.
        most: these and steps of chains, at most.
        rtol: half of the bounds' distance that is close enough, in standard errors of a normal distribution.
        progress: see `limit_by_chains`.
    """
    ladder: list[LadderPoint] = []
    within: tuple[float, float] | None = None
    reasons: tuple[str, ...] = ()
    while len(ladder) < LIMIT.max_rungs:
        progress(_RUNGS, len(ladder), LIMIT.max_rungs)
        found = estimate(scale)
        steps = found.chains * sum(int(found.diagnostics.get(name) or 0) for name in ("steps", "lost_steps"))
        spent += steps
        reasons = tuple(reason for reason in found.reasons if not reason.startswith(_GOES_ON))
        if found.llc is None or found.stderr is None or reasons:
            break
        ladder.append(LadderPoint(scale.nbeta, found.llc, found.stderr))
        reasons = _against(ladder, found)
        within = bounds(ladder)
        enough = within is not None and _half_width(within) <= 1.96 * rtol
        # A relaxation takes √10 times as many steps at the next rung.
        if reasons or enough or spent + steps * LIMIT.rung_ratio**0.5 > most:
            break
        scale = scale._replace(nbeta=LIMIT.rung_ratio * scale.nbeta)
    return _Climb(scale, tuple(ladder), within, spent, reasons)


def bounds(ladder: Sequence[LadderPoint]) -> tuple[float, float] | None:
    """An interval of λ from λ̂ along a ladder, where its growth halves from rung to rung; None where it does not.

    λ̂ = ½Σ nβh/(nβh + γ) of a bowl is below λ, and grows towards it as directions come into sight; so does λ̂ of
    singular directions. That is one bound. The other is what λ̂ would come to if growth went on to shrink as it did in
    the last two rungs, in the one where it shrank by less. Where it did not halve, by more than errors explain, there
    is none: of a trained network curvatures lie decades apart, and more may follow. Nor is there where λ̂ falls, as it
    does off a minimum.

    Args:
        ladder: each nβ as many times the last; nβ ascending.
    """
    if len(ladder) < LIMIT.min_rungs:
        return None
    then, last = ladder[-2:]
    error = math.hypot(then.stderr, last.stderr)
    if last.llc <= 0 or last.llc < then.llc - 3 * error:
        return None
    shrinking = [_shrinking(*ladder[-4:-1]), _shrinking(*ladder[-3:])]
    if any(share - off > LIMIT.shrinking for share, off in shrinking):
        return None
    shrinks = max(share + off for share, off in shrinking)
    if shrinks >= 1:
        return None
    half, growth = 1.96 * last.stderr, max(last.llc - then.llc, 0.0) + error
    return max(last.llc - half, 0.0), last.llc + growth * shrinks / (1 - shrinks) + half


def _shrinking(before: LadderPoint, then: LadderPoint, last: LadderPoint) -> tuple[float, float]:
    """Growth over the growth of the rung before, and its error."""
    earlier, later = then.llc - before.llc, max(last.llc - then.llc, 0.0)
    errors = math.hypot(before.stderr, then.stderr), math.hypot(then.stderr, last.stderr)
    if earlier <= 2 * errors[0]:  # nothing that could shrink
        return LIMIT.shrinking, 0.0
    return later / earlier, math.hypot(errors[1], later / earlier * errors[0]) / earlier


def _half_width(within: tuple[float, float]) -> float:
    """Half of an interval, relative to its middle."""
    return (within[1] - within[0]) / (within[0] + within[1])


def _against(ladder: Sequence[LadderPoint], estimate: LLCEstimate) -> tuple[str, ...]:
    """Why the end of a ladder is none towards λ."""
    last = ladder[-1]
    if last.llc < -3 * last.stderr:
        return (f"no minimum: λ̂ is {last.llc:.4g} at nβ = {last.nbeta:.3g}, as the loss is lower elsewhere",)
    leaving = [reason for reason in estimate.reasons if reason.startswith(LEAVING)]
    return tuple(leaving) if len(ladder) >= LIMIT.min_rungs else ()
