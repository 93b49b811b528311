"""The posterior of one snapshot from nβ = 0 to as large an nβ as wanted: particles that are annealed.

Sequential Monte Carlo (Del Moral, Doucet & Jasra 2006) with Hamiltonian trajectories (Duane et al. 1987; Neal 2011). At
large nβ the posterior is a thin, curved tube along which a chain crawls: one relaxation takes √κ steps or more. Particles
need not go along it: where on the tube they are follows from their weights as nβ grows, and a trajectory has only to
make them at home across it.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from groktrace.sampling.engine import interruption
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
        llc: nβ·(E[L] − L*) of each population.
        log_evidence: log E[exp(−nβ·(L − L*))] over the Gaussian that they began with, of each population.
        acceptance: of the last trajectories.
    """

    nbeta: float
    llc: tuple[float, ...]
    log_evidence: tuple[float, ...]
    acceptance: float


class Particles:
    """Populations of particles of exp(−nβ·L(w) − ½γ‖w − w*‖²), at first of nβ = 0.

    Populations share the ladder and the step, and no particle: they tell each other's error.

    Args:
        loss: of as many rows as there are particles, in float64.
        anchor: w*, [D], float64.
        localization: γ.
        minimum: L*, from which losses are counted.
        shape: how many populations, and particles in each.
        generator: of everything that is drawn.

    Attributes:
        nbeta: nβ now.
        gradients: how often all particles' gradients were taken so far.
    """

    def __init__(
        self,
        loss: StackedLoss,
        anchor: Tensor,
        localization: float,
        minimum: float,
        shape: tuple[int, int],
        generator: torch.Generator,
    ) -> None:
        self._anchor, self._localization, self._minimum = anchor, localization, minimum
        self._generator = generator
        self._shape = shape
        self._displacement = self._normal(math.prod(shape)) / math.sqrt(localization)
        self._positions = torch.empty_like(self._displacement)
        self._slopes = torch.empty_like(self._displacement)
        self._evaluate_bound = loss.bound(self._positions, self._slopes)
        self.nbeta, self.gradients = 0.0, 0
        self._step_size = ANNEALING.first_step / math.sqrt(localization)
        self._steps = ANNEALING.first_steps
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
        chosen = self._resample(torch.softmax(logs, 1))
        self._displacement, self._losses = self._displacement[chosen], self._losses[chosen]
        self._gradients = self._gradients[chosen]
        if self.nbeta:
            self._step_size *= math.sqrt(self.nbeta / nbeta)
        self.nbeta = nbeta
        return self.move()

    def move(self) -> Level:
        """Trajectories until the particles' losses have hardly to do with what they were."""
        before, moves = self._losses, 0
        correlation = 1.0
        while moves < ANNEALING.moves and correlation > ANNEALING.correlation:
            acceptance = self._trajectories()
            self._step_size *= math.exp(ANNEALING.adaptation * (acceptance - ANNEALING.acceptance))
            moves += 1
            correlation = self._correlation(before)
        if correlation > ANNEALING.correlation:
            self._steps = min(math.ceil(self._steps * ANNEALING.lengthening), ANNEALING.most_steps)
        elif moves == 1:
            self._steps = max(math.floor(self._steps / ANNEALING.shortening), ANNEALING.least_steps)
        llc = self.nbeta * self._losses.view(self._shape).mean(1)
        return Level(self.nbeta, tuple(llc.tolist()), tuple(self._log_evidence.tolist()), acceptance)

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

    def _correlation(self, before: Tensor) -> float:
        """Between losses now and then, within populations."""
        pair = [losses.view(self._shape) for losses in (before, self._losses)]
        first, second = (losses - losses.mean(1, keepdim=True) for losses in pair)
        norm = first.norm() * second.norm()
        return float((first * second).sum() / norm) if norm > 0 else 0.0

    def _trajectories(self) -> float:
        """One Hamiltonian trajectory of each particle, which is accepted or not; the mean acceptance.

        Steps differ from particle to particle: narrow places need small ones, and none is caught in a period.
        """
        nbeta, localization = self.nbeta, self._localization
        spread = torch.rand(len(self._displacement), 1, **self._drawing)
        sizes = self._step_size * torch.exp(ANNEALING.jitter * (ANNEALING.longer - spread))
        momentum, displacement = self._normal(len(sizes)), self._displacement.clone()
        energy = self._energy(self._losses, displacement, momentum)
        self._slopes.copy_(self._gradients)

        def kick(share: float) -> None:
            force = torch.mul(self._slopes, nbeta).add_(displacement, alpha=localization)
            momentum.addcmul_(sizes, force, value=-share)

        kick(0.5)
        for step in range(self._steps):
            displacement.addcmul_(sizes, momentum)
            losses = self._evaluate(displacement)
            kick(1.0 if step < self._steps - 1 else 0.5)
        fall = energy - self._energy(losses, displacement, momentum)
        chance = fall.nan_to_num(nan=-math.inf).clamp_max(0).exp()
        accepted = torch.rand(len(chance), **self._drawing) < chance
        self._displacement = torch.where(accepted[:, None], displacement, self._displacement)
        self._gradients = torch.where(accepted[:, None], self._slopes, self._gradients)
        self._losses = torch.where(accepted, losses, self._losses)
        return float(chance.mean())

    def _energy(self, losses: Tensor, displacement: Tensor, momentum: Tensor) -> Tensor:
        kinetic, restraint = momentum.square().sum(1), displacement.square().sum(1)
        return self.nbeta * losses + 0.5 * (self._localization * restraint + kinetic)

    def _evaluate(self, displacement: Tensor) -> Tensor:
        """L − L* of each particle, [R]; slopes go into their place."""
        if interruption.is_set():
            raise InterruptedError
        self.gradients += 1
        torch.add(self._anchor, displacement, out=self._positions)
        # Beyond what can be computed no particle goes on.
        return (self._evaluate_bound() - self._minimum).nan_to_num(nan=_OVERFLOW, posinf=_OVERFLOW)

    @property
    def _drawing(self) -> dict[str, Any]:
        return {"generator": self._generator, "dtype": self._anchor.dtype, "device": self._anchor.device}

    def _normal(self, rows: int) -> Tensor:
        return torch.randn(rows, len(self._anchor), **self._drawing)
