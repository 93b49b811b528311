"""What the first steps of chains on large sets tell: that burn-in may end, or that there is nothing to measure."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from groktrace.sampling.engine import Target
from groktrace.sampling.tuning import EQUILIBRIUM


def least_falls(losses: Tensor, gradients: Tensor, nbeta: float, fitting: Sequence[float]) -> list[float]:
    """By how much nβ·L falls at least from each w* to where its chains will be, if the loss is a bowl.

    Along the slope g = ∇L(w*) the mean w̄ of the bowl's posterior lies lower by ½nβ²·g·(nβH + γ)⁻¹g or more, and
    nβH + γ is no larger than 2/ε, for which ε is made. No loss falls below zero.

    Args:
        losses: L(w*), [S].
        gradients: ∇L(w*), [S, D].
        nbeta: nβ.
        fitting: the ε that the curvature at each w* calls for.

    Returns:
        Nats, [S]; NaN where the loss or its gradient is not finite.
    """
    steepest = 0.25 * nbeta**2 * gradients.double().square().sum(1) * losses.new_tensor(fitting).double()
    return torch.where(losses > 0, torch.minimum(steepest, nbeta * losses), steepest).tolist()


class EarlySteps(NamedTuple):
    """What the first steps of a snapshot's chains tell.

    Attributes:
        settled: they are in equilibrium, see `has_settled`.
        fallen: there is no basin where they began.
        too_high: they have more energy than in equilibrium by the last of these steps, or none that is finite.
    """

    settled: bool
    fallen: bool
    too_high: bool


def judge_early_steps(record: Tensor, target: Target) -> EarlySteps:
    """Whether the burn-in of a snapshot's chains may end, and whether their step or their basin is none.

    Args:
        record: of one snapshot, [steps, 5, chains], see `StackedChains.advance`; two steps at least.
        target: what is sampled.
    """
    fallen = target.has_fallen(-float(record[:, 0].amin()), EQUILIBRIUM.fall_for_good)
    most = EQUILIBRIUM.max_early_total_virial * target.dimension + EQUILIBRIUM.slack
    too_high = not float((record[-1, 1] + record[-1, 2]).mean()) <= most
    return EarlySteps(has_settled(record, target.dimension), fallen, too_high)


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
