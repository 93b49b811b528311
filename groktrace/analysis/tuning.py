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
        max_curvature_samples: for the curvature, at most.
        heavy_share: one in so many of these is among the samples of the largest losses: of a well-fitted set they
            decide the curvature.
        products: products with the Hessian that give its largest eigenvalue, where data are used whole.
        large_set_products: smallest number of products on a large set.
        eigenvalue_rtol: products on a large set go on while the last two add more than this share to the eigenvalue:
            after six a transformer's is 30 % too small.
        max_products: largest number of products on a large set.
        steps_off_minimum: largest burn-in plus draws of a chain on a large set at a snapshot off its minimum, which
            cannot become reliable.
        batch_effect: a loss that depends by more than this share on which samples are together is no mean over them;
            single precision leaves a hundredth of it.
        chance_samples: samples, spread evenly, that give the loss of chance; it is the same on all.
        differentiated_samples: samples on which the gradient is held beside differences of the loss.
        differentiated_distance: from w* of the place where that is done, relative to the weights: kinks at w* itself,
            such as those of units that are exactly 0, tell nothing.
        difference_distance: of two losses from there, the same.
        differences: number of directions.
        gradient_rtol: a gradient that is off by more is not that of the loss. (Those of the workloads are off by 1e-6.)
        max_differentiated: larger networks are not looked at.
    """

    evaluated_samples: int = 256
    evaluated_bytes: int = 2**26
    parts: int = 8
    curvature_samples: int = 128
    curvature_bytes: int = 2**25
    max_curvature_samples: int = 512
    heavy_share: int = 4
    products: int = 8
    large_set_products: int = 6
    eigenvalue_rtol: float = 0.01
    max_products: int = 24
    steps_off_minimum: int = 40
    batch_effect: float = 1e-4
    chance_samples: int = 256
    differentiated_samples: int = 8
    differentiated_distance: float = 0.01
    difference_distance: float = 1e-5
    differences: int = 4
    gradient_rtol: float = 0.01
    max_differentiated: int = 2**24


@dataclass(frozen=True, kw_only=True)
class Pilot:
    """How (nβ, γ), samples and batch size are chosen for a run.

    Attributes:
        fitted: a snapshot counts as fitted once its training loss has fallen to this fraction of the run's range.
        fallen: nβ follows the curvature where that of fitted snapshots ranges over more than this factor: under
            cross-entropy it goes on falling as margins grow, and so would λ̂ in every run.
        localities: ρ, the widest first.
        max_climb: a basin is left where the loss climbs by this share of the way to that of chance; a convention.
        tried: snapshots on which short chains are tried.
        burn_in, draws: of such chains where data are sampled; minibatch noise is measured every 16 steps.
        batch_size: of such chains: on five networks it moved what they tell by a third of that at most.
        few_draws: of such chains where data are used whole.
        aimed: batches are so large that few of the other snapshots are heated by more than is wanted.
        max_bias: a posterior of S samples with m targets each has λ_c lower by about λ_c/(S·m) of it (measured on
            four networks); S is such that this is the most.
        min_samples: S, at least.
        unknown_samples: S where no short chain tells λ_c, or none stays and no more are stored; a convention.
        nearly_all: all stored samples are used where there are no more than so many times S, as few more cost little; a
            convention.
    """

    fitted: float = 0.05
    fallen: float = 10.0
    localities: tuple[float, ...] = (CALIBRATION.locality, 0.1, 0.05, 0.022, 0.01)
    max_climb: float = 0.2
    tried: int = 2
    burn_in: int = 20
    draws: int = 12
    batch_size: int = 32
    few_draws: int = 32
    aimed: float = 0.75
    max_bias: float = 0.03
    min_samples: int = 512
    unknown_samples: int = 4096
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
class Forecasting:
    """How many snapshots are tried to tell what an analysis takes; conventions.

    Attributes:
        seconds: that trying some may take.
        seconds_in_all: that a forecast may take if more are to be tried.
        least_tried: however long these take.
    """

    seconds: float = 8.0
    seconds_in_all: float = 25.0
    least_tried: int = 2


@dataclass(frozen=True, kw_only=True)
class Reliability:
    """What is tolerated before a number is called unreliable, in each case plus three errors of the diagnostic.

    Conventions, if not said otherwise.

    Attributes:
        virial_gap: of the virial and restraint from D, relative to it.
        widest_virial: the error of their sum counts as no more than so many times that of one draw of each chain in a
            quadratic bowl, whose variance is 2D; where the loss is of higher degree, it is a few times that.
        anharmonicity: of ½E[(w − w*)·nβ∇L]/λ̂ from 1, beyond which the loss is not quadratic where the chains go.
        rhat: split R̂, as Gelman & Rubin.
        distance: of the chains from w*, relative to ‖w*‖.
        heating: by minibatches, relative to λ̂; where it is taken off, what is uncertain of it.
        heating_error: standard error of measured heating, relative to it. (Of a perceptron it scattered by 0.31 to 0.39
            over 16 seeds of nine settings.)
        climb: of the loss, as a share of the way to that of chance.
        chance: a loss that is below that of chance by no more than this share of it has no basin to climb out of.
        quadratic_tolerance: a loss that is quadratic to within this share at each draw, as that of a linear model, is a
            bowl all the way up, and is not said to have been left.
        flattening: an anharmonicity below 1 by this much tells of a loss that flattens out. No basin does; a singular
            loss, of higher degree, has more than 1.
        min_llc: smaller λ are held to the error that this one may have, 0.05 at the default `rtol`: a direction counts
            for a half, and what is nearly zero has no relative error.
        rounding: of nβ·L in single precision, relative to λ: on four regressions λ̂ was off by as much as that.
        passes: draws over those to an independent one; the scatter of fewer tells nothing of their error.
        single_chain_gap: a single chain is flagged where λ̂ is below ½E[(w − w*)·nβ∇L] by this share: it may be a
            slope's.
    """

    virial_gap: float = 0.02
    widest_virial: float = 2.0
    anharmonicity: float = 0.05
    rhat: float = 1.1
    distance: float = 0.5
    heating: float = 0.03
    heating_error: float = 0.35
    climb: float = 0.5
    chance: float = 0.05
    quadratic_tolerance: float = 0.02
    flattening: float = 0.2
    min_llc: float = 1.25
    single_chain_gap: float = 0.1
    rounding: float = 0.05
    passes: float = 4.0


@dataclass(frozen=True, kw_only=True)
class Limit:
    """How the learning coefficient is found along a ladder of nβ; see `limit_by_particles` and `limit_by_chains`.

    Attributes:
        localities: widths of the Gaussians that particles come from, relative to ‖w*‖.
        max_mode_distance: largest distance of the posterior's mode from w*, relative to ‖w*‖; a convention.
        max_mode_jump: largest step of the mode to a place of lower loss, relative to ‖w*‖; a larger one leads to
            another basin.
        populations: number of populations of particles, whose scatter is the error.
        particle_weights: a population has this many particles, divided by D.
        min_particles, max_particles: bounds of that number; λ̂ of N particles is known to 1/√(λN).
        max_nbeta: end of a ladder; double precision tells losses apart that far where w* is an exact solution.
        resolved: largest nβ times the rounding of a loss.
        max_gradients: gradients of all particles along the ladder, and as many at its end: minutes of a small network.
        max_weights: largest network whose limit is looked for unasked, and by particles, within a minute or two; 2085
            weights took five minutes and did not reach it.
        first_resolution: κ of the first rung of chains.
        rung_ratio: of one rung's nβ to that before.
        min_rungs, max_rungs: of a ladder of chains: three decades, as of particles, and as far as single precision
            goes.
        shrinking: growth of λ̂ over that of the rung before, at most, in each of the last two; a convention.
        max_chain_steps: of all chains together; minutes for ten thousand weights in five layers.
        max_operations: such steps times weights times samples; half an hour or so where a sample is one input.
        descent_share: of these that may go into the descent from w*.
        descended: it ends at an nβ where another hundred steps take off less than this, in nats; a convention.
        narrower: where chains leave the basin, they begin again so many times as close to w*; a convention.
        narrowings: how often, at most.
        chain_error: least half of an interval from chains, relative to λ: a ladder does not show how slowly some
            directions come into sight. Chosen on deep linear networks.
        offset: largest uncertainty of the lowest loss, times nβ and relative to λ̂: a quarter of the default `rtol`.
        disagreement: largest disagreement of populations, in the mean along a limit: it was 0.9 to 5.2 on 42 models,
            and 17 or more where particles did not move enough.
        check_ratio: growth of nβ between two looks at the ladder.
        min_log_length: shortest end of a ladder that tells a limit, in log nβ: three decades.
        end_length: length of the end that gives the level, in log nβ.
        min_share: a limit begins where λ̂ is this share of the level.
        sufficient_growth: growth of nβ along the limit after which a ladder may end early: deep linear networks have a
            false limit of seven decades, along which only weights of the true rank count.
        extrapolation_rtol: largest error of the extrapolation where a ladder ends early, as a share of `rtol`.
        extrapolation_error: standard error of the extrapolation, as a share of it: at normal crossings it came out at
            twice what it is.
        max_extrapolation: largest error of the extrapolation for a limit at all, relative to λ.
        multiplicities: largest m; each is half as probable as that before.
        shifts: log10 of the least and the largest log nβ + c at the beginning, and how many are tried.
        transients: powers of 1/nβ that are tried.
        misfit: standard deviations by which residuals may be too large.
        max_residual_correlation: largest correlation of neighbouring levels.
        round_correlation: assumed correlation between rounds of moves at one nβ.
        min_rounds, max_rounds: bounds of the number of such rounds.
        roundings: points that tell how much of a loss is rounding.
    """

    localities: tuple[float, ...] = (CALIBRATION.locality, 1.0)
    max_mode_distance: float = 0.5
    max_mode_jump: float = 0.05
    populations: int = 4
    particle_weights: int = 1024
    min_particles: int = 32
    max_particles: int = 256
    max_nbeta: float = 1e20
    resolved: float = 0.01
    max_gradients: int = 20_000
    max_weights: int = 500
    first_resolution: float = 100.0
    rung_ratio: float = 10.0
    min_rungs: int = 4
    max_rungs: int = 7
    shrinking: float = 0.5
    max_chain_steps: int = 600_000
    max_operations: int = 2**40
    descent_share: float = 0.05
    descended: float = 0.1
    narrower: float = 0.2
    narrowings: int = 2
    chain_error: float = 0.05
    offset: float = 0.005
    disagreement: float = 8.0
    check_ratio: float = 10**0.5
    min_log_length: float = 3 * math.log(10)
    end_length: float = 1.0
    min_share: float = 0.3
    sufficient_growth: float = 1e9
    extrapolation_rtol: float = 0.25
    extrapolation_error: float = 0.5
    max_extrapolation: float = 0.1
    multiplicities: int = 4
    shifts: tuple[float, float, int] = (0.0, 2.5, 101)
    transients: tuple[float, ...] = (0.5, 1.0)
    misfit: float = 2.0
    max_residual_correlation: float = 0.9
    round_correlation: float = 0.3
    min_rounds: int = 8
    max_rounds: int = 64
    roundings: int = 8


MEASUREMENT, PILOT, PASSES, FORECAST = Measurement(), Pilot(), Passes(), Forecasting()
RELIABILITY, LIMIT = Reliability(), Limit()
