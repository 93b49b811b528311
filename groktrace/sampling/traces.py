"""What is kept of one snapshot's draws, and what they say of the step at which they were made."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from groktrace.sampling.diagnostics import effective_sample_size, standard_error
from groktrace.sampling.kernels.base import Kernel
from groktrace.sampling.tuning import EQUILIBRIUM, MINIBATCH_NOISE

# The losses of single samples are looked at in so many draws of each chain, and so many steps apart at least.
_FLUCTUATION_DRAWS = 16
_FLUCTUATION_EVERY = 8


@dataclass(frozen=True)
class Traces:
    """One snapshot's draws after burn-in, in units of U (nats).

    Attributes:
        delta_loss: nβ(L(w) − L(w*)), [draws, chains].
        virial: (w − w*)·nβ∇L(w), [draws, chains].
        restraint: γ‖w − w*‖², [draws, chains].
        centred_draws: ½nβ(w − w̄)·∇L(w), where w̄ is the mean of the other chains' draws so far, [draws, chains]; of
            large networks, which have no room for means, ¼nβ(w_a − w_b)·(∇L(w_a) − ∇L(w_b)) for neighbouring chains
            a, b, [draws, pairs]. As chains are independent, either has the expectation λ_c wherever the mean is. Of a
            single chain there are none.
        step_size: ε in the end.
        burn_in: steps discarded.
        lost: steps of each chain at step sizes that were given up.
        halvings: times that ε was halved because the chains diverged, or were kicked far up.
        fluctuation: ½nβ times the mean over samples of the variance of a sample's loss over some of the draws, a
            number a chain, [chains]; None where the loss is no mean over samples, or there are fewer than nine draws.
        heating: what the noise of minibatch gradients adds to λ̂, relative to half the virial, which is nearly λ_c off a
            minimum, too: it widens the posterior along a direction by nβ²·Var[g] times `Kernel.noise_gain`, so that 2λ̂
            grows by that of tr Cov[g] times `control.share_of_stiff`, or at most by that where batches are drawn anew.
        excess: what it adds to λ̂ and λ_c, in nats; 0 where that is known at most.
        curvature: h_max where the chains went; None where there was no reason to look.
        fall: largest −nβ(L(w) − L(w*)) within the first 64 steps, burn-in or not.
        sample_losses: loss of each sample, [draws, chains, N]; where it was asked for.
        anchor_sample_losses: the same at w*, [N].
        slow: draws to an independent one, at least; see `calibration.slowdown`.
        means: nβ⟨w − w*⟩_a·⟨∇L⟩_b, where ⟨·⟩_a is the mean of chain a over all draws, [chains, chains]; None of a
            single chain, and of large networks, which have no room for them.
        slope: −½nβ∇L(w*)·⟨w − w*⟩ over all draws: in a bowl λ̂ is below λ_c by this and λ_c − ½E[virial]. 0 where
            there are no means.
    """

    delta_loss: Tensor
    virial: Tensor
    restraint: Tensor
    centred_draws: Tensor
    step_size: float
    burn_in: int
    halvings: int = 0
    lost: int = 0
    fluctuation: Tensor | None = None
    heating: float = 0.0
    excess: float = 0.0
    curvature: float | None = None
    fall: float = 0.0
    sample_losses: Tensor | None = None
    anchor_sample_losses: Tensor | None = None
    means: Tensor | None = None
    slope: float = 0.0
    slow: float = 1.0

    def extended(self, more: "Traces") -> "Traces":
        """These draws and those that came after them."""
        losses = None
        if self.sample_losses is not None and more.sample_losses is not None:
            losses = torch.cat([self.sample_losses, more.sample_losses])
        return replace(
            self,
            delta_loss=torch.cat([self.delta_loss, more.delta_loss]),
            virial=torch.cat([self.virial, more.virial]),
            restraint=torch.cat([self.restraint, more.restraint]),
            centred_draws=torch.cat([self.centred_draws, more.centred_draws]),
            sample_losses=losses,
            means=more.means,
            slope=more.slope,
        )

    @property
    def centred(self) -> float:
        """λ_c = ½nβE[(w − w̄)·∇L]: each draw's own product, less what the means of two chains give.

        It has the expectation of `centred_draws`, and up to half the variance of pairs: a pair of draws tells of their
        difference only. NaN of a single chain.
        """
        if self.means is None:
            return float(self.centred_draws.double().mean())
        return 0.5 * float(self.virial.double().mean() - self._mean_of_two)

    @property
    def centred_error(self) -> float:
        """Standard error of `centred`.

        Of C chains with means it is that of the chains' own products, each about its own mean: what these differ by is
        the product of one chain's mean and another's gradient, and cancels. (Of 16 to 64 draws of two chains on two
        networks it was 0.9 to 1.2 times the scatter over seeds, in the root mean square.) The mean over neighbouring
        pairs has 1.5 over C times the variance of one: each shares a chain with two others, and (a − b)² and (b − c)²
        have correlation ¼.
        """
        values = self.centred_draws.double()
        if self.means is None:
            return self.error(values) * (math.sqrt(1.5) if values.shape[1] > 1 else 1.0)
        return self.error(values - values.mean(0))

    def effective_draws(self, values: Tensor) -> float:
        """How many independent draws some values are worth, a number for each of these draws and chains."""
        return effective_sample_size(values, self.slow)

    def error(self, values: Tensor) -> float:
        """Standard error of the mean of such values."""
        return standard_error(values, self.slow)

    @property
    def _mean_of_two(self) -> float:
        """`means` of two different chains, in the mean."""
        assert self.means is not None
        chains = len(self.means)
        return float(self.means.sum() - self.means.diagonal().sum()) / (chains * (chains - 1))

    @property
    def total_virial(self) -> Tensor:
        """(w − w*)·∇U, [draws, chains]: virial and restraint, D in the mean in equilibrium wherever w* lies."""
        return self.virial.double() + self.restraint

    def diverged(self, dimension: int) -> bool:
        """Whether a chain is or was on its way out.

        Args:
            dimension: D.
        """
        if not (torch.isfinite(self.delta_loss).all() and torch.isfinite(self.virial).all()):
            return True
        farthest = EQUILIBRIUM.max_restraint * max(dimension, float(self.restraint.median())) + EQUILIBRIUM.slack
        if not float(self.restraint.amax()) <= farthest:
            return True
        return not float(self.total_virial.mean(0).amax()) <= most_total_virial(dimension)

    def anharmonic(self, dimension: int) -> bool:
        """Whether the virial is not twice the loss difference, as in a bowl, or too large for equilibrium.

        Args:
            dimension: D.
        """
        traces = self.virial, self.restraint, self.delta_loss
        virial, restraint, delta_loss = (float(values.mean()) for values in traces)
        off = abs(0.5 * virial - delta_loss) > EQUILIBRIUM.anharmonicity * abs(delta_loss)
        return off or virial + restraint > 1.05 * dimension

    @property
    def has_energy_spike(self) -> bool:
        """Whether a draw stands far out from all others in energy, though the chain came back.

        Where a valley turns so it may, too, at any step: it is a reason to try a smaller one, not to give up.
        """
        total = self.total_virial.nan_to_num(nan=torch.inf)
        median = total.median()
        scatter = 1.4826 * (total - median).abs().median()  # of normal draws their standard deviation
        return bool(total.amax() > median + EQUILIBRIUM.spike * scatter + EQUILIBRIUM.spike_slack)

    def total_virial_error(self, kernel: Kernel, localization: float, dimension: int) -> float:
        """Standard error of the mean total virial.

        Args:
            kernel: of the dynamics.
            localization: γ.
            dimension: D.
        """
        error = standard_error(self.virial + self.restraint)
        # Traces of few relaxation times of the flat directions cannot tell how slow these are.
        passes = len(self.restraint) / kernel.relaxation(self.step_size, localization, self.halvings)
        return max(error, math.sqrt(2 * dimension / (self.restraint.shape[1] * passes))) if passes >= 1 else error

    def has_discretization_bias(self, kernel: Kernel, localization: float, dimension: int) -> bool:
        """Whether the total virial is beyond D for certain, by what matters beside the virial: twice λ̂ in a bowl.

        Args:
            kernel: of the dynamics.
            localization: γ.
            dimension: D.
        """
        virial = float(self.virial.double().mean())
        beyond = virial + float(self.restraint.double().mean()) - dimension - EQUILIBRIUM.bias * abs(virial)
        error = self.total_virial_error(kernel, localization, dimension) if beyond > 0 else 0.0
        return beyond > EQUILIBRIUM.bias_errors * error


class SampleLossRecorder:
    """When the losses of single samples are looked at, and what was seen.

    Args:
        lengths: burn-in and draws of each snapshot.
    """

    def __init__(self, lengths: Sequence[tuple[int, int]]) -> None:
        self._seen: list[list[Tensor]] = [[] for _ in lengths]
        self._due: dict[int, list[int]] = {}
        for s, (burn_in, draws) in enumerate(lengths):
            every = max(_FLUCTUATION_EVERY, draws // _FLUCTUATION_DRAWS)
            for t in range(burn_in + draws - 1, burn_in - 1, -every):
                self._due.setdefault(t, []).append(s)

    def due(self, t: int) -> Sequence[int]:
        """The snapshots to look at before step t."""
        return self._due.get(t, ())

    def keep(self, s: int, losses: Tensor) -> None:
        """Take the losses of one snapshot's chains, [chains, m]."""
        self._seen[s].append(losses)

    def variance(self, s: int) -> Tensor | None:
        """Variance of a sample's loss, mean over samples, [chains]; None where it was seen less than twice."""
        seen = self._seen[s]
        return torch.stack(seen).double().var(0).mean(1).cpu() if len(seen) > 1 else None


