"""The dynamics against exactly known stationary laws."""

import math

import pytest
import torch

from groktrace.sampling import langevin
from groktrace.sampling.langevin import LangevinConfig, generator_for
from groktrace.sampling.noise import normal_like

NBETA, GAMMA = 50.0, 2.0
CURVATURES = torch.tensor([0.0, 0.1, 1.0, 4.0], dtype=torch.float64)
TOTAL = NBETA * CURVATURES + GAMMA


def stationary_variance(method, epsilon, rows=400, burn_in=300, draws=300):
    config = LangevinConfig(method, NBETA, GAMMA, torch.full((rows,), epsilon, dtype=torch.float64))
    generators = [generator_for(0, 0, row, "test", torch.device("cpu")) for row in range(rows)]
    state = langevin.init(config, torch.zeros(rows, len(CURVATURES), dtype=torch.float64), generators)
    total = torch.zeros(len(CURVATURES), dtype=torch.float64)
    for t in range(burn_in + draws):
        langevin.step(config, state, CURVATURES * state.displacement)
        if t >= burn_in:
            total += state.displacement.square().mean(0)
    return total / draws


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9])
def test_averaged_noise_is_exact_in_every_harmonic_direction(fraction):
    variance = stationary_variance("averaged", 4 * fraction / float(TOTAL.max()), burn_in=2000)
    # 400 chains are at least 400 independent draws: relative standard deviation of a variance √(2/400) = 7 %.
    torch.testing.assert_close(variance * TOTAL, torch.ones(4, dtype=torch.float64), rtol=0.15, atol=0)


def test_sgld_is_too_wide_by_the_known_factor():
    epsilon = 2.0 / float(TOTAL.max())
    variance = stationary_variance("sgld", epsilon, burn_in=1000)
    expected = 1 / (1 - epsilon * TOTAL / 4)
    torch.testing.assert_close(variance * TOTAL, expected, rtol=0.15, atol=0)
    assert float(variance[-1] * TOTAL[-1]) > 1.7


def test_sgld_step_is_the_published_formula():
    config = LangevinConfig("sgld", 3.0, 0.5, torch.tensor([1e-2, 2e-2]))
    state = langevin.init(config, torch.zeros(2, 5), [generator_for(1, 2, c, "n", torch.device("cpu")) for c in (0, 1)])
    w = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    state.displacement.copy_(w)
    gradients = torch.randn(2, 5, generator=torch.Generator().manual_seed(1))
    xi = normal_like(w, [generator_for(1, 2, c, "n", w.device) for c in (0, 1)])
    langevin.step(config, state, gradients)
    for row, epsilon in enumerate((1e-2, 2e-2)):
        expected = w[row] - epsilon / 2 * (3.0 * gradients[row] + 0.5 * w[row]) + math.sqrt(epsilon) * xi[row]
        torch.testing.assert_close(state.displacement[row], expected)


def test_averaged_step_uses_each_noise_twice():
    config = LangevinConfig("averaged", 3.0, 0.5, torch.tensor([1e-2]))
    state = langevin.init(config, torch.zeros(1, 5), [generator_for(1, 2, 0, "n", torch.device("cpu"))])
    generator = generator_for(1, 2, 0, "n", torch.device("cpu"))
    xi = [normal_like(torch.empty(1, 5), [generator])[0] for _ in range(3)]
    w = torch.zeros(5)
    for t in range(2):
        langevin.step(config, state, torch.zeros(1, 5))
        w = w - 1e-2 / 2 * 0.5 * w + 0.1 * (xi[t] + xi[t + 1]) / 2
        torch.testing.assert_close(state.displacement[0], w)


def test_noise_is_keyed_to_seed_step_chain_and_purpose():
    def first(*key):
        return torch.empty(3).normal_(generator=generator_for(*key, torch.device("cpu")))

    base = first(0, 100, 1, "noise")
    assert torch.equal(base, first(0, 100, 1, "noise"))
    for other in [(1, 100, 1, "noise"), (0, 101, 1, "noise"), (0, 100, 2, "noise"), (0, 100, 1, "batch")]:
        assert not torch.equal(base, first(*other))


def test_selected_chains_go_on_as_they_would_have():
    def run(rows):
        config = LangevinConfig("averaged", 1.0, 1.0, torch.full((len(rows),), 0.1))
        generators = [generator_for(0, 0, row, "n", torch.device("cpu")) for row in rows]
        return config, langevin.init(config, torch.zeros(len(rows), 4), generators)

    config, state = run([0, 1, 2])
    langevin.step(config, state, torch.zeros(3, 4))
    chosen = torch.tensor([2])
    part = state.select(chosen)
    langevin.step(LangevinConfig("averaged", 1.0, 1.0, config.step_size[chosen]), part, torch.zeros(1, 4))
    alone_config, alone = run([2])
    for _ in range(2):
        langevin.step(alone_config, alone, torch.zeros(1, 4))
    assert torch.equal(part.displacement, alone.displacement)
