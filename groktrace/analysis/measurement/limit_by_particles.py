"""The learning coefficient itself, from particles that are annealed to ever larger nβ."""

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from groktrace.analysis.measurement.limit import LadderPoint, LearningCoefficient, in_double, refuse_scale
from groktrace.analysis.measurement.measure import Objective
from groktrace.analysis.progress import ProgressCallback, silent
from groktrace.analysis.tuning import LIMIT
from groktrace.sampling.annealing import Level, Particles
from groktrace.sampling.diagnostics import student
from groktrace.sampling.noise import generator_for
from groktrace.sampling.posterior import StackedLoss
from groktrace.sampling.settings import ResolvedSettings


def limit_by_particles(
    objective: Objective,
    weights: Mapping[str, Tensor],
    norm_squared: float,
    key: int = 0,
    progress: ProgressCallback = silent,
) -> LearningCoefficient:
    """λ of the basin of a snapshot, from particles annealed to ever larger nβ.

    Where neither γ nor locality is given, two Gaussians are tried, one as wide as the weights and one as wide as chains
    go. λ of a smaller neighbourhood is the larger one, or the same, but takes a larger nβ to be seen: of two limits the
    larger is the closer.

    Args:
        objective: loss, data and settings: locality or γ, rtol, seed, and which weights move.
        weights: tensors by name.
        norm_squared: ‖w*‖².
        key: what the noise is keyed by beside the seed.
        progress: called with (phase, decades of nβ done, decades at most), in a phase for each Gaussian.

    Raises:
        SettingsError: a setting is given that a limit does not have.
        TaskError: the loss cannot be computed in double precision.
    """
    settings, dimension = objective.settings, objective.layout.size
    refuse_scale(settings)
    localities = LIMIT.localities if settings.locality is None else (settings.locality,)
    widths = [dimension / (locality**2 * norm_squared) for locality in localities if norm_squared > 0]
    if settings.localization is not None or not widths:  # of all weights zero, any will do
        widths = [settings.localization or 1.0]
    loss, anchor = in_double(objective.loss, weights)
    found = []
    for number, localization in enumerate(widths, start=1):
        phase = "annealing" if len(widths) == 1 else f"annealing, width {number} of {len(widths)}"
        found.append(_find_limit(loss, anchor, localization, settings, key, partial(progress, phase)))
    return _closer(found)


def _closer(found: Sequence[LearningCoefficient]) -> LearningCoefficient:
    """The limit that is closer to λ: the surer one where two agree, else the larger; the first where there is none."""
    reached = [limit for limit in found if limit.reached]
    if not reached:
        return found[0]
    largest = max(reached, key=lambda limit: limit.llc or 0.0)
    agreeing = [limit for limit in reached if (limit.high or 0.0) >= (largest.low or 0.0)]
    return min(agreeing, key=lambda limit: (limit.high or 0.0) - (limit.low or 0.0))


