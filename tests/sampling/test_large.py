import math
from dataclasses import replace

import pytest
import torch

from groktrace.sampling import large
from groktrace.sampling.calibration import resolve, step_size
from groktrace.sampling.chains import sample
from groktrace.sampling.diagnostics import standard_error
from groktrace.sampling.large import hessian_trace_large, sample_large, top_eigenvalue_large
from groktrace.sampling.network import LargeNetwork
from groktrace.sampling.posterior import StackedLoss
from groktrace.sampling.settings import SamplingSettings
from groktrace.sampling.weights import WeightLayout

SPECTRUM = torch.logspace(0, -3, 60).double()


def alone(loss, micro_batch=8):
    return replace(loss, vectorised=False, micro_batch=micro_batch)


def draw(loss, weights, settings, nbeta, gamma, epsilon, needed=lambda traces: 1.0, step=0):
    settings = resolve(settings, loss.layout.size, stacked=False)
    return sample_large(loss, weights, step, settings, nbeta, gamma, epsilon, needed)


def stacked(loss, weights, settings, nbeta, gamma, epsilon, step=0):
    settings = resolve(settings, loss.layout.size, stacked=True)
    (traces,) = sample(loss, weights["w"][None], [step], settings, nbeta, gamma, [epsilon], lambda traces: 1.0)
    return traces


@pytest.mark.parametrize("batch_size", [None, 5])
def test_large_networks_take_the_same_steps_as_stacked_ones(batch_size):
    # The published method, as it begins at w* in both.
    loss, weights = regression()
    settings = SamplingSettings("sgld", chains=3, draws=20, burn_in=4, step_size=1e-3, batch_size=batch_size)
    found = draw(alone(loss, 7), weights, settings, 30.0, 5.0, 1e-3, step=700)
    expected = stacked(loss, weights, settings, 30.0, 5.0, 1e-3, step=700)
    for name in ("delta_loss", "virial", "restraint"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-9, atol=1e-9)
    assert found.centred_draws.shape == expected.centred_draws.shape


