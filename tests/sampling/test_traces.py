"""When chains count as gone."""

import math
from dataclasses import replace

import pytest
import torch

from groktrace.sampling.kernels import KERNELS
from groktrace.sampling.traces import Traces, inner_products, products_with_others, reduced_step_size
from groktrace.sampling.tuning import MINIBATCH_NOISE


def test_chains_that_are_far_out_have_diverged_however_finite():
    def traces(pull, spread):
        values = torch.ones(20, 2)
        return Traces(values, pull * values, spread * values, values[:, :1], 0.1, 0)

    assert not traces(30.0, 30.0).diverged(60)
    assert not traces(-5000.0, 5060.0).diverged(60)  # far from a minimum, in equilibrium
    assert traces(1e27, 1e20).diverged(60)
    assert traces(30.0, 1e4).diverged(60)
    assert traces(math.nan, 30.0).diverged(60)
    one = traces(30.0, 30.0)
    one.restraint[7, 1] = 500.0  # out and back: no draw of a posterior lies there
    assert one.diverged(60)
    one.restraint[7, 1] = 200.0
    assert not one.diverged(60)
    one.virial[7, 1] = 600.0  # where a valley turns, stiff forces act along the way to w*
    assert not one.diverged(60)


@pytest.mark.parametrize("dimension", [1, 60, 14_000, 10**6])
@pytest.mark.parametrize("degree", [1, 2])
def test_no_draw_of_a_posterior_is_a_burst_but_one_of_fed_in_energy_is(dimension, degree):
    # At a minimum of degree 2k, nβ·L = Σ x²ᵏ has (w − w*)·nβ∇L = 2k·Gamma(D/2k).
    shape = torch.full((20_000, 4), dimension / (2 * degree), dtype=torch.float64)
    torch.manual_seed(0)
    virial = 2 * degree * torch._standard_gamma(shape)
    quiet = Traces(virial / 2, 0.9 * virial, 0.1 * virial, virial[:, :1], 0.1, 0)
    assert not quiet.has_energy_spike
    pull = quiet.virial.clone()
    pull[300:320, 1] += 0.15 * dimension + 600
    assert replace(quiet, virial=pull).has_energy_spike
    assert not replace(quiet, virial=pull).diverged(dimension)
    pull[300, 1] = math.nan
    assert replace(quiet, virial=pull).has_energy_spike


def test_chains_are_hot_where_pull_and_spread_exceed_what_equilibrium_allows_beside_the_pull():
    dimension, pull = 14_000, 300.0
    generator = torch.Generator().manual_seed(0)
    spread = dimension - pull + (2 * dimension) ** 0.5 * torch.randn(400, 2, generator=generator, dtype=torch.float64)

    def hot(more, step_size=0.1, pull=pull, halvings=0):
        pulls = torch.full_like(spread, pull + more)
        traces = Traces(pulls / 2, pulls, spread, pulls[:, :1] / 2, step_size, 0, halvings)
        return traces.has_discretization_bias(KERNELS["baoab"], 1.0, dimension)

    assert not hot(0.0)
    assert not hot(-200.0)
    assert not hot(10.0)
    assert hot(200.0)
    # Where the pull is large, a twentieth of it has to be exceeded, however certain less is: here 350 of 7000.
    spread += pull - 7000
    assert not hot(250.0, pull=7000)
    assert hot(600.0, pull=7000)
    spread -= pull - 7000
    # 400 draws are but one relaxation time here, in which the spread of flat directions tells little.
    assert not hot(300.0, step_size=1e-3)
    assert hot(300.0, step_size=1e-3, halvings=3)  # with the weaker friction of halved steps they are five


@pytest.mark.parametrize("method", ["baoab", "leimkuhler_matthews"])
@pytest.mark.parametrize("heating", [0.03, 0.2])
@pytest.mark.parametrize(("step_size", "halvings"), [(0.2, 0), (1e-3, 0), (0.01, 2)])
def test_hot_chains_get_the_step_at_which_noise_heats_as_little_as_is_wanted(method, heating, step_size, halvings):
    values = torch.ones(20, 2)
    hot = Traces(values, values, values, values[:, :1], step_size, 0, halvings, heating=heating)
    smaller = reduced_step_size(hot, KERNELS[method], 2.0)
    left = (
        heating
        * KERNELS[method].noise_gain(smaller, 2.0, halvings)
        / KERNELS[method].noise_gain(step_size, 2.0, halvings)
    )
    assert 0.7 * MINIBATCH_NOISE.heating < left <= 0.8 * MINIBATCH_NOISE.heating or smaller <= step_size / 32
    assert reduced_step_size(replace(hot, heating=MINIBATCH_NOISE.heating), KERNELS[method], 2.0) == step_size


@pytest.mark.parametrize("chains", [2, 3])
@pytest.mark.parametrize("apart", [0.0, 5.0])
def test_the_error_of_the_centred_estimate_is_that_of_the_chains_own_products(chains, apart):
    """Whatever the chains' means differ by: it cancels."""
    draws, generator = 20_000, torch.Generator().manual_seed(0)
    own = 10 + torch.randn(draws, chains, generator=generator, dtype=torch.float64)
    own += apart * torch.linspace(-1, 1, chains)
    virial = torch.full((draws, chains), 20.0, dtype=torch.float64)
    traces = Traces(virial / 2, virial, virial, own, 0.1, 0, means=torch.zeros(chains, chains))
    assert traces.centred == pytest.approx(10)
    assert traces.centred_error == pytest.approx(1 / (chains * draws) ** 0.5, rel=0.05)
    assert replace(traces, slow=4.0).centred_error == pytest.approx(2 / (chains * draws) ** 0.5, rel=0.05)


@pytest.mark.parametrize("chains", [1, 2, 3])
def test_inner_products_are_those_of_each_row_and_of_the_other_chains(chains):
    w, g = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pull, spread = inner_products(w, g)
    for row in range(6):
        others = [other for other in range(row - row % chains, row - row % chains + chains) if other != row]
        assert float(pull[row]) == pytest.approx(float(w[row] @ g[row]))
        assert float(spread[row]) == pytest.approx(float(w[row] @ w[row]))
        if others:
            expected = sum(float(w[other] @ g[row]) for other in others)
            assert float(products_with_others(w, g, chains)[row]) == pytest.approx(expected)
