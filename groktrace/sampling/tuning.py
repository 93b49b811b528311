"""The tuned numbers of the sampler, each with where it comes from."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Where the posterior is measured, how large the steps are, and how many.

    Attributes:
        locality: ρ. Farther from w*, λ_c counts quartic directions beyond the exact soft rank (trained quadratic
            networks: 6.6 % at 0.3, 4.3 % at 0.22); closer, λ̂ counts the slope of what is not quite a minimum.
        resolution: κ; a convention.
        resolution_following: the same where nβ follows the curvature: λ then falls by 17 to 37 % in perceptrons that
            grok, and by at most 8 % in memorising ones.
        step_fraction: c in ε = 2c/(s·nβ·h_max + γ). At 1 a direction of curvature s·h_max forgets its start in one
            step; twice that is where it becomes unstable.
        curvature_safety: s; curvature grows off the minimum, and Lanczos iteration comes from below.
        burn_in_relaxations: relaxation times of the flat directions. Chains start near equilibrium; of what they have
            to forget one leaves e⁻².
        burn_in_relaxations_cold: of chains that start at w*, where flat directions are not filled yet; e⁻⁵ is left.
        draw_relaxations: draws of all chains together, at first; each chain takes one at least.
        min_draws: of a chain; fewer tell little of their own error.
        max_steps: of a chain; minutes for a small network.
        max_reduction: most by which a look at the curvature where chains began, which scatters, reduces the step.
        min_growth: draws are added by this fraction at least: the error that calls for them is itself uncertain.
        stacked_weights: below so many weights in a stack of chains, a step costs the same however many there are.
        min_chains: the centred estimate needs two.
        max_chains: a convention.
    """

    locality: float = 0.22
    resolution: float = 10.0
    resolution_following: float = 100.0
    step_fraction: float = 1.0
    curvature_safety: float = 1.5
    burn_in_relaxations: float = 1.0
    burn_in_relaxations_cold: float = 2.5
    draw_relaxations: float = 10.0
    min_draws: int = 64
    max_steps: int = 400_000
    max_reduction: float = 4.0
    min_growth: float = 0.25
    stacked_weights: int = 2**14
    min_chains: int = 2
    max_chains: int = 16


@dataclass(frozen=True, kw_only=True)
class Effort:
    """What is spent on a snapshot whose data are used whole, by default.

    Attributes:
        restarts: attempts after the first, each with a smaller step.
        growth: draws at most, times the first ones.
        draws: of each chain at first; None for relaxation times, see `Calibration`.
        heating: what minibatches may add to λ̂, relative to it, before chains begin again with a smaller step.
        measured_heating: the same where it is taken off λ̂, as it is known not just at most. (1 to 5 % taken off leave a
            perceptron's λ_c 0.6 % too small to 1.5 % too large.)
        curvature_products: products with the Hessian where chains have gone.
        check_every: steps between two checks that chains have not left.
        sample_losses: single samples whose losses are recorded; None for all, or those of two minibatches: more would
            cost more than the steps between them.
    """

    restarts: int = 16
    growth: int = 16
    draws: int | None = None
    heating: float = 0.02
    measured_heating: float = 0.05
    curvature_products: int = 8
    check_every: int = 64
    sample_losses: int | None = None


@dataclass(frozen=True, kw_only=True)
class Equilibrium:
    """What tells chains in equilibrium from those that leave, or that the step feeds with energy.

    In equilibrium virial and restraint, (w − w*)·nβ∇L and γ‖w − w*‖², add up to D in the mean: the total virial.

    Attributes:
        max_total_virial: chains have left where it comes to so many times D; a convention.
        max_mean_total_virial: the same of their mean in large networks and on large sets, where no look at the
            curvature, or one at the start alone, tells of too large a step.
        max_early_total_virial: of the step after which the burn-in may end: beyond it the curvature is looked at where
            chains began, which costs as much as some steps.
        max_restraint: a chain was away where its restraint once was so many times D and that of most draws, though
            some come back, to another place. The virial tells less: it is far above D where a valley turns.
        slack: draws of few weights scatter by so much.
        spike: a draw is energy fed in by the step where it is so many times their own scatter above most draws: under
            cross-entropy λ_c came out at up to three times its neighbours' with such draws. (Draws of a posterior
            scatter by √(2D) in a bowl.)
        spike_slack: and by so much more, for small networks at singular minima.
        bias: all draws have such energy where the total is beyond D by this fraction of the virial: a transformer
            whose λ_c came out 60 % too large was by two per cent of D, a third of 2λ.
        bias_errors: and by so many standard errors.
        anharmonicity: in a bowl half of the virial is nβ(L(w) − L(w*)); off by this fraction, curvatures may be others.
        fall: chains that fall by so many nats a weight at once may be in no basin, as where training has hardly begun:
            they would be followed through ever steeper walls for as long as all other snapshots take together.
        tolerated_restarts: attempts that they get, and at most so many are given to a step that heats.
        fall_for_good: the same where data are sampled, at the first time: no smaller step would help.
        min_burn_in: steps after which the burn-in of chains on a large set may end, if they are in equilibrium by then;
            this and the next three are conventions.
        virial_tolerance: equilibrium is where the total virial is off D by at most this fraction of D.
        max_virial_fall: the virial may fall between the halves of these steps by this fraction of itself.
        virial_errors: standard errors allowed beyond either bound.
    """

    max_total_virial: float = 10.0
    max_mean_total_virial: float = 1.5
    max_early_total_virial: float = 1.2
    max_restraint: float = 3.0
    slack: float = 100.0
    spike: float = 10.0
    spike_slack: float = 300.0
    bias: float = 0.05
    bias_errors: float = 4.0
    anharmonicity: float = 0.2
    fall: float = 0.1
    tolerated_restarts: int = 3
    fall_for_good: float = 1.0
    min_burn_in: int = 8
    virial_tolerance: float = 0.03
    max_virial_fall: float = 0.1
    virial_errors: float = 3.0