def _find_limit(
    loss: StackedLoss,
    anchor: Tensor,
    localization: float,
    settings: ResolvedSettings,
    key: int,
    progress: Callable[[int, int], None],
) -> LearningCoefficient:
    """The limit at one γ."""
    generator = generator_for(settings.seed, key, 0, "anneal", anchor.device)
    count = min(max(LIMIT.particle_weights // len(anchor), LIMIT.min_particles), LIMIT.max_particles)
    particles = Particles(loss, anchor, localization, (LIMIT.populations, count), generator)
    first, rounding = particles.mode.loss, _rounding(loss, anchor)
    most = min(LIMIT.max_nbeta, LIMIT.resolved / rounding if rounding else math.inf)
    levels: list[Level] = []
    fit: AsymptoticFit | None = None
    norm = float(anchor.norm())
    size = norm or math.sqrt(len(anchor) / localization)
    decades = 0
    for levels in _anneal(particles, most, size):
        decades = max(1, math.ceil(math.log10(most / levels[0].nbeta)))
        progress(min(int(math.log10(levels[-1].nbeta / levels[0].nbeta)), decades - 1), decades)
        fit = fit_limit(levels)
        if fit is None or levels[-1].nbeta < LIMIT.sufficient_growth * fit.start:
            continue
        if fit.stderr <= LIMIT.extrapolation_rtol * settings.rtol * fit.level:
            break
    least = particles.least_loss()
    counted = _counted(levels, least)
    stays = counted == levels and not _has_left(particles, size)
    if counted != levels:
        fit = fit_limit(counted)
        levels = counted if fit is not None else levels  # what does not count is shown where there is nothing else
    reasons = _reasons(fit, levels, particles, most, size)
    if fit is None and counted != levels and not _has_left(particles, size):
        at = f"L = {particles.mode.loss:.4g} at the posterior's mode, {least:.4g} farther down"
        reasons = (
            f"no minimum: the loss still falls ({at}), so that beyond nβ = {counted[-1].nbeta:.3g} λ̂ is too low",
        )
    value = low = high = None
    if fit is not None and not reasons:
        mean, error = _stay(particles, settings.rtol) if stays else (fit.level, fit.error)
        value = mean + fit.extrapolation
        # What is left of the way is extrapolated from a ladder that has errors of its own at its end.
        half = 1.96 * math.hypot(error, fit.stderr, LIMIT.extrapolation_error * fit.extrapolation)
        low, high = value - half, value + half
    progress(decades, decades)  # it may well end early
    return LearningCoefficient(
        llc=value,
        low=low,
        high=high,
        reached=not reasons,
        reasons=reasons,
        plateau=None if fit is None or reasons else (fit.start, levels[-1].nbeta),
        multiplicity=() if fit is None or reasons else fit.multiplicity,
        ladder=tuple(
            LadderPoint(level.nbeta, statistics.fmean(level.llc), _population_error(level.llc)) for level in levels
        ),
        localization=localization,
        loss=first,
        minimum=particles.mode.loss,
        distance=float(particles.mode.displacement.norm()) / norm if norm else None,
        gradients=particles.gradients,
    )


def _rounding(loss: StackedLoss, anchor: Tensor) -> float:
    """By how much L(w*) scatters as w* is moved in its last digits."""
    directions = torch.linspace(-1, 1, LIMIT.roundings, dtype=anchor.dtype, device=anchor.device)
    nudged = anchor * (1 + 4 * torch.finfo(anchor.dtype).eps * directions[:, None])
    return float(torch.cat([loss.gradients(one[None])[0] for one in nudged]).std())


def _anneal(particles: Particles, most: float, size: float) -> Iterator[list[Level]]:
    """The levels so far, twice a decade, until nβ is `most` or the budget is spent."""
    levels: list[Level] = []
    shown = 0.0
    while particles.nbeta < most and particles.gradients < LIMIT.max_gradients:
        level = particles.cool(most)
        if levels and _has_left(particles, size):  # what comes now is another basin's
            break
        levels.append(level)
        if particles.nbeta > LIMIT.check_ratio * shown:
            shown = particles.nbeta
            yield levels
    yield levels


def _counted(levels: Sequence[Level], least: float) -> list[Level]:
    """Drop the last levels, where measuring λ̂ from the lowest loss found would change it by more than `LIMIT.offset`.

    Where the data hold a solution to their own precision only, losses below that of the mode lie all around.
    """
    sure = [level.nbeta * (level.minimum - least) <= LIMIT.offset * statistics.fmean(level.llc) for level in levels]
    return list(levels[: max((i for i, is_sure in enumerate(sure) if is_sure), default=0) + 1])


def _has_left(particles: Particles, size: float) -> bool:
    """Whether the posterior's mode has jumped, or is so far from w*, that it is another basin's.

    Args:
        particles: with their mode.
        size: ‖w*‖, or the width of the Gaussian where that is 0.
    """
    return (
        particles.jump > LIMIT.max_mode_jump * size
        or float(particles.mode.displacement.norm()) > LIMIT.max_mode_distance * size
    )


def _stay(particles: Particles, rtol: float) -> tuple[float, float]:
    """λ̂ at the particles' nβ, and its standard error.

    The variance is the mean of two estimates, taken to have equal degrees of freedom: from the populations' means over
    all rounds, and from their scatter within each round, as if rounds were correlated by `LIMIT.round_correlation`.
    """
    rounds: list[tuple[float, ...]] = []
    spent, spent_all = particles.gradients, False
    forgotten = (1 - LIMIT.round_correlation) / (1 + LIMIT.round_correlation)
    wanted = LIMIT.min_rounds
    while True:
        while len(rounds) < wanted and not spent_all:
            rounds.append(particles.move().llc)
            spent_all = particles.gradients - spent >= LIMIT.max_gradients
        found = torch.tensor(rounds[len(rounds) // 4 :], dtype=torch.float64)
        mean, populations = float(found.mean()), found.shape[1]
        within = float(found.var(1).mean()) / (found.numel() * forgotten)
        between = float(found.mean(0).var()) / populations
        error = student(2 * (populations - 1)) * math.sqrt((between + within) / 2)
        if 1.96 * error <= rtol * mean or wanted >= LIMIT.max_rounds or spent_all:
            return mean, error
        wanted *= 2


def _population_error(values: Sequence[float]) -> float:
    """Standard error of the mean of independent values; twice as much on either side covers 95 %."""
    return student(len(values) - 1) * float(torch.tensor(values, dtype=torch.float64).var() / len(values)) ** 0.5


class AsymptoticFit(NamedTuple):
    """λ̂ along a ladder, as far as it has its asymptotic form; see `fit_limit`.

    Attributes:
        start: nβ from which on it is.
        level: λ̂ at the end.
        error: its standard error.
        extrapolation: λ minus `level`, by the fit.
        stderr: the standard error of `extrapolation`.
        multiplicity: the probability of m = 1, 2, ...
    """

    start: float
    level: float
    error: float
    extrapolation: float
    stderr: float
    multiplicity: tuple[float, ...]


def fit_limit(levels: Sequence[Level]) -> AsymptoticFit | None:
    """The longest end of a ladder along which λ̂ has its asymptotic form; None where there is none of some decades.

    Z(nβ) = C·(nβ)^(−λ)·(log nβ)^(m − 1) at large nβ, with the multiplicity m (Watanabe 2009, Main Theorem 6.2), so that
    λ̂ = −d log Z/d log nβ = λ − (m − 1)/(log nβ + c), less a power of nβ that vanishes: in a bowl γ/nβ.

    Args:
        levels: nβ ascending.
    """
    places = torch.tensor([math.log(level.nbeta) for level in levels], dtype=torch.float64)
    llc = torch.tensor([level.llc for level in levels], dtype=torch.float64)
    means = llc.mean(1)
    end = float(means[places > places[-1] - LIMIT.end_length].mean())
    latest = int((places <= places[-1] - LIMIT.min_log_length).sum())
    for start in range(latest):
        if means[start] < LIMIT.min_share * end:
            continue
        fit = _fit(places[start:], llc[start:])
        if fit is not None:
            return fit
    return None


def _fit(places: Tensor, llc: Tensor) -> AsymptoticFit | None:
    """The asymptotic form along all of these levels, [J] and [J, P]; None where it does not describe them."""
    count, populations = llc.shape
    means = llc.mean(1)
    scatter = (llc - means[:, None]) / means[:, None]
    following = float((scatter[1:] * scatter[:-1]).sum() / scatter.square().sum().clamp_min(1e-300))
    following = min(max(following, 0.0), LIMIT.max_residual_correlation)
    independent = (1 - following) / (1 + following)
    variance = float(scatter.square().sum()) / (count * (populations - 1)) / populations
    weights = independent / (variance * means.square())  # of the levels, as if they were independent
    since = places - places[0]
    shifts = torch.logspace(*LIMIT.shifts, dtype=torch.float64)[:, None, None]
    transients = torch.tensor(LIMIT.transients, dtype=torch.float64)[:, None]
    early = (-transients * since).exp()  # [B, J]
    chances, beyonds, levels, misfits = [], [], [], []
    for m in range(1, LIMIT.multiplicities + 1):
        missing = (m - 1) / (since + shifts)  # [C, 1, J]
        value, transient = _line(early, means + missing, weights)  # [C, B]
        residuals = means + missing - value[..., None] + transient[..., None] * early
        misfit = (residuals.square() * weights).sum(-1)
        chances.append(0.5**m * (-0.5 * misfit).exp() / misfit.numel())
        fading = (transient[..., None] * early)[..., -1]
        beyonds.append(torch.stack([missing[..., -1].expand_as(fading), fading]))
        levels.append(value - beyonds[-1].sum(0))
        misfits.append(float(misfit.min()))
    freedom = independent * (count - 2)
    if min(misfits) > freedom + LIMIT.misfit * math.sqrt(2 * freedom):
        return None
    chance, beyond, level = torch.stack(chances), torch.stack(beyonds, 1), torch.stack(levels)
    chance = chance / chance.sum()
    missing, fading = (chance * beyond).sum((1, 2, 3))
    # What fades is as uncertain as it is large: the ladder itself is off by something like it.
    variance = (chance * (beyond[0] - missing).square()).sum() + (chance * beyond[1].square()).sum()
    return AsymptoticFit(
        start=math.exp(places[0]),
        level=float((chance * level).sum()),
        error=_population_error(((llc * weights[:, None]).sum(0) / weights.sum()).tolist()),
        extrapolation=float(missing + fading),
        stderr=float(variance.sqrt()),
        multiplicity=tuple(chance.sum((1, 2)).tolist()),
    )


def _line(early: Tensor, values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Least squares of values by a − b·early, b ≥ 0: both, [C, B] for values [C, 1, J] and early [B, J]."""
    total = weights.sum()
    centre, mean = (early * weights).sum(-1) / total, (values * weights).sum(-1) / total
    offsets = early - centre[:, None]
    slope = (offsets * values * weights).sum(-1) / (offsets.square() * weights).sum(-1)
    fall = (-slope).clamp_min(0)
    return mean + fall * centre, fall


def _reasons(
    fit: AsymptoticFit | None, levels: Sequence[Level], particles: Particles, most: float, size: float
) -> tuple[str, ...]:
    """Why there is no limit."""
    if fit is not None and fit.stderr <= LIMIT.max_extrapolation * fit.level:
        if statistics.fmean(at.disagreement for at in levels if at.nbeta >= fit.start) <= LIMIT.disagreement:
            return ()
        return ("not equilibrated: populations of particles find another λ̂ each",)
    if _has_left(particles, size):
        moved = float(particles.mode.displacement.norm())
        where = (
            f"at a distance of {moved:.2g} (‖w*‖ or width: {size:.2g}), which counts from nβ = {particles.nbeta:.3g}"
        )
        return (f"left the basin: the loss is lower {where}; a smaller locality keeps nearer",)
    last = levels[-1]
    if particles.nbeta < most:
        end = f"the budget of {LIMIT.max_gradients} gradients is spent"
    elif most < LIMIT.max_nbeta:
        end = "double precision tells losses no longer apart"
    else:
        end = "the ladder ends"
    value = sum(last.llc) / len(last.llc)
    return (f"not reached: λ̂ still depends on nβ, and is {value:.4g} at nβ = {last.nbeta:.3g}, where {end}",)
