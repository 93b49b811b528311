"""Overdamped Langevin dynamics with averaged noise (Leimkuhler & Matthews 2013, arXiv 1203.5428).

    w_{t+1} = w_t − (ε/2)∇U(w_t) + √ε·(ξ_t + ξ_{t+1})/2

The limit of BAOAB at high friction, c = 0, in which ξ_t is the momentum: as exact, with slower flat directions, and no
momentum that would have to be kept.
"""

from dataclasses import dataclass

from groktrace.sampling.kernels.baoab import BAOAB


@dataclass(frozen=True)
class LeimkuhlerMatthews(BAOAB):
    """Langevin dynamics with averaged noise in place of momenta."""

    name = "leimkuhler_matthews"
    momentum_is_noise = True

    def persistence(self, step_size: float, localization: float, halvings: int = 0) -> float:
        """Nothing is left of a momentum."""
        return 0.0

    def relaxation(self, step_size: float, localization: float, halvings: int = 0) -> float:
        """Steps after which the square of a flat direction keeps e⁻² of what it was."""
        return 2 / (step_size * localization)
