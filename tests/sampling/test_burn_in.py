"""What the first steps of chains tell, by records that are known beforehand."""

import math

import pytest
import torch

from groktrace.sampling.burn_in import has_settled, is_leaving
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


def test_chains_leave_where_the_loss_falls_at_once_or_is_not_finite():
    steady = record((230.0, 230.0))
    assert not is_leaving(steady, TARGET)
    assert torch.isfinite(steady).all()
    steady[3, 0] = -2.0 * DIMENSION
    assert is_leaving(steady, TARGET)
    assert steady[:, 1].isnan().all()
    assert is_leaving(record((math.inf, 230.0)), TARGET)
