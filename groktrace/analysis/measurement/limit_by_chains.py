"""The learning coefficient of networks too large for particles: chains at ever higher resolution."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from groktrace.analysis.measurement.limit import LadderPoint, LearningCoefficient, refuse_scale
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
from groktrace.analysis.measurement.pilot import choose_sampling
from groktrace.analysis.progress import ProgressCallback, silent
from groktrace.analysis.tuning import LIMIT
from groktrace.sampling.calibration import Scale

_CHOICE, _RUNGS = "locality, samples, batches", "sampling at each nβ"
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
        spent: steps of all chains.
        reasons: why the ladder is none towards λ; empty where it is.
    """

    scale: Scale
    ladder: tuple[LadderPoint, ...]
    within: tuple[float, float] | None
    spent: int
    reasons: tuple[str, ...]


def limit_by_chains(
    objective: Objective,
    weights: Mapping[str, Tensor],
    metrics: SnapshotMetrics,
    key: int = 0,
    progress: ProgressCallback = silent,
) -> LearningCoefficient:
    """λ of the basin of a snapshot, from chains whose nβ grows tenfold from rung to rung at one γ.

    Where chains leave the basin they begin again with a larger γ, unless that is given.

    Args:
        objective: loss, data and settings.
        weights: tensors by name.
        metrics: of the same snapshot, which has to be a minimum.
        key: what the noise is keyed by beside the seed.
        progress: called with (phase, rungs done, rungs at most).

    Raises:
        SettingsError: a setting is given that a limit does not have.
    """
    settings = objective.settings
    refuse_scale(settings)
    progress(_CHOICE, 0, 1)
    first = replace(objective, settings=replace(settings, resolution=LIMIT.first_resolution))
    scale = choose_sampling(first, lambda step: dict(weights), [metrics], lambda step: key)
    progress(_CHOICE, 1, 1)

    def estimate(scale: Scale) -> LLCEstimate:
        return objective.estimate([weights], [metrics], scale, [key])[0]

    climbs = [_climb(estimate, scale, 0, settings.rtol, progress)]
    tries = LIMIT.narrowings if settings.localization is None and settings.locality is None else 0
    while len(climbs) <= tries and any(reason.startswith(_TOO_WIDE) for reason in climbs[-1].reasons):
        held = 1 / LIMIT.narrower**2
        scale = scale._replace(nbeta=held * scale.nbeta, localization=held * scale.localization)
        climbs.append(_climb(estimate, scale, climbs[-1].spent, settings.rtol, progress))
    progress(_RUNGS, LIMIT.max_rungs, LIMIT.max_rungs)
    ladder, within, reasons, spent = climbs[-1].ladder, climbs[-1].within, climbs[-1].reasons, climbs[-1].spent
    if not reasons and (within is None or _half_width(within) > LIMIT.max_extrapolation):
        last = ladder[-1]
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
        localization=climbs[-1].scale.localization,
        loss=metrics.train_loss,
        minimum=metrics.train_loss,
        distance=0.0 if metrics.norm_squared else None,
        gradients=spent,
    )


def _climb(
    estimate: Callable[[Scale], LLCEstimate], scale: Scale, spent: int, rtol: float, progress: ProgressCallback
) -> _Climb:
    """λ̂ at ever larger nβ, until λ is between close bounds, the budget ends or something speaks against it.

    Args:
        estimate: gives λ̂.
        scale: of the first rung.
        spent: steps of chains before.
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
        if reasons or enough or spent + steps * LIMIT.rung_ratio**0.5 > LIMIT.max_chain_steps:
            break
        scale = scale._replace(nbeta=LIMIT.rung_ratio * scale.nbeta)
    return _Climb(scale, tuple(ladder), within, spent, reasons)


def bounds(ladder: Sequence[LadderPoint]) -> tuple[float, float] | None:
    """An interval of λ from λ̂ along a ladder, where its growth shrinks from rung to rung; None where it does not.

    λ̂ = ½Σ nβh/(nβh + γ) of a bowl is below λ, and grows towards it as directions come into sight; so does λ̂ of
    singular directions. That is one bound. The other is what λ̂ would come to if each rung's growth were to that before
    as the last is to the last but one: there are ever fewer directions left, so that it shrinks sooner. Where λ̂ falls,
    as it does off a minimum, there is neither.

    Args:
        ladder: each nβ as many times the last; nβ ascending.
    """
    if len(ladder) < LIMIT.min_rungs:
        return None
    before, then, last = ladder[-3:]
    error = math.hypot(then.stderr, last.stderr)
    if last.llc <= 0 or last.llc < then.llc - 3 * error:
        return None
    growth, earlier = max(last.llc - then.llc, 0.0) + error, then.llc - before.llc
    # Where nothing has grown, there is no factor: a half adds as much as errors may hide.
    shrinks = growth / earlier if earlier > 2 * math.hypot(before.stderr, then.stderr) else 0.5
    if shrinks >= 1:
        return None
    half = 1.96 * last.stderr
    return max(last.llc - half, 0.0), last.llc + growth * shrinks / (1 - shrinks) + half


def _half_width(within: tuple[float, float]) -> float:
    """Half of an interval, relative to its middle."""
    return (within[1] - within[0]) / (within[0] + within[1])


def _against(ladder: Sequence[LadderPoint], estimate: LLCEstimate) -> tuple[str, ...]:
    """Why the end of a ladder is none towards λ."""
    last = ladder[-1]
    if last.llc < -3 * last.stderr:
        return (f"no minimum: λ̂ is {last.llc:.4g} at nβ = {last.nbeta:.3g}, as the loss is lower elsewhere",)
    return tuple(reason for reason in estimate.reasons if reason.startswith(LEAVING) and bounds(ladder) is not None)
