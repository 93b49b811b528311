"""Underdamped Langevin dynamics: BAOAB (Leimkuhler & Matthews 2013, arXiv 1203.5428) with time step √ε.

With ξ_t standard normal and momenta p,

    q = p_t − √ε·∇U(w_t),  p_{t+1} = c·q + √(1 − c²)·ξ_{t+1},  w_{t+1} = w_t + √ε·(q + p_{t+1})/2

It is exact in every harmonic direction for any stable ε (that is εa < 4 along a direction of curvature a), at the cost
of one gradient. With momenta a flat direction, whose curvature is γ, forgets its start in fewer steps than without: in
2.5/√(εγ) and not in 2/(εγ) where friction damps it critically, c = exp(−2√(εγ)). But where stiff directions turn along
the way, friction that weak lets the discretisation feed energy into them: networks at generic solutions were heated at
c = 0.82, but not at 0.67, the most that is taken at the step that is the default. Two things make weaker friction safe.
Where the step was halved, friction may be as much weaker: the estimates of such networks are right then, too. And the
flatter the flat directions are, the less does a stiff one turn within one of its periods, as √(εγ): far out friction is
in proportion to that, and a relaxation takes 12/√(εγ) steps and not 0.4/(εγ).
"""

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class BAOAB:
    """Langevin dynamics with momenta.

    Attributes:
        min_friction: least friction times time step, at the default step; measured, see above.
        min_damping: the same over √(εγ), where that is less, from κ = 1200 on. Critical damping is 2; at 3.5 known
            answers come out as well, but at 7 kinks of a loss heat more than at a friction of 0.4.
    """

    min_friction: float = 0.4
    min_damping: float = 12.0
    name = "baoab"
    vanilla = False
    momentum_is_noise = False

    def persistence(self, step_size: float, localization: float, halvings: int = 0) -> float:
        """c, what is left of a momentum after a step."""
        return math.exp(-self._friction(step_size * localization, halvings))

    def coefficients(self, step_size: float, nbeta: float, localization: float, halvings: int = 0) -> tuple[float, ...]:
        """−√ε·nβ, −√ε·γ, ½√ε, c and √(1 − c²)."""
        root, c = math.sqrt(step_size), self.persistence(step_size, localization, halvings)
        return -root * nbeta, -root * localization, 0.5 * root, c, math.sqrt(1 - c**2)

    def step(
        self, displacement: Tensor, momentum: Tensor, gradient: Tensor, noise: Tensor, coefficients: tuple[Tensor, ...]
    ) -> None:
        """Kick, drift, friction and noise, drift."""
        force, restraint, half, kept, renewed = coefficients
        momentum.addcmul_(gradient, force).addcmul_(displacement, restraint)
        displacement.addcmul_(momentum, half)
        momentum.mul_(kept).addcmul_(noise, renewed)
        displacement.addcmul_(momentum, half)

    def relaxation(self, step_size: float, localization: float, halvings: int = 0) -> float:
        """Steps after which the square of a flat direction keeps e⁻² of what it was at most."""
        stiffness = step_size * localization
        # At critical damping (1 + x)²·e⁻²ˣ is left after x/√(εγ) steps, a twelfth at x = 2.5; overdamped it is slower.
        return max(2.5 / math.sqrt(stiffness), self._friction(stiffness, halvings) / stiffness)

    def noise_gain(self, step_size: float, localization: float, halvings: int = 0) -> float:
        """A kick moves a chain by ½ε(1 + c)/(1 − c) times itself in the end, noise by √ε(1 − c²)^½/(1 − c)."""
        c = self.persistence(step_size, localization, halvings)
        return 0.25 * step_size * (1 + c) / (1 - c)

    def _friction(self, stiffness: float, halvings: int) -> float:
        """Friction times time step; `stiffness` is εγ."""
        at_default = self.min_damping * math.sqrt(stiffness * 2**halvings)
        return max(2 * math.sqrt(stiffness), min(self.min_friction, at_default) / 2**halvings)
