"""What the first steps of chains on large sets tell: that burn-in may end, or that there is nothing to measure."""

import math

from torch import Tensor

from groktrace.sampling.engine import Target
from groktrace.sampling.tuning import EQUILIBRIUM


def has_settled(record: Tensor, dimension: int) -> bool:
    """Whether virial and restraint add up to what they come to in equilibrium, and the virial falls no more.

    The first is looked at in the second half of the steps, the second between the halves: of many weights a virial of
    three times its mean, that of starts where the loss is steeper than its curvature tells, is little.

    Args:
        record: of one snapshot, [steps, 5, chains], see `StackedChains.advance`; two steps at least.
        dimension: D.
    """
    half = len(record) // 2
    late, before = record[half:], float(record[:half, 1].mean())
    off = abs(float((late[:, 1] + late[:, 2]).mean()) - dimension)
    error = math.sqrt(2 * dimension / late.shape[2])
    if not off <= EQUILIBRIUM.virial_tolerance * dimension + EQUILIBRIUM.virial_errors * error:
        return False
    virial = float(late[:, 1].mean())
    # A virial of independent directions has at most twice its mean as variance.
    error = math.sqrt(2 * abs(virial) * (1 / half + 1 / len(late)) / late.shape[2])
    return before - virial <= EQUILIBRIUM.max_virial_fall * abs(virial) + EQUILIBRIUM.virial_errors * error


def has_fallen(record: Tensor, target: Target) -> bool:
    """Whether the loss fell so far at once that there is no basin where the chains began.

    Args:
        record: the same.
        target: what is sampled.
    """
    return target.has_fallen(-float(record[:, 0].amin()), EQUILIBRIUM.fall_for_good)
