"""Temperature, localisation, step size and run length from the curvature and size of the network."""

import math
from typing import NamedTuple

from groktrace.errors import SettingsError
from groktrace.sampling.kernels.base import Kernel
from groktrace.sampling.settings import ResolvedSettings, SamplingSettings
from groktrace.sampling.tuning import CALIBRATION, WHOLE_DATA, Effort


class Scale(NamedTuple):
    """Where the posterior of a run's snapshots is measured.

    Attributes:
        nbeta: nβ.
        localization: γ.
        curvature: where nβ follows the snapshots' top curvature h_max, the one that `nbeta` belongs to: others are
            measured at nβ·curvature/h_max. None where one nβ serves all.
        samples: of the data, how many are used; None for all that are stored.
        batch_size: samples a gradient; None for all that are used.
        locality: ρ that γ was derived from; None where γ was given.
    """

    nbeta: float
    localization: float
    curvature: float | None = None
    samples: int | None = None
    batch_size: int | None = None
    locality: float | None = None


def resolution(settings: SamplingSettings, follow: bool) -> float:
    """κ.

    Args:
        settings: resolution, where given.
        follow: whether nβ follows each snapshot's curvature.
    """
    return settings.resolution or (CALIBRATION.resolution_following if follow else CALIBRATION.resolution)


def posterior_scale(
    settings: SamplingSettings,
    n: int,
    dimension: int,
    norm_squared: float,
    top_curvature: float,
    follow: bool = False,
) -> Scale:
    """nβ and γ: as given, or from the two scale-free dials.

    γ = D/(ρ²‖w*‖²), so that the flat directions spread to E‖w − w*‖ ≈ ρ‖w*‖; nβ = κγ/h_max, so that curvatures down
    to h_max/κ count.

    Args:
        settings: nbeta, localization, locality (ρ), resolution (κ).
        n: number of training samples.
        dimension: D.
        norm_squared: typical ‖w*‖² after memorisation.
        top_curvature: typical h_max after memorisation.
        follow: whether nβ follows each snapshot's curvature.

    Returns:
        nβ and γ.

    Raises:
        SettingsError: a dial is asked for where the network leaves it undefined.
    """
    localization, locality = settings.localization, None
    if localization is None:
        locality = settings.locality or CALIBRATION.locality
        if not norm_squared > 0:
            raise SettingsError("localization: cannot be derived where all weights are zero; give a number.")
        localization = dimension / (locality**2 * norm_squared)
    if settings.nbeta == "wbic":
        if n < 2:
            raise SettingsError(f"nbeta: 'wbic' is n/log n and needs at least 2 samples, got {n}; give a number.")
        return Scale(n / math.log(n), localization, locality=locality)
    if settings.nbeta not in (None, "curvature"):
        return Scale(float(settings.nbeta), float(localization), locality=locality)
    if not top_curvature > 0:
        raise SettingsError(
            "nbeta: cannot be derived from a curvature that is zero within rounding, as the loss is flat around the "
            "weights; give nbeta."
        )
    nbeta = resolution(settings, follow) * localization / top_curvature
    return Scale(nbeta, localization, top_curvature if follow else None, locality=locality)


def step_size(nbeta: float, localization: float, top_curvature: float) -> float:
    """ε for one snapshot; `top_curvature` is its h_max."""
    tuned = CALIBRATION
    return 2 * tuned.step_fraction / (tuned.curvature_safety * nbeta * top_curvature + localization)


def run_length(
    settings: ResolvedSettings,
    localization: float,
    epsilon: float,
    cold: bool = False,
    halvings: int = 0,
    effort: Effort = WHOLE_DATA,
    slow: float = 1.0,
) -> tuple[int, int]:
    """Burn-in and first round of draws, in steps.

    Args:
        settings: method and chains; burn_in and draws, where given.
        localization: γ.
        epsilon: ε.
        cold: whether flat directions are not filled at the start, so that the burn-in is longer.
        halvings: how often ε was halved.
        effort: what is spent.
        slow: see `slowdown`.
    """
    relaxation, most = settings.kernel.relaxation(epsilon, localization, halvings), CALIBRATION.max_steps // 2
    relaxations = CALIBRATION.burn_in_relaxations_cold if cold else CALIBRATION.burn_in_relaxations
    burn_in = min(math.ceil(relaxations * relaxation), most)
    share = max(1.0, CALIBRATION.draw_relaxations / settings.chains)
    if effort.draws is None:
        draws = min(max(CALIBRATION.min_draws, math.ceil(share * relaxation)), most)
    else:
        draws = math.ceil(slow * effort.draws)
    return (
        burn_in if settings.burn_in is None else settings.burn_in,
        draws if settings.draws is None else settings.draws,
    )


def slowdown(kernel: Kernel, epsilon: float, fitting: float, halvings: int = 0) -> float:
    """Steps in which the stiffest directions forget their start, over those that they take at the step that fits them.

    Args:
        kernel: of the dynamics.
        epsilon: ε.
        fitting: the ε that the curvature at w* calls for.
        halvings: how often it was halved.
    """
    stiffness = 2 * CALIBRATION.step_fraction / fitting
    return max(1.0, kernel.relaxation(epsilon, stiffness, halvings) / kernel.relaxation(fitting, stiffness))


def more_draws(draws: int, needed: float) -> int:
    """How many draws to add before it is asked again whether they suffice.

    A quarter of the draws so far are added at least, and as many again at most.

    Args:
        draws: so far.
        needed: how many times as many.
    """
    return math.ceil(draws * min(max(needed - 1, CALIBRATION.min_growth), 1.0))


def resolve(settings: SamplingSettings, dimension: int, stacked: bool, vectorised: bool = True) -> ResolvedSettings:
    """The settings for one network; resolved ones stay what they are.

    Args:
        settings: method and chains, where given.
        dimension: D.
        stacked: whether chains run as a stack, and not one at a time as those of large networks.
        vectorised: whether the gradients of a stack are taken at once, and not one after the other.
    """
    method = settings.method or ("baoab" if stacked else "leimkuhler_matthews")
    tuned = CALIBRATION
    free = tuned.stacked_weights // dimension if vectorised else 0
    chains = settings.chains or min(max(tuned.min_chains, free), tuned.max_chains)
    return ResolvedSettings(**{**vars(settings), "method": method, "chains": chains})