@dataclass(frozen=True, kw_only=True)
class Curvature:
    """How products with the Hessian are computed, and where chains start.

    Attributes:
        relative_step: of a difference of gradients, relative to ‖w‖.
        short_step: the same on large sets.
        large_step: the same in large networks.
        agreement: differences are good where those over an eighth of the way agree with them this well, in size and as
            vectors; those differ by 0.05 at most on networks without kinks, by 0.18 at least on those with ReLUs.
        repeated: this share of a large network's value, which power iteration has not quite reached, another product
            has to have.
        flat: where h‖w‖² is below this times the loss, far less than that of networks, a curvature h may be rounding
            error: it is computed again from a larger difference.
        far_step: that difference, in which rounding counts less.
        far_agreement: h is zero where the two disagree by more than this.
        power_iterations: products that give the largest eigenvalue of a large network.
        start_products: products that give the Gaussian start of chains.
        start_descents: largest number of descents of a start that the loss makes too high.
        start_halvings: largest number of halvings of one that is too high after them.
        start_samples: on so many samples the curvature is looked at where chains began.
        start_climb: a start may climb by this many times what the curvature at w* tells.
        start_slack: after its descents by so many nats a weight more: three products tell a part of the curvature.
        loss_rounding: what float32 leaves of a loss, which is no climb.
    """

    relative_step: float = 1e-3
    short_step: float = 1e-4
    large_step: float = 1e-4
    agreement: float = 0.1
    repeated: float = 0.7
    flat: float = 1.0
    far_step: float = 8e-3
    far_agreement: float = 0.7
    power_iterations: int = 8
    start_products: int = 3
    start_descents: int = 12
    start_halvings: int = 8
    start_samples: int = 256
    start_climb: float = 1.5
    start_slack: float = 0.01
    loss_rounding: float = 1e-6


@dataclass(frozen=True, kw_only=True)
class MinibatchNoise:
    """How large minibatches are, and how their noise is measured.

    Attributes:
        heating: largest share that noise may add to λ̂; the default `rtol`.
        reduction: smallest factor by which the step is reduced to get there.
        every: steps between two measurements, which cost a gradient.
        every_large: the same in large networks, where they cost four.
        profiled: samples on which noise is profiled at a snapshot.
        profiled_bytes: the same in bytes of activations; the larger of the two counts.
        profiled_multiple: the number of profiled samples is a multiple of this; sets smaller than this are used whole.
        profile_batch: samples a gradient of the two chains along which noise is profiled.
        start_discount: heating at a chain's start counts by this factor less than where the chain settles: networks to
            which batches do no harm have that much at the start.
        group_samples: noise is estimated from the scatter of gradients of so many samples.
        batch_multiple: batches are a multiple of so many samples.
        min_batch: smallest batch.
        max_curvature_variation: largest standard deviation of a batch's curvature, relative to its mean. Beyond it
            single batches throw chains out; where few samples have most of the curvature, as in classifiers with large
            margins, all samples are used.
        min_batches: with fewer batches to the set, all samples are used, as they are as cheap.
        share_products: products with the Hessian that tell which share of the noise goes into stiff directions.
        share_samples: samples of these products, at least.
        min_stability: 1 − εa/4 counts as no less than this: at 0 a direction is unstable, which is seen elsewhere.
    """

    heating: float = 0.02
    reduction: float = 1 / 32
    every: int = 16
    every_large: int = 32
    profiled: int = 512
    profiled_bytes: int = 2**22
    profiled_multiple: int = 64
    profile_batch: int = 32
    start_discount: float = 5.0
    group_samples: int = 16
    batch_multiple: int = 8
    min_batch: int = 16
    max_curvature_variation: float = 0.3
    min_batches: int = 4
    share_products: int = 3
    share_samples: int = 64
    min_stability: float = 0.25