@pytest.mark.parametrize("method", ["baoab", "leimkuhler_matthews"])
@pytest.mark.parametrize("chains", [1, 2, 3])
def test_chains_of_a_large_network_find_the_posterior_of_a_bowl(bowl, method, chains):
    nbeta, gamma = 100.0, 1.0
    off = 0.05
    loss = alone(bowl(SPECTRUM, minimum=torch.full((60,), -off)))
    a = nbeta * SPECTRUM + gamma
    soft_rank = float(0.5 * (nbeta * SPECTRUM / a).sum())
    shift = nbeta * SPECTRUM * off / a
    slope = 0.5 * nbeta * float((SPECTRUM * ((off - shift).square() - off**2)).sum())
    settings = SamplingSettings(method, chains=chains, burn_in=150, draws=3000 // chains)
    traces = draw(loss, {"w": torch.zeros(60).double()}, settings, nbeta, gamma, step_size(nbeta, gamma, 1.0))
    error = standard_error(traces.delta_loss)
    assert float(traces.delta_loss.mean()) == pytest.approx(soft_rank + slope, abs=4 * error)
    assert error < 0.07 * soft_rank
    assert float((traces.virial + traces.restraint).mean()) == pytest.approx(60, rel=0.03)
    if chains == 1:
        assert traces.centred_draws.shape[1] == 0
    else:  # that of the centre, wherever w* lies
        assert float(traces.centred_draws.mean()) == pytest.approx(
            soft_rank, abs=5 * standard_error(traces.centred_draws)
        )


def regression(n=200, d=8):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(n, d, generator=generator).double()
    y = x @ torch.randn(d, generator=generator).double() + 0.5 * torch.randn(n, generator=generator).double()
    best = torch.linalg.lstsq(x, y[:, None]).solution[:, 0]
    layout = WeightLayout(("w",), ((d,),))
    loss = StackedLoss(lambda w, t: (0.5 * (t[0] @ w["w"] - t[1]).square().mean(), None), layout, (x, y), {})
    return loss, {"w": best + 0.1}


@pytest.mark.parametrize("method", ["baoab", "leimkuhler_matthews"])
def test_minibatches_of_a_large_network_agree_with_the_full_batch_and_cool_down(method):
    loss, weights = regression()
    x = loss.tensors[0]
    nbeta, gamma = 200.0, 1.0
    epsilon = step_size(nbeta, gamma, float(torch.linalg.eigvalsh(x.T @ x / len(x)).max()))
    full, batched = (
        draw(
            alone(loss, 100),
            weights,
            SamplingSettings(method, chains=2, burn_in=100, draws=400, batch_size=size),
            nbeta,
            gamma,
            epsilon,
        )
        for size in (None, 80)
    )
    error = math.hypot(standard_error(full.delta_loss), standard_error(batched.delta_loss))
    assert error < 0.4  # λ is 4
    assert float(batched.delta_loss.mean()) == pytest.approx(float(full.delta_loss.mean()), abs=4 * error + 0.1)
    assert full.heating == 0
    assert 0 < batched.heating < 0.03
    assert batched.step_size < full.step_size


@pytest.mark.parametrize(("method", "epsilon"), [("baoab", 2e-3), ("leimkuhler_matthews", 1e-2)])
def test_minibatches_heat_a_large_network_as_they_heat_stacked_ones(method, epsilon):
    loss, weights = regression()
    settings = SamplingSettings(method, chains=2, burn_in=20, draws=1000, step_size=epsilon, batch_size=20)
    found = draw(alone(loss, 16), weights, settings, 200.0, 1.0, epsilon)
    expected = stacked(loss, weights, settings, 200.0, 1.0, epsilon)
    assert expected.heating > 0.01
    assert found.heating == pytest.approx(expected.heating, rel=0.4)


def test_diverging_chains_of_a_large_network_are_halved_and_counted(bowl, monkeypatch):
    evaluated, plain = [], large.LargeChains._evaluate
    monkeypatch.setattr(
        large.LargeChains, "_evaluate", lambda self, chain: evaluated.append(chain) or plain(self, chain)
    )
    stable = step_size(10.0, 1.0, 1.0)
    weights = {"w": torch.zeros(60).double()}
    settings = SamplingSettings(chains=2, burn_in=300, draws=300)
    traces = draw(alone(bowl(SPECTRUM)), weights, settings, 10.0, 1.0, 16 * stable)
    assert not traces.diverged(60)
    assert traces.halvings in (3, 4)
    assert traces.lost == len(evaluated) / 2 - 600 > 0
    explicit = replace(settings, step_size=50.0)
    assert draw(alone(bowl(SPECTRUM)), weights, explicit, 10.0, 1.0, 50.0).diverged(60)


def test_draws_of_a_large_network_grow_until_they_are_enough(bowl):
    weights = {"w": torch.zeros(60).double()}
    epsilon = step_size(10.0, 1.0, 1.0)
    settings = SamplingSettings(chains=2)
    target = alone(bowl(SPECTRUM)), weights, settings, 10.0, 1.0, epsilon
    first = draw(*target)
    grown = draw(*target, lambda traces: 300 / len(traces.delta_loss))
    assert len(grown.delta_loss) == 300
    assert torch.equal(grown.delta_loss[: len(first.delta_loss)], first.delta_loss)


def test_curvature_of_a_large_network(bowl):
    curvatures = torch.cat([torch.tensor([3.0, -2.0, 2.9]), torch.rand(57, generator=torch.Generator().manual_seed(0))])
    network = LargeNetwork(alone(bowl(curvatures)), {"w": torch.ones(60).double()})
    top = top_eigenvalue_large(network, torch.Generator().manual_seed(1))
    assert 0.95 * 3 < top <= 3 * (1 + 1e-6)
    trace, error = hessian_trace_large(network, torch.Generator().manual_seed(1), 4)
    assert trace == pytest.approx(float(curvatures.sum()), abs=4 * error + 1e-4)


def test_curvature_of_a_confident_classifier_that_is_large(confident_classifier):
    loss, flat, exact = confident_classifier
    network = LargeNetwork(alone(loss, 2), loss.layout.unflatten(flat[0]))
    assert top_eigenvalue_large(network, torch.Generator().manual_seed(1)) == pytest.approx(float(exact), rel=0.02)


def test_kinks_are_no_curvature_of_a_large_network(kinked, monkeypatch):
    loss, flat, exact = kinked(False)
    network = LargeNetwork(alone(loss, 20), loss.layout.unflatten(flat[0]))
    for seed in range(3):
        found = top_eigenvalue_large(network, torch.Generator().manual_seed(seed))
        assert found == pytest.approx(float(exact[0]), rel=0.03)

    def without(*_):
        raise RuntimeError("no second derivative")

    monkeypatch.setattr(LargeNetwork, "add_hessian_product", without)
    assert top_eigenvalue_large(network, torch.Generator().manual_seed(1)) > 1.2 * float(exact[0])


def test_exact_products_of_a_large_network():
    torch.manual_seed(0)
    layout = WeightLayout(("w", "z"), ((3,), (2,)), ("z",))
    x = torch.randn(7, 3)

    def forward(weights, tensors):
        wave = (weights["z"] * torch.tensor([1 + 2j, 0.5j])).sum()
        return ((tensors[0] @ weights["w"]).tanh() + (wave * wave).real).square().mean(), None

    network = LargeNetwork(alone(StackedLoss(forward, layout, (x,), {}), 3), layout.unflatten(torch.randn(7)))
    direction, out = torch.randn(7), torch.ones(7)
    loss = network.add_hessian_product(out, direction)
    flat = network.vector()
    hessian = torch.autograd.functional.hessian(lambda w: forward(layout.unflatten(w), (x,))[0], flat)
    torch.testing.assert_close(out, 1 + hessian @ direction, rtol=1e-4, atol=1e-5)
    assert loss == pytest.approx(network.mean_loss(), rel=1e-5)


@pytest.mark.parametrize(("curvature", "expected"), [(0.0, 0.0), (math.nan, math.nan)])
def test_curvature_where_there_is_none(bowl, curvature, expected):
    network = LargeNetwork(alone(bowl([curvature] * 20)), {"w": torch.ones(20).double()})
    found = top_eigenvalue_large(network, torch.Generator().manual_seed(1))
    assert found == expected or (math.isnan(found) and math.isnan(expected))
