"""The posterior's mode, which is known in a bowl."""

import pytest
import torch

from groktrace.sampling.interruption import interruption
from groktrace.sampling.mode import Mode
from groktrace.sampling.posterior import StackedLoss
from groktrace.sampling.weights import WeightLayout

SPECTRUM = torch.logspace(0, -4, 12, dtype=torch.float64)
BOTTOM = torch.linspace(-1, 2, 12, dtype=torch.float64)


def mode(localization, least=0.5):
    """At 0, beside a bowl whose bottom lies elsewhere."""

    def loss(named, tensors):
        return least + 0.5 * (SPECTRUM * (named["w"] - BOTTOM).square()).sum(), None

    stacked = StackedLoss(loss, WeightLayout(("w",), ((12,),)), (torch.zeros(1),), {})
    return Mode(stacked, torch.zeros(12).double(), localization)


def test_it_is_where_the_bowl_and_the_spring_balance():
    found = mode(localization=3.0)
    start = found.loss
    for nbeta in (10.0, 1e3, 1e5):
        found.descend(nbeta)
        share = nbeta * SPECTRUM / (nbeta * SPECTRUM + 3)
        assert torch.allclose(found.displacement, share * BOTTOM, atol=1e-2)
        exact = 0.5 + 0.5 * float((SPECTRUM * ((1 - share) * BOTTOM).square()).sum())
        assert nbeta * (found.loss - exact) == pytest.approx(0.0, abs=0.1)
        assert found.loss < start
    assert 10 < found.gradients < 1000


def test_it_stays_where_the_loss_is_least():
    found = mode(localization=1.0)
    found.move(0.5, BOTTOM)
    energy = found.energy(10.0)
    found.descend(10.0)
    # The spring pulls back to w*.
    assert found.energy(10.0) < energy
    free = mode(localization=0.0)
    free.move(0.5, BOTTOM)
    free.descend(10.0)
    assert torch.equal(free.displacement, BOTTOM)
    assert free.loss == 0.5


def test_a_descent_can_be_interrupted():
    interruption.set()
    try:
        with pytest.raises(InterruptedError):
            mode(localization=1.0).descend(10.0)
    finally:
        interruption.clear()