def inner_products(displacements: Tensor, gradients: Tensor) -> Tensor:
    """Of each row w·g and w·w, [2, R].

    Args:
        displacements: w, [R, columns].
        gradients: g, [R, columns].
    """
    dot = torch.linalg.vecdot
    return torch.stack([dot(displacements, gradients), dot(displacements, displacements)])


def products_with_others(totals: Tensor, gradients: Tensor, chains: int) -> Tensor:
    """Of each row g times the sum of what the snapshot's other chains have, [R].

    Args:
        totals: a vector of each row, [R, columns].
        gradients: g, [R, columns].
        chains: rows of one snapshot, at least two.
    """
    dot = torch.linalg.vecdot
    own, g = (torch.unflatten(rows, 0, (-1, chains)) for rows in (totals, gradients))
    if chains == 2:
        return torch.stack([dot(own[:, 1], g[:, 0]), dot(own[:, 0], g[:, 1])], 1).flatten()
    return (dot(own.sum(1, keepdim=True), g) - dot(own, g)).flatten()


def pairs(chains: int) -> int:
    """How many pairs of neighbours so many chains have, in a ring.

    Args:
        chains: of one snapshot.
    """
    return {1: 0, 2: 1}.get(chains, chains)


def most_total_virial(dimension: int) -> float:
    """What the total virial comes to in the mean at most, of chains that have not left.

    Args:
        dimension: D.
    """
    return EQUILIBRIUM.max_total_virial * dimension + EQUILIBRIUM.slack


def reduced_step_size(
    traces: Traces, kernel: Kernel, localization: float, most: float = MINIBATCH_NOISE.heating
) -> float:
    """The step at which the noise of minibatches heats the chains no more than is wanted.

    Args:
        traces: of the last attempt.
        kernel: of the dynamics.
        localization: γ.
        most: heating that calls for a smaller step.
    """
    smaller = traces.step_size
    if traces.heating > most:
        gain = partial(kernel.noise_gain, localization=localization, halvings=traces.halvings)
        wanted = 0.8 * MINIBATCH_NOISE.heating / traces.heating * gain(smaller)
        while smaller > MINIBATCH_NOISE.reduction * traces.step_size and gain(smaller) > wanted:
            smaller *= 0.95
    return smaller
