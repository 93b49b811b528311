"""What the first steps of chains tell, by records that are known beforehand."""

import math

import pytest
import torch

from groktrace.sampling.burn_in import has_settled, judge_early_steps, least_falls
from groktrace.sampling.calibration import step_size
from groktrace.sampling.engine import Target
from groktrace.sampling.settings import ResolvedSettings

DIMENSION = 40_000
TARGET = Target(ResolvedSettings(method="baoab", chains=2), 1.0, 1.0, DIMENSION, True)


def record(virials, total=DIMENSION):
    """Eight steps of two chains with these virials in their first and second half."""
    found = torch.zeros(8, 5, 2).double()
    found[:4, 1], found[4:, 1] = virials
    found[:, 2] = total - found[:, 1]
    return found


@pytest.mark.parametrize(
    ("virials", "total", "settled"),
    [
        ((230.0, 230.0), DIMENSION, True),
        ((280.0, 230.0), DIMENSION, True),  # within 10 % and three errors of 10.7
        ((330.0, 230.0), DIMENSION, False),  # little beside the dimension
        ((180.0, 230.0), DIMENSION, True),  # it rises where the chains find their way down a slope
        ((-100.0, -100.0), DIMENSION, True),
        ((230.0, 230.0), 1.05 * DIMENSION, False),
        ((math.nan, 230.0), DIMENSION, False),
    ],
)
def test_chains_have_settled_where_nothing_falls_any_more(virials, total, settled):
    assert has_settled(record(virials, total), DIMENSION) is settled


def test_chains_have_fallen_where_the_loss_fell_by_more_than_a_nat_a_weight():
    steady = record((230.0, 230.0))
    assert judge_early_steps(steady, TARGET) == (True, False, False)
    steady[3, 0] = -0.9 * DIMENSION
    assert not judge_early_steps(steady, TARGET).fallen
    steady[3, 0] = -2.0 * DIMENSION
    assert judge_early_steps(steady, TARGET).fallen


@pytest.mark.parametrize(("total", "too_high"), [(1.1, False), (1.3, True), (math.inf, True), (math.nan, True)])
def test_chains_are_too_high_where_they_end_with_more_energy_than_in_equilibrium(total, too_high):
    steps = record((230.0, 230.0))
    steps[-1, 2] = total * DIMENSION
    told = judge_early_steps(steps, TARGET)
    assert told.too_high is too_high
    assert not told.fallen


def test_the_loss_of_a_bowl_falls_by_what_its_slope_tells_at_least():
    """In a bowl with its minimum at b the posterior's mean is at nβh·b/(nβh + γ), whatever the noise does."""
    nbeta, localization = 30.0, 2.0
    curvatures, best = torch.tensor([4.0, 4.0, 0.5]).double(), torch.tensor([3.0, -1.0, 2.0]).double()
    gradient = -curvatures * best
    loss = 0.5 * (curvatures * best.square()).sum()
    mean = nbeta * curvatures * best / (nbeta * curvatures + localization)
    exact = nbeta * (loss - 0.5 * (curvatures * (mean - best).square()).sum())
    fitting = [step_size(nbeta, localization, 4.0)] * 3
    found = least_falls(loss * torch.tensor([1.0, 0.1, -1.0]), gradient.expand(3, 3), nbeta, fitting)
    assert 0.3 * exact < found[0] <= exact
    assert found[1] == pytest.approx(0.1 * nbeta * loss)  # it cannot fall below zero
    assert found[2] == found[0]
