"""Stochastic gradient Langevin dynamics as published (Welling & Teh 2011).

    w_{t+1} = w_t − (ε/2)∇U(w_t) + √ε·ξ_t

Along a direction of curvature a it is too wide by 1/(1 − εa/4).
"""

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class SGLD:
    """Overdamped Langevin dynamics with fresh noise."""

    name = "sgld"
    vanilla = True
    momentum_is_noise = True

    def coefficients(self, step_size: float, nbeta: float, localization: float, halvings: int = 0) -> tuple[float, ...]:
        """1 − ½εγ, −½ε·nβ and √ε."""
        return 1 - 0.5 * step_size * localization, -0.5 * step_size * nbeta, math.sqrt(step_size)

    def step(
        self, displacement: Tensor, momentum: Tensor, gradient: Tensor, noise: Tensor, coefficients: tuple[Tensor, ...]
    ) -> None:
        """The formula above; there is no momentum."""
        kept, force, spread = coefficients
        displacement.mul_(kept).addcmul_(gradient, force)
        displacement.addcmul_(noise, spread)

    def relaxation(self, step_size: float, localization: float, halvings: int = 0) -> float:
        """Steps after which the square of a flat direction keeps e⁻² of what it was."""
        return 2 / (step_size * localization)

    def noise_gain(self, step_size: float, localization: float, halvings: int = 0) -> float:
        """That of overdamped dynamics."""
        return 0.25 * step_size
