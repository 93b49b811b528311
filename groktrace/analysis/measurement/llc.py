"""One snapshot's local learning coefficient, with its uncertainty and what speaks against it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from groktrace.analysis.measurement.chance import level_of_chance
from groktrace.analysis.tuning import RELIABILITY
from groktrace.records import Record
from groktrace.sampling import diagnostics as diagnose
from groktrace.sampling.settings import ResolvedSettings
from groktrace.sampling.traces import Traces

OFF_MINIMUM = "not at a minimum: the loss falls on moving away from the snapshot"
PERHAPS_OFF = "perhaps not at a minimum: a single chain cannot tell a slope from a loss of higher degree"
# Rounding of a loss, relative to it.
SINGLE = 2.0**-24
# Beginnings of reasons.
LEAVING, LEFT, NOT_LOCAL, TOO_FEW_DRAWS = "leaving the basin", "left the basin", "not local", "too few draws"
# Those after which neither λ̂ nor λ_c is the basin's.
NOT_THE_BASIN = ("no basin", LEFT, LEAVING, NOT_LOCAL, "not equilibrated", "diverging")


@dataclass(frozen=True)
class LLCEstimate(Record):
    """The local learning coefficient at one point w* of weight space.

    λ̂ = nβ·(E[L_n(w)] − L_n(w*)) under the localised tempered posterior (Lau et al. 2023, arXiv 2308.12108).

    Attributes:
        llc: λ̂; None where no chain stayed finite.
        stderr: its standard error, from the effective sample size.
        llc_centred: λ_c = ½·nβ·E[(w − w̄)·∇L_n(w)]; equals λ̂ in a quadratic bowl and, unlike it, is not thrown off
            where w* is no minimum. None with a single chain.
        stderr_centred: its standard error; None with a single chain.
        reliable: whether no diagnostic speaks against λ̂.
        reasons: those that do, in words.
        nbeta: nβ, inverse temperature times sample count.
        localization: γ, strength of the pull towards w*.
        step_size: ε of the sampler; None where nothing was sampled.
        chains: independent chains.
        draws: draws a chain after burn-in.
        burn_in: discarded steps a chain.
        loss: L_n(w*); None where it is not finite.
        diagnostics: `virial` (1 in equilibrium); `anharmonicity` (1 in a quadratic bowl, k for a loss of degree 2k,
            where λ_c is k times λ̂); `rhat`, `ess`, `drift`; `distance` (E‖w − w*‖ relative to ‖w*‖); `halvings` of
            the step size; `lost_steps` of each chain, at step sizes that were given up; `heating` (what minibatch noise
            adds to λ̂, relative to it, which is taken off λ̂ and λ_c where it is small and known not just at most);
            `singular_fluctuation` ν = ½·β·Σ_i Var[ℓ_i], β = nβ/n, over the samples' losses ℓ_i (Watanabe 2009; of 1024
            spread evenly at most, of two minibatches at most where there are; None where the loss is no mean over
            samples); `wbic` n·E[L_n] (Watanabe 2013; None unless nβ = n/log n); `unseen` (by how much λ_c, or λ̂ without
            it, would about be larger on all n training samples, relative to it; 0 where all are used); `batch_effect`
            (by how much the loss of samples together is off the mean over parts of them, at the run's first snapshot).
    """

    llc: float | None
    stderr: float | None
    llc_centred: float | None
    stderr_centred: float | None
    reliable: bool
    reasons: tuple[str, ...]
    nbeta: float
    localization: float
    step_size: float | None
    chains: int
    draws: int
    burn_in: int
    loss: float | None
    diagnostics: dict[str, float | None]


def off_minimum(traces: Traces) -> bool:
    """Whether the loss falls on moving away from w*, so that λ̂ measures a slope and not the basin.

    λ̂ is below λ_c by more than a tenth then, and the chains' mean w̄ has moved off w*, downhill. In equilibrium
    λ_c − ½E[(w − w*)·nβ∇L] = ½γ‖w̄ − w*‖², which tells that along flat directions. Along stiff ones that is little, but
    −½nβ∇L(w*)·(w̄ − w*) is not: in a bowl the two add up to λ_c − λ̂. (A loss of higher degree has λ̂ below λ_c, too,
    but no slope.) With a single chain only λ̂ < 0 tells.
    """
    llc = float(traces.delta_loss.mean())
    if llc < 0 or not traces.centred_draws.shape[1]:
        return llc < 0
    centred, half_virial = traces.centred, 0.5 * float(traces.virial.mean())
    moved = max(0.97 * centred - half_virial, traces.slope + 0.9 * centred - half_virial)
    margin = min(0.9 * centred - llc, moved)
    if margin <= 0:  # nearly always, and the errors take time
        return False
    # nβ∇L(w*)·(w − w*) has twice the slope as its variance, in a bowl.
    of_slope = math.sqrt(0.5 * max(traces.slope, 0.0) / traces.effective_draws(traces.delta_loss))
    return margin > 3 * math.hypot(traces.error(traces.delta_loss), traces.centred_error, of_slope)


def unusable(reason: str, settings: ResolvedSettings, nbeta: float, localization: float) -> LLCEstimate:
    """What is said of a snapshot that cannot be sampled."""
    return LLCEstimate(
        None, None, None, None, False, (reason,), nbeta, localization, None, settings.chains, 0, 0, None, {}
    )


def summarise(
    traces: Traces,
    settings: ResolvedSettings,
    *,
    n: int,
    loss: float,
    norm: float,
    dimension: int,
    nbeta: float,
    localization: float,
    chance: Sequence[float] = (),
    by_centred: bool = False,
    unseen_per_nat: float = 0.0,
    batch_effect: float = 0.0,
    wrong_gradient: str = "",
) -> LLCEstimate:
    """Turn one snapshot's traces into an estimate and judge it.

    Args:
        traces: the draws.
        settings: of the sampling.
        n: number of training samples.
        loss: L_n(w*).
        norm: ‖w*‖.
        dimension: D.
        nbeta: nβ.
        localization: γ.
        chance: training losses of networks that know nothing; the first above `loss` counts.
        by_centred: whether λ_c is the measure, whose error says whether there are draws enough.
        unseen_per_nat: by how much λ is lower on the samples that are used than on all, relative to it, over λ itself.
        batch_effect: see `LLCEstimate`.
        wrong_gradient: what is wrong with the gradient; empty where nothing is.
    """
    if traces.diverged(dimension):
        if traces.fall > dimension:
            reason = f"not in a basin: nβ times the loss falls by {traces.fall:.3g} and more at once, over 1 a weight"
            return unusable(reason, settings, nbeta, localization)
        reason = f"diverging: chains left the snapshot at every step size down to {traces.step_size:.3g}"
        return unusable(reason, settings, nbeta, localization)
    llc, ess = float(traces.delta_loss.mean()), traces.effective_draws(traces.delta_loss)
    stderr = math.sqrt(float(traces.delta_loss.double().var()) / ess)
    centred = stderr_centred = None
    if traces.centred_draws.shape[1]:
        centred, stderr_centred = traces.centred, traces.centred_error
    heated = (RELIABILITY.heating_error if traces.excess else 1.0) * traces.heating > RELIABILITY.heating
    excess = 0.0 if heated else traces.excess  # much of it is not what one measurement says, to first order
    virial = diagnose.virial_ratio(traces.virial - 2 * excess, traces.restraint, dimension)
    anharmonicity = diagnose.anharmonicity(traces.virial, traces.delta_loss)
    distance = math.sqrt(float(traces.restraint.mean()) / localization)
    relative_distance = distance / norm if norm > 0 else math.inf
    rhat, off = diagnose.split_rhat(traces.delta_loss), off_minimum(traces)
    # Chains that drift scatter widely, which is no excuse: in equilibrium one draw of each would tell that well.
    widest = RELIABILITY.widest_virial * math.sqrt(2 * dimension / traces.virial.shape[1])
    virial_error = min(traces.total_virial_error(settings.kernel, localization, dimension), widest) / dimension
    reasons = []
    if wrong_gradient:
        reasons.append(
            f"another gradient: backward gives one that is off the loss's {wrong_gradient}; leave these weights out of "
            "parameters, or stop no gradient"
        )
    ratio_error = traces.error(0.5 * traces.virial - traces.delta_loss) / abs(llc) if llc else 0.0
    # Where all weights are zero there is no length to compare with.
    far = norm > 0 and relative_distance > RELIABILITY.distance
    bent = abs(anharmonicity - 1) > RELIABILITY.anharmonicity + 3 * ratio_error
    guess = level_of_chance(chance, loss)
    climb = llc / nbeta / (guess - loss)
    bowl = float((0.5 * traces.virial - traces.delta_loss).abs().mean()) <= RELIABILITY.quadratic_tolerance * llc
    # Neither of `far` and `bent` alone does harm: in a quadratic bowl the estimate is exact however wide it is, and a
    # singular loss is of higher degree however close one looks.
    if climb > RELIABILITY.climb and not bowl and guess - loss <= RELIABILITY.chance * abs(guess):
        reasons.append(
            f"no basin: the loss at the snapshot, {loss:.4g}, is already that of chance, {guess:.4g}, so that there is "
            "nothing to stay in"
        )
    elif climb > RELIABILITY.climb and not bowl:
        reasons.append(
            f"{LEFT}: the chains' loss has climbed {100 * climb:.0f} % of the way from {loss:.3g} at the "
            f"snapshot to {guess:.3g}, that of chance; use a smaller locality"
        )
    elif llc > 0 and anharmonicity < 1 - RELIABILITY.flattening - 3 * ratio_error:
        reasons.append(
            f"{LEAVING}: the loss flattens out where the chains are, {relative_distance:.2f}‖w*‖ away "
            f"(anharmonicity {anharmonicity:.2f}, expected 1); use a smaller locality"
        )
    elif far and llc > 0 and (bent or off):
        reasons.append(
            f"{NOT_LOCAL}: the chains are {relative_distance:.2f}‖w*‖ away, where the loss is no longer quadratic "
            f"(anharmonicity {anharmonicity:.2f}, expected 1); use a larger localization"
        )
    elif off:
        reasons.append(OFF_MINIMUM)
    elif centred is None and anharmonicity > 1 + RELIABILITY.single_chain_gap + 3 * ratio_error:
        reasons.append(PERHAPS_OFF)
    if abs(virial - 1) > RELIABILITY.virial_gap + 3 * virial_error:
        reasons.append(f"not equilibrated (virial ratio {virial:.3f}, expected 1); needs a longer burn-in")
    elif traces.has_discretization_bias(settings.kernel, localization, dimension):
        reasons.append(f"heated by the sampler's step (virial ratio {virial:.3f}, expected 1); use a smaller step_size")
    if heated:
        reasons.append(
            f"heated by minibatch noise, by about {100 * traces.heating:.0f} %; use a larger batch_size or a smaller "
            "step_size"
        )
    # Half-chains of m effective draws differ by chance: R-hat is then about √(1 + 1/m).
    if rhat > max(RELIABILITY.rhat, math.sqrt(1 + 10 * settings.chains / ess)):
        reasons.append(f"chains disagree (split R-hat {rhat:.2f})")
    rounding = nbeta * SINGLE * abs(loss)
    if rounding > RELIABILITY.rounding * max(abs(llc if centred is None else centred), RELIABILITY.min_llc):
        reasons.append(
            f"rounded: single precision tells losses near {loss:.4g} apart by {rounding:.2g}/nβ, too much for λ̂; "
            "take off the loss what does not depend on the weights"
        )
    llc, stderr = llc - excess, math.hypot(stderr, RELIABILITY.heating_error * excess)
    if centred is not None and stderr_centred is not None:
        centred, stderr_centred = centred - excess, math.hypot(stderr_centred, RELIABILITY.heating_error * excess)
    value, error = llc, stderr
    if by_centred and centred is not None and stderr_centred is not None:
        value, error = centred, stderr_centred
    if traces.slow > 1 and len(traces.delta_loss) < RELIABILITY.passes * traces.slow:
        reasons.append(
            f"{TOO_FEW_DRAWS}: at a step of {traces.step_size:.3g} the stiffest directions take {traces.slow:.0f} to "
            "forget one; use more draws or a larger step_size"
        )
    elif error > 2 * settings.rtol * max(abs(value), RELIABILITY.min_llc) and not reasons:
        reasons.append(f"{TOO_FEW_DRAWS} (standard error {100 * error / max(abs(value), 1e-300):.1f} %)")
    return LLCEstimate(
        llc,
        stderr,
        centred,
        stderr_centred,
        not reasons,
        tuple(reasons),
        nbeta,
        localization,
        traces.step_size,
        settings.chains,
        len(traces.delta_loss),
        traces.burn_in,
        loss,
        {
            "virial": virial,
            "anharmonicity": anharmonicity if math.isfinite(anharmonicity) else None,
            "rhat": rhat,
            "ess": ess,
            "drift": diagnose.drift(traces.delta_loss),
            "distance": relative_distance if norm > 0 else None,
            "halvings": traces.halvings,
            "lost_steps": traces.lost,
            "steps": traces.burn_in + len(traces.delta_loss),
            "heating": traces.heating,
            "singular_fluctuation": None if traces.fluctuation is None else float(traces.fluctuation.mean()),
            "unseen": unseen_per_nat * max(0.0, llc if centred is None else centred),
            "batch_effect": batch_effect,
            "wbic": n * (loss + llc / nbeta) if settings.nbeta == "wbic" else None,
        },
    )
