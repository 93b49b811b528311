"""The tuned numbers of the analysis, each with where it comes from; those of the sampler are in `sampling.tuning`."""

import math
from dataclasses import dataclass

from groktrace.sampling.tuning import CALIBRATION


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """On how much of a large set a snapshot's losses and curvature are measured.

    Attributes:
        evaluated_samples: for losses and accuracies, at least.
        evaluated_bytes: the same in bytes of activations: small samples are cheap.
        parts: of these, or more, whose scatter gives the standard error.
        curvature_samples, curvature_bytes: for the curvature, at least; on six networks it then differs from that of
            all samples by 5 % (in the median).
        most_curvature_samples: for the curvature, at most.
        heavy_share: one in so many of these is among the samples of the largest losses: of a well-fitted set they
            decide the curvature.
        products: with the Hessian, for its largest eigenvalue, where data are used whole.
        large_set_products: the same of a large set,
        settled: and more while the last two add more than this share: after six a transformer's is 30 % too small,
        most_products: up to so many.
        steps_off_minimum: of a chain on a large set, burn-in and draws, after which there are no more of these: what is
            off a minimum cannot become reliable.
        chance_samples: what a network loses that knows nothing is the same on so many, spread evenly, as on all.
    """

    evaluated_samples: int = 256
    evaluated_bytes: int = 2**26
    parts: int = 8
    curvature_samples: int = 128
    curvature_bytes: int = 2**25
    most_curvature_samples: int = 512
    heavy_share: int = 4
    products: int = 8
    large_set_products: int = 6
    settled: float = 0.01
    most_products: int = 24
    steps_off_minimum: int = 40
    chance_samples: int = 256


@dataclass(frozen=True, kw_only=True)
class Pilot:
    """How (nβ, γ), samples and batch size are chosen for a run.

    Attributes:
        fitted: a snapshot counts as fitted once its training loss has fallen to this fraction of the run's range.
        fallen: nβ follows the curvature where that of fitted snapshots ranges over more than this factor: under
            cross-entropy it goes on falling as margins grow, and so would λ̂ in every run.
        localities: ρ, the widest first.
        most_climb: a basin is left where the loss climbs by this share of the way to that of chance; a convention.
        tried: snapshots on which short chains are tried.
        burn_in, draws: of such chains where data are sampled; minibatch noise is measured every 16 steps.
        batch_size: of such chains: on five networks it moved what they tell by a third of that at most.
        few_draws: of such chains where data are used whole.
        aimed: batches are so large that few of the other snapshots are heated by more than is wanted.
        most_missed: a posterior of S samples with m targets each has λ_c lower by about λ_c/(S·m) of it (measured on
            four networks); S is such that this is the most.
        least_samples: S, at least.
        nearly_all: all stored samples are used where there are no more than so many times S: of an LSTM's 620, 480 gave
            λ_c 3 % above that of all at one of three snapshots.
    """

    fitted: float = 0.05
    fallen: float = 10.0
    localities: tuple[float, ...] = (CALIBRATION.locality, 0.1, 0.05, 0.022, 0.01)
    most_climb: float = 0.2
    tried: int = 2
    burn_in: int = 20
    draws: int = 12
    batch_size: int = 32
    few_draws: int = 32
    aimed: float = 0.6
    most_missed: float = 0.03
    least_samples: int = 512
    nearly_all: float = 1.25


@dataclass(frozen=True, kw_only=True)
class Passes:
    """In what portions the snapshots of a run are sampled.

    Attributes:
        coarse: snapshots of the first pass, from which a run's scale is chosen where data are sampled.
        round: snapshots of a later pass, at least; of the run alone, so that neither memory nor workers decide which
            are sampled.
        stacks: of a pass where data are used whole.
        partial_seconds: between two results that show what there is so far.
        grace_seconds: that what was begun may take when the time is up, before it is given up: most of it is then done.
        adaptive_coarse: snapshots of the first pass of `adaptive`.
        adaptive_share: of all snapshots, that `adaptive` samples at most, but for runs so short that it is no matter.
        phase: snapshots on either side of a transition whose λ tells its levels.
        suspicious_errors, suspicious_change: outside transitions, neighbours that differ by so many errors, and by this
            fraction of the largest level, are suspect.
    """

    coarse: int = 16
    round: int = 8
    stacks: int = 16
    partial_seconds: float = 15.0
    grace_seconds: float = 20.0
    adaptive_coarse: int = 64
    adaptive_share: float = 0.1
    phase: int = 32
    suspicious_errors: float = 4.0
    suspicious_change: float = 0.05