@dataclass(frozen=True, kw_only=True)
class Annealing:
    """How particles are annealed over nβ; see `sampling.annealing`.

    Attributes:
        effective_share: nβ grows until the weights' effective sample size has fallen to this share of the particles; a
            convention.
        largest_ratio: of one nβ to that before, at most.
        first_nbeta: from which the first one is looked for.
        first_step: step size of the first trajectories, in standard deviations of the Gaussian.
        acceptance: of trajectories, to which the step is adapted (0.65 to 0.9 is best: Beskos et al. 2013).
        adaptation: how fast.
        jitter, longer: step sizes are spread log-uniformly over a factor of exp(jitter), this share of it above 1.
        moves: trajectories at one nβ, at most.
        correlation: between losses before and after them, at most.
        first_steps, min_steps, max_steps: of a trajectory.
        lengthening, shortening: factors of their number, where trajectories are too short, or one does at once.
        lost: log evidence of a population below that of the best, at most; they scatter by a few.
        wide_acceptance: trajectories of all step sizes up to the first are made before the others while this share of
            them is accepted: on the arms of a crossing most of the posterior is far wider than the rest.
        wide_every: rungs between two trials of such trajectories where they are not accepted.
        descent_steps: steps of one descent towards the mode.
        descents: largest number of descents.
        descended: descents end once U falls by less than this, in nats.
    """

    effective_share: float = 0.5
    largest_ratio: float = 4.0
    first_nbeta: float = 1e-12
    first_step: float = 0.1
    acceptance: float = 0.8
    adaptation: float = 0.5
    jitter: float = 1.4
    longer: float = 0.2
    moves: int = 4
    correlation: float = 0.3
    first_steps: int = 16
    min_steps: int = 8
    max_steps: int = 512
    lengthening: float = 1.5
    shortening: float = 1.1
    lost: float = 12.0
    wide_acceptance: float = 0.02
    wide_every: int = 16
    descent_steps: int = 10
    descents: int = 10
    descended: float = 0.003


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What is large, and how much is computed at once.

    Bytes are of what a gradient keeps between forward and backward, if not said otherwise.

    Attributes:
        large_weights, large_activations: networks of so many numbers, and those whose gradient on all samples keeps so
            many bytes, are evaluated alone and in micro-batches.
        micro_batch_share, micro_batch_bytes: of a micro-batch: this share of the weights in float32, or so many bytes.
        piece: elements of a vector of a large network that are worked on at once; they fit the processor's cache.
        whole_bytes: data that would take more are sampled.
        stacked_bytes: rows that take more are evaluated one by one, quicker then (an LSTM's twice).
        part_bytes: of the parts in which they are.
        planned_bytes: larger evaluations are not recorded as a plan, which holds every intermediate value, and saves
            little there.
        single_samples: samples whose own losses are computed, at most.
        control_bytes: of the gradients of all minibatches at w*, of the snapshots of a stack together.
        stack_bytes: of a stack of chains, with their states; more than fits the processor's cache gains nothing
            (measured).
        stack_bytes_elsewhere: the same on a GPU, which wants more at once.
    """

    large_weights: int = 2**24
    large_activations: int = 2**31
    micro_batch_share: float = 0.25
    micro_batch_bytes: int = 2**26
    piece: int = 2**20
    whole_bytes: int = 2**22
    stacked_bytes: int = 2**21
    part_bytes: int = 2**25
    planned_bytes: int = 2**28
    single_samples: int = 1024
    control_bytes: int = 2**28
    stack_bytes: int = 12 * 2**20
    stack_bytes_elsewhere: int = 2**31


CALIBRATION, EQUILIBRIUM, CURVATURE = Calibration(), Equilibrium(), Curvature()
MINIBATCH_NOISE, ANNEALING, MEMORY = MinibatchNoise(), Annealing(), Memory()
WHOLE_DATA = Effort()
# A step takes long, and a draw tells λ_c to 1/√λ of it. Heating is measured from few batches, and scatters by a third.
SUBSAMPLED = Effort(restarts=3, growth=4, draws=16, heating=0.03, curvature_products=3, check_every=8, sample_losses=16)
