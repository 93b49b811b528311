"""The posterior of one snapshot from nβ = 0 to as large an nβ as wanted: particles that are annealed.

Sequential Monte Carlo (Del Moral, Doucet & Jasra 2006) with Hamiltonian trajectories (Duane et al. 1987; Neal 2011). At
large nβ the posterior is a thin, curved tube along which a chain crawls: one relaxation takes √κ steps or more.
Particles need not go along it: where on the tube they are follows from their weights as nβ grows, and a trajectory has
only to make them at home across it.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from groktrace.sampling.interruption import check_interruption
from groktrace.sampling.mode import Mode
from groktrace.sampling.posterior import StackedLoss
from groktrace.sampling.tuning import ANNEALING

# The loss of a particle where it cannot be computed.
_OVERFLOW = 1e300
_BISECTIONS = 40


@dataclass(frozen=True)
class Level:
    """What particles tell at one nβ.

    Attributes:
        nbeta: nβ.
        llc: nβ·(E[L] − L*) of each population, with the loss L* at the posterior's mode.
        log_evidence: log E[exp(−nβ·L)] over the Gaussian that they began with, of each population.
        acceptance: of the last trajectories.
        minimum: L*.
        disagreement: variance of λ̂ between populations over what it would be of particles that share nothing: 1.
    """

    nbeta: float
    llc: tuple[float, ...]
    log_evidence: tuple[float, ...]
    acceptance: float
    minimum: float
    disagreement: float


class Particles:
    """Populations of particles of exp(−nβ·L(w) − ½γ‖w − w*‖²), at first of nβ = 0.

    Populations share the ladder and the step, and no particle but where one is lost and begins anew as a copy of
    another: what they differ by tells their error.

    Args:
        loss: of one row, in float64.
        anchor: w*, [D], float64.
        localization: γ.
        shape: how many populations, and particles in each.
        generator: of everything that is drawn.

    Attributes:
        nbeta: nβ now.
        mode: of the posterior at this nβ.
        jump: how far it went at once at most, where particles were below it.
        gradients: how often all particles' gradients were taken so far.
    """

    def __init__(
        self,
        loss: StackedLoss,
        anchor: Tensor,
        localization: float,
        shape: tuple[int, int],
        generator: torch.Generator,
    ) -> None:
        self._anchor, self._localization, self._shape = anchor, localization, shape
        self._generator, self._loss = generator, loss
        rows = torch.zeros(math.prod(shape), dtype=torch.long, device=anchor.device)
        self.mode, self.jump = Mode(loss, anchor, localization), 0.0
        self._displacement = self._normal(math.prod(shape)) / math.sqrt(localization)
        self._positions = torch.empty_like(self._displacement)
        self._slopes = torch.empty_like(self._displacement)
        self._evaluate_bound = loss.select(rows).bound(self._positions, self._slopes)
        self.nbeta, self.gradients = 0.0, 0
        self._step_size = ANNEALING.first_step / math.sqrt(localization)
        self._steps, self._levels, self._wide = ANNEALING.first_steps, 0, 1.0
        self._log_evidence = anchor.new_zeros(shape[0])
        self._losses = self._evaluate(self._displacement)
        self._gradients = self._slopes.clone()

    def cool(self, most: float) -> Level:
        """Raise nβ as far as the particles' weights allow, or to `most`, choose among them, and move them.

        Args:
            most: the largest nβ that is wanted.
        """
        nbeta = self._next(most)
        losses = self._losses.view(self._shape)
        logs = -(nbeta - self.nbeta) * losses
        self._log_evidence += torch.logsumexp(logs, 1) - math.log(self._shape[1])
        chosen = self._rescue(self._resample(torch.softmax(logs, 1)))
        self._displacement, self._losses = self._displacement[chosen], self._losses[chosen]
        self._gradients = self._gradients[chosen]
        if self.nbeta:
            self._step_size *= math.sqrt(self.nbeta / nbeta)
        self.nbeta = nbeta
        level = self.move()
        self.mode.descend(nbeta)
        energies = self._energy(self._losses, self._displacement)
        least = int(energies.argmin())
        if float(energies[least]) < self.mode.energy(nbeta):
            before = self.mode.displacement
            self.mode.move(float(self._losses[least]), self._displacement[least])
            self.mode.descend(nbeta)
            self.jump = max(self.jump, float((self.mode.displacement - before).norm()))
        return replace(level, llc=self._llc(), minimum=self.mode.loss)

    def least_loss(self) -> float:
        """The least loss that descent finds from some of the particles, or at the mode.

        Where it is below that of the mode by as much as λ̂/nβ, the loss at the mode is not what λ̂ counts from.
        """
        losses = [self.mode.loss]
        for chosen in range(0, len(self._losses), self._shape[1]):  # one of each population
            lower = Mode(self._loss, self._anchor, localization=0.0)
            lower.move(float(self._losses[chosen]), self._displacement[chosen])
            lower.descend(self.nbeta)
            losses.append(lower.loss)
        return min(losses)

    def move(self) -> Level:
        """Trajectories until the particles' losses have hardly to do with what they were."""
        if self._wide > ANNEALING.wide_acceptance or self._levels % ANNEALING.wide_every == 0:
            widest = ANNEALING.first_step / math.sqrt(self._localization) / self._step_size
            self._wide = self._trajectories(ANNEALING.min_steps, math.log(max(widest, 1.0)), 1.0)
        self._levels += 1
        before, moves = self._losses, 0
        correlation = 1.0
        while moves < ANNEALING.moves and correlation > ANNEALING.correlation:
            acceptance = self._trajectories(self._steps, ANNEALING.jitter, ANNEALING.longer)
            self._step_size *= math.exp(ANNEALING.adaptation * (acceptance - ANNEALING.acceptance))
            moves += 1
            correlation = self._correlation(before)
        if correlation > ANNEALING.correlation:
            self._steps = min(math.ceil(self._steps * ANNEALING.lengthening), ANNEALING.max_steps)
        elif moves == 1:
            self._steps = max(math.floor(self._steps / ANNEALING.shortening), ANNEALING.min_steps)
        evidence = tuple(self._log_evidence.tolist())
        return Level(self.nbeta, self._llc(), evidence, acceptance, self.mode.loss, self._disagreement())

    def _llc(self) -> tuple[float, ...]:
        excess = (self._losses - self.mode.loss).view(self._shape)
        return tuple((self.nbeta * excess.mean(1)).tolist())

    def _disagreement(self) -> float:
        losses = self._losses.view(self._shape)
        expected = losses.var(1).mean() / self._shape[1]
        return float(losses.mean(1).var() / expected) if expected > 0 else 1.0

    def _next(self, most: float) -> float:
        """The nβ at which the weights' effective sample size is what it may fall to, at most `most`."""
        losses = self._losses.view(self._shape)
        losses = losses - losses.amin(1, keepdim=True)

        def enough(nbeta: float) -> bool:
            weights = (-(nbeta - self.nbeta) * losses).exp()
            share = weights.sum(1).square() / weights.square().sum(1) / self._shape[1]
            return float(share.mean()) > ANNEALING.effective_share

        low, high = self.nbeta, self.nbeta * ANNEALING.largest_ratio or ANNEALING.first_nbeta
        while not low and high < most and enough(high):
            high *= ANNEALING.largest_ratio
        if enough(high):
            return min(high, most)
        for _ in range(_BISECTIONS):
            middle = math.sqrt(low * high) if low else high / 2
            low, high = (middle, high) if enough(middle) else (low, middle)
        return min(low or high, most)

    def _resample(self, weights: Tensor) -> Tensor:
        """Which particles go on: each as often as its share of its population's weight, [R] (systematic resampling)."""
        populations, count = self._shape
        offsets = torch.rand(populations, 1, **self._drawing)
        places = (offsets + torch.arange(count, device=weights.device)) / count
        chosen = torch.searchsorted(weights.cumsum(1), places).clamp_max(count - 1)
        return (chosen + count * torch.arange(populations, device=weights.device)[:, None]).view(-1)

    def _rescue(self, chosen: Tensor) -> Tensor:
        """The same, with populations that hold no share of the posterior any more replaced by that which holds most.

        They went where the loss has no zero, as none of their particles was near one when that began to count (islands:
        Vergé, Dubarry, Del Moral & Moulines 2015).
        """
        best = int(self._log_evidence.argmax())
        lost = self._log_evidence < self._log_evidence[best] - ANNEALING.lost
        self._log_evidence[lost] = self._log_evidence[best]
        chosen = chosen.view(self._shape)
        return torch.where(lost[:, None], chosen[best], chosen).view(-1)

    def _correlation(self, before: Tensor) -> float:
        """Between losses now and then, within populations."""
        pair = [losses.view(self._shape) for losses in (before, self._losses)]
        first, second = (losses - losses.mean(1, keepdim=True) for losses in pair)
        norm = first.norm() * second.norm()
        return float((first * second).sum() / norm) if norm > 0 else 0.0

    def _trajectories(self, steps: int, jitter: float, longer: float) -> float:
        """One Hamiltonian trajectory of each particle, which is accepted or not; the mean acceptance.

        Steps differ from particle to particle: narrow places need small ones, and none is caught in a period.
        """
        nbeta, localization = self.nbeta, self._localization
        spread = torch.rand(len(self._displacement), 1, **self._drawing)
        sizes = self._step_size * torch.exp(jitter * (longer - spread))
        momentum, displacement = self._normal(len(sizes)), self._displacement.clone()
        energy = self._energy(self._losses, displacement) + 0.5 * momentum.square().sum(1)
        self._slopes.copy_(self._gradients)

        def kick(share: float) -> None:
            force = torch.mul(self._slopes, nbeta).add_(displacement, alpha=localization)
            momentum.addcmul_(sizes, force, value=-share)

        kick(0.5)
        for step in range(steps):
            displacement.addcmul_(sizes, momentum)
            losses = self._evaluate(displacement)
            kick(1.0 if step < steps - 1 else 0.5)
        fall = energy - self._energy(losses, displacement) - 0.5 * momentum.square().sum(1)
        chance = fall.nan_to_num(nan=-math.inf).clamp_max(0).exp()
        accepted = torch.rand(len(chance), **self._drawing) < chance
        self._displacement = torch.where(accepted[:, None], displacement, self._displacement)
        self._gradients = torch.where(accepted[:, None], self._slopes, self._gradients)
        self._losses = torch.where(accepted, losses, self._losses)
        return float(chance.mean())

    def _energy(self, losses: Tensor, displacement: Tensor) -> Tensor:
        return self.nbeta * losses + 0.5 * self._localization * displacement.square().sum(1)

    def _evaluate(self, displacement: Tensor) -> Tensor:
        """L of each particle, [R]; slopes go into their place."""
        check_interruption()
        self.gradients += 1
        torch.add(self._anchor, displacement, out=self._positions)
        # Beyond what can be computed no particle goes on.
        return self._evaluate_bound().nan_to_num(nan=_OVERFLOW, posinf=_OVERFLOW)

    @property
    def _drawing(self) -> dict[str, Any]:
        return {"generator": self._generator, "dtype": self._anchor.dtype, "device": self._anchor.device}

    def _normal(self, rows: int) -> Tensor:
        return torch.randn(rows, len(self._anchor), **self._drawing)