@dataclass(frozen=True, kw_only=True)
class Reliability:
    """What is tolerated before a number is called unreliable, in each case plus three errors of the diagnostic.

    Conventions, if not said otherwise.

    Attributes:
        virial_gap: of the virial and restraint from D, relative to it.
        anharmonicity: of ½E[(w − w*)·nβ∇L]/λ̂ from 1, beyond which the loss is not quadratic where the chains go.
        rhat: split R̂, as Gelman & Rubin.
        distance: of the chains from w*, relative to ‖w*‖.
        heating: by minibatches, relative to λ̂.
        climb: of the loss, as a share of the way to that of chance.
        chance: a loss that is below that of chance by no more than this share of it has no basin to climb out of.
        bending: a loss that is quadratic to within so much at each draw, as that of a linear model, is a bowl all the
            way up.
        flattening: below 1 by so much, anharmonicity tells of a loss that flattens out: no basin does, while a singular
            loss, of higher degree, is above 1.
        least: a λ below this needs no smaller error than this one does, 0.05 at the default `rtol`: a direction counts
            for a half, and what is nearly zero has no relative error.
        passes: draws over those to an independent one; the scatter of fewer tells nothing of their error.
        untold: with a single chain, λ̂ below ½E[(w − w*)·nβ∇L] by so much may be a slope's.
    """

    virial_gap: float = 0.02
    anharmonicity: float = 0.05
    rhat: float = 1.1
    distance: float = 0.5
    heating: float = 0.03
    climb: float = 0.5
    chance: float = 0.05
    bending: float = 0.02
    flattening: float = 0.2
    least: float = 1.25
    untold: float = 0.1
    passes: float = 4.0


@dataclass(frozen=True, kw_only=True)
class Limit:
    """How the learning coefficient is found along a ladder of nβ; see `analysis.limit`.

    Attributes:
        localities: widths of the Gaussian that particles come from, relative to ‖w*‖.
        near: so far the posterior's mode may go from w* downhill, relative to ‖w*‖; a convention.
        jump: so far it may be from another place with less loss; else that is in another basin.
        populations: of particles, whose scatter is the error.
        particle_weights: particles of a population times D, but for
        least_particles, most_particles: in any case; λ̂ of N particles is known to 1/√(λN).
        most_nbeta: where a ladder ends; double precision tells losses apart that far where w* is an exact solution.
        resolved: nβ times the rounding of a loss, at most.
        most_gradients: of all particles at once, along the ladder, and as many at its end: minutes of a small network.
        most_weights: of networks whose limit is looked for unasked, within a minute or two; 2085 weights took five
            minutes and did not reach it.
        offset: what the least loss is known to, times nβ and relative to λ̂, at most: a quarter of the default `rtol`.
        disagreement: between populations, in the mean along a limit, at most: it was 0.9 to 5.2 on 42 models, and 17 or
            more of particles that did not move enough.
        check_ratio: of the nβ at which the ladder is looked at, to that before.
        least_length: in log nβ, of the end of a ladder that tells a limit: three decades.
        end: in log nβ, of what λ̂ is at the end.
        least_share: a limit begins where λ̂ is so much of that.
        enough: by so much nβ must have grown along the limit for a ladder to end early: deep linear networks have a
            false one of seven decades, along which only weights of the true rank count.
        extrapolated: and to this share of `rtol` the rest of the way must be known.
        doubted: share of the rest of the way that is its own standard error: at normal crossings it came out at twice
            what it is.
        tolerated: the same, relative to λ, for a limit at all.
        multiplicities: m, at most; each is half as probable as that before.
        shifts: log10 of the least and the largest log nβ + c at the beginning, and how many are tried.
        transients: powers of 1/nβ that are tried.
        misfit: standard deviations by which residuals may be too large.
        most_following: correlation of neighbouring levels, at most.
        kept: correlation between rounds at one nβ.
        least_rounds, most_rounds: such rounds.
        roundings: points that tell how much of a loss is rounding.
    """

    localities: tuple[float, ...] = (CALIBRATION.locality, 1.0)
    near: float = 0.5
    jump: float = 0.05
    populations: int = 4
    particle_weights: int = 1024
    least_particles: int = 32
    most_particles: int = 256
    most_nbeta: float = 1e20
    resolved: float = 0.01
    most_gradients: int = 20_000
    most_weights: int = 500
    offset: float = 0.005
    disagreement: float = 8.0
    check_ratio: float = 10**0.5
    least_length: float = 3 * math.log(10)
    end: float = 1.0
    least_share: float = 0.3
    enough: float = 1e9
    extrapolated: float = 0.25
    doubted: float = 0.5
    tolerated: float = 0.1
    multiplicities: int = 4
    shifts: tuple[float, float, int] = (0.0, 2.5, 101)
    transients: tuple[float, ...] = (0.5, 1.0)
    misfit: float = 2.0
    most_following: float = 0.9
    kept: float = 0.3
    least_rounds: int = 8
    most_rounds: int = 64
    roundings: int = 8


MEASUREMENT, PILOT, PASSES, RELIABILITY, LIMIT = Measurement(), Pilot(), Passes(), Reliability(), Limit()
