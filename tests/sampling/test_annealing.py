import math

import pytest
import torch

from groktrace.sampling.annealing import Particles
from groktrace.sampling.posterior import StackedLoss
from groktrace.sampling.weights import WeightLayout


def particles(loss, dimension, localization=1.0, shape=(4, 64), seed=0):
    """Particles of a loss of flat weights, whose least value is 0 at 0."""
    layout = WeightLayout(("w",), ((dimension,),))
    stacked = StackedLoss(lambda named, tensors: (loss(named["w"]), None), layout, (torch.zeros(1),), {})
    generator = torch.Generator().manual_seed(seed)
    return Particles(stacked, torch.zeros(dimension).double(), localization, shape, generator)


def climb(some, most):
    levels = []
    while some.nbeta < most:
        levels.append(some.cool(most))
    return levels


def test_particles_in_a_bowl_have_the_soft_rank_and_the_evidence_at_every_temperature():
    spectrum = torch.logspace(0, -3, 20, dtype=torch.float64)
    levels = climb(particles(lambda w: 0.5 * (spectrum * w.square()).sum(), 20), 1e6)
    assert levels[-1].nbeta == 1e6
    excess, disagreement = [], []
    for level in levels:
        ratios = level.nbeta * spectrum
        llc, scatter = 0.5 * (ratios / (1 + ratios)).sum(), (0.5 * (ratios / (1 + ratios)).square().sum()).sqrt()
        found = torch.tensor(level.llc).mean()
        excess.append(float((found - llc) / scatter))
        disagreement.append(level.disagreement)
        assert abs(excess[-1]) < 4.5 / math.sqrt(256) + 0.1
        exact = -0.5 * torch.log1p(ratios).sum()
        assert torch.tensor(level.log_evidence).mean() == pytest.approx(
            float(exact), abs=0.02 * abs(float(exact)) + 0.4
        )
    assert 0.7 < sum(disagreement) / len(disagreement) < 1.5
    assert abs(sum(excess) / len(excess)) < 0.1  # λ̂ is off by a tenth of one particle's scatter at most, in the mean


def test_particles_find_the_arms_of_a_crossing_at_all_scales():
    # L = x²y² has λ = 1/2 of multiplicity 2: half of the posterior's mass is within |x| < nβ^(-1/4) or |y| < nβ^(-1/4).
    some = particles(lambda w: w.prod().square(), 2, shape=(4, 256))
    level = climb(some, 1e12)[-1]
    # Z = ∫∫ exp(−nβx²y² − ½(x² + y²)): λ̂ by quadrature over x, where y is Gaussian.
    x = torch.logspace(-9, 1, 20001, dtype=torch.float64)
    variance = 1 / (1 + 2 * level.nbeta * x.square())
    density = (variance.sqrt() * (-0.5 * x.square()).exp()) * x
    exact = float((density * level.nbeta * x.square() * variance).sum() / density.sum())
    found = torch.tensor(level.llc)
    assert found.mean() == pytest.approx(exact, abs=5 * math.sqrt(0.5 / 1024) + 0.01)


def test_the_same_seed_gives_the_same_particles_and_another_gives_others():
    def run(seed):
        return climb(particles(lambda w: w.square().sum(), 3, seed=seed), 100.0)

    assert run(0) == run(0)
    assert run(0) != run(1)


def test_particles_that_cannot_be_computed_do_not_go_on():
    def loss(w):
        return torch.where(w[0] > 0.5, math.nan, w.square().sum())

    level = climb(particles(loss, 2), 1e4)[-1]
    assert torch.tensor(level.llc).mean() == pytest.approx(1.0, abs=0.3)
    assert level.acceptance > 0.5


def test_a_population_that_is_nowhere_near_a_zero_of_the_loss_is_replaced():
    def loss(w):  # zero on a line that one in eleven particles is beside at first
        return (w[1:] - 1).square().sum() + torch.where(w[0] > 1.3, 0.0, 1.0) * (1 + w[0].square())

    for seed in range(4):
        llc = climb(particles(loss, 3, shape=(4, 4), seed=seed), 1e8)[-1].llc
        assert max(llc) < 20
