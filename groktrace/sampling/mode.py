"""Where the localised tempered posterior is densest: the minimum that λ̂ counts from."""

import torch
from torch import Tensor

from groktrace.sampling.interruption import check_interruption
from groktrace.sampling.posterior import StackedLoss
from groktrace.sampling.tuning import ANNEALING


class Mode:
    """Where nβ·L(w) + ½γ‖w − w*‖² is least, followed as nβ grows.

    In a bowl with its bottom anywhere, E[L] is ½Σ h/(nβh + γ) above the loss here, at any nβ.

    Args:
        loss: of one row, in float64.
        anchor: w*, [D], float64.
        localization: γ.

    Attributes:
        loss: L here.
        displacement: w − w*, [D].
        gradients: how many were taken.
    """

    def __init__(self, loss: StackedLoss, anchor: Tensor, localization: float) -> None:
        self._loss, self._anchor, self._localization = loss, anchor, localization
        self.displacement = torch.zeros_like(anchor)
        self.gradients = 1
        self.loss = float(loss.gradients(anchor[None])[0][0])

    def energy(self, nbeta: float) -> float:
        """nβ·L + ½γ‖w − w*‖²."""
        return nbeta * self.loss + 0.5 * self._localization * float(self.displacement.square().sum())

    def move(self, loss: float, displacement: Tensor) -> None:
        """Go on from another place."""
        self.loss, self.displacement = loss, displacement.clone()

    def descend(self, nbeta: float) -> None:
        """Go to where it is at this nβ, by limited-memory BFGS steps (Liu & Nocedal 1989)."""
        moving = self.displacement.clone().requires_grad_()
        descent = torch.optim.LBFGS(
            [moving],
            max_iter=ANNEALING.descent_steps,
            tolerance_grad=0,
            tolerance_change=0,
            history_size=ANNEALING.descent_steps,
            line_search_fn="strong_wolfe",
        )
        best = self.energy(nbeta)

        def evaluate() -> Tensor:
            nonlocal best
            check_interruption()
            here, self.gradients = moving.detach(), self.gradients + 1
            losses, gradients = self._loss.gradients((self._anchor + here)[None])
            moving.grad = nbeta * gradients[0] + self._localization * here
            energy = nbeta * losses[0] + 0.5 * self._localization * here.square().sum()
            if float(energy) < best:
                best = float(energy)
                self.move(float(losses[0]), here)
            return energy

        for _ in range(ANNEALING.descents):
            before = best
            descent.step(evaluate)
            if before - best < ANNEALING.descended:
                break
