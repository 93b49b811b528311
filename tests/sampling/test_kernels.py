"""The dynamics against exactly known stationary laws."""

import math

import pytest
import torch

from groktrace.sampling.kernels import KERNELS, base
from groktrace.sampling.kernels.base import ChainState, Dynamics
from groktrace.sampling.noise import generator_for, normal_like

NBETA, GAMMA = 50.0, 2.0
CURVATURES = torch.tensor([0.0, 0.1, 1.0, 4.0], dtype=torch.float64)
TOTAL = NBETA * CURVATURES + GAMMA


def stationary_variance(method, epsilon, rows=4, copies=100, burn_in=300, draws=300):
    """Of each curvature, over rows of so many directions of it."""
    config = Dynamics(KERNELS[method], NBETA, GAMMA, torch.full((rows,), epsilon, dtype=torch.float64))
    generators = [generator_for(0, 0, row, "test", torch.device("cpu")) for row in range(rows)]
    curvatures = CURVATURES.repeat(copies)
    state = ChainState.begin(config, torch.zeros(rows, len(curvatures), dtype=torch.float64), generators)
    total = torch.zeros(len(curvatures), dtype=torch.float64)
    for t in range(burn_in + draws):
        config.step(state, curvatures * state.displacement)
        if t >= burn_in:
            total += state.displacement.square().mean(0)
    return total.view(copies, -1).mean(0) / draws


@pytest.mark.parametrize("method", ["baoab", "leimkuhler_matthews"])
@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9])
def test_they_are_exact_in_every_harmonic_direction(method, fraction):
    variance = stationary_variance(method, 4 * fraction / float(TOTAL.max()), burn_in=2000)
    # 4 × 100 directions are at least 400 independent draws: relative standard deviation of a variance √(2/400) = 7 %.
    torch.testing.assert_close(variance * TOTAL, torch.ones(4, dtype=torch.float64), rtol=0.15, atol=0)


def test_sgld_is_too_wide_by_the_known_factor():
    epsilon = 2.0 / float(TOTAL.max())
    variance = stationary_variance("sgld", epsilon, burn_in=1000)
    expected = 1 / (1 - epsilon * TOTAL / 4)
    torch.testing.assert_close(variance * TOTAL, expected, rtol=0.15, atol=0)
    assert float(variance[-1] * TOTAL[-1]) > 1.7


def test_sgld_step_is_the_published_formula():
    config = Dynamics(KERNELS["sgld"], 3.0, 0.5, torch.tensor([1e-2, 2e-2]))
    state = ChainState.begin(
        config, torch.zeros(2, 5), [generator_for(1, 2, c, "n", torch.device("cpu")) for c in (0, 1)]
    )
    w = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    state.displacement.copy_(w)
    gradients = torch.randn(2, 5, generator=torch.Generator().manual_seed(1))
    xi = normal_like(w, [generator_for(1, 2, c, "n", w.device) for c in (0, 1)])
    config.step(state, gradients)
    for row, epsilon in enumerate((1e-2, 2e-2)):
        expected = w[row] - epsilon / 2 * (3.0 * gradients[row] + 0.5 * w[row]) + math.sqrt(epsilon) * xi[row]
        torch.testing.assert_close(state.displacement[row], expected)


def test_averaged_step_uses_each_noise_twice():
    config = Dynamics(KERNELS["leimkuhler_matthews"], 3.0, 0.5, torch.tensor([1e-2]))
    state = ChainState.begin(config, torch.zeros(1, 5), [generator_for(1, 2, 0, "n", torch.device("cpu"))])
    generator = generator_for(1, 2, 0, "n", torch.device("cpu"))
    xi = [normal_like(torch.empty(1, 5), [generator])[0] for _ in range(3)]
    w = torch.zeros(5)
    for t in range(2):
        config.step(state, torch.zeros(1, 5))
        w = w - 1e-2 / 2 * 0.5 * w + 0.1 * (xi[t] + xi[t + 1]) / 2
        torch.testing.assert_close(state.displacement[0], w)


@pytest.mark.parametrize("halvings", [0, 1])
def test_kinetic_step_is_kick_drift_friction_drift(halvings):
    epsilon, nbeta, gamma = 1e-2, 3.0, 0.5
    config = Dynamics(KERNELS["baoab"], nbeta, gamma, torch.tensor([60.0, epsilon]), torch.tensor([0, halvings]))
    config = config.select(torch.tensor([1, 0]))
    generators = [generator_for(1, 2, row, "n", torch.device("cpu")) for row in (0, 1)]
    state = ChainState.begin(config, torch.ones(2, 5), generators)
    generator = generator_for(1, 2, 0, "n", torch.device("cpu"))
    p, *xi = (normal_like(torch.empty(1, 5), [generator])[0] for _ in range(3))
    w, dt = torch.ones(5), math.sqrt(epsilon)
    # 2√(εγ) = 0.14 would be less friction than the least; in the other row it is 11.
    c = math.exp(-0.4 / 2**halvings)
    for t in range(2):
        gradients = torch.arange(5.0)
        config.step(state, gradients.expand(2, 5))
        p = p - dt * (nbeta * gradients + gamma * w)
        w = w + dt / 2 * p
        p = c * p + math.sqrt(1 - c**2) * xi[t]
        w = w + dt / 2 * p
        torch.testing.assert_close(state.displacement[0], w)
        torch.testing.assert_close(state.momentum[0], p)
    assert KERNELS["baoab"].persistence(60.0, gamma) == pytest.approx(math.exp(-2 * math.sqrt(30)))


def test_a_relaxation_takes_as_many_steps_as_the_root_of_the_resolution():
    """Where flat directions are very flat; nearer, friction is what heats no network."""
    kernel, resolutions = KERNELS["baoab"], (1e4, 1e6, 1e8)
    steps = [kernel.relaxation(1 / resolution, 1.0) for resolution in resolutions]
    assert steps == pytest.approx([12 * math.sqrt(resolution) for resolution in resolutions])
    assert kernel.relaxation(1e-3, 1.0) == pytest.approx(0.38 * 1e3, rel=0.01)
    assert kernel.relaxation(2e-3, 1.0) == pytest.approx(0.4 * 500)
    # As friction falls with the step from there, so it does where the step was halved.
    assert kernel.persistence(1e-6 / 4, 1.0, halvings=2) == pytest.approx(math.exp(-12e-3 / 4))


@pytest.mark.parametrize(
    ("method", "epsilon", "halvings"),
    [("baoab", 0.1, 0), ("baoab", 1e-3, 0), ("baoab", 1e-3, 2), ("baoab", 1e-3, 5), ("leimkuhler_matthews", 1e-3, 0)],
)
def test_a_flat_direction_forgets_its_start_in_a_relaxation_time(method, epsilon, halvings):
    gamma = 1.0
    steps = math.ceil(KERNELS[method].relaxation(epsilon, gamma, halvings))
    sizes = torch.full((4,), epsilon, dtype=torch.float64)
    config = Dynamics(KERNELS[method], 1.0, gamma, sizes, torch.full((4,), halvings))
    generators = [generator_for(0, 0, row, "t", torch.device("cpu")) for row in range(4)]
    start = torch.full((4, 1000), 10.0, dtype=torch.float64)
    state = ChainState.begin(config, start.clone(), generators)
    for _ in range(steps):
        config.step(state, torch.zeros_like(start))
    left = float(state.displacement.mean()) / 10
    assert left**2 <= math.exp(-2) * 1.05 + 0.002
    assert left**2 >= math.exp(-2) * 0.4  # nor is it called slower than it is


@pytest.mark.parametrize(
    ("method", "epsilon", "halvings"),
    [("baoab", 0.02, 0), ("baoab", 4e-3, 0), ("baoab", 4e-3, 1), ("leimkuhler_matthews", 0.02, 0)],
)
def test_noise_in_the_force_heats_by_its_gain(method, epsilon, halvings):
    rows, width, gamma, variance = 4, 1000, 2.0, 30.0
    sizes = torch.full((rows,), epsilon, dtype=torch.float64)
    config = Dynamics(KERNELS[method], 1.0, gamma, sizes, torch.full((rows,), halvings))
    generators = [generator_for(0, 0, row, "h", torch.device("cpu")) for row in range(rows)]
    generator = torch.Generator().manual_seed(0)
    state = ChainState.begin(config, torch.zeros(rows, width, dtype=torch.float64), generators)
    total, count = 0.0, 0
    for t in range(1500):
        force = math.sqrt(variance) * torch.randn(rows, width, dtype=torch.float64, generator=generator)
        config.step(state, force)
        if t >= 500:
            total, count = total + float(state.displacement.square().mean()), count + 1
    heated = total / count * gamma - 1
    assert heated == pytest.approx(variance * KERNELS[method].noise_gain(epsilon, gamma, halvings), rel=0.1)


def test_noise_is_keyed_to_seed_step_chain_and_purpose():
    def first(*key):
        return torch.empty(3).normal_(generator=generator_for(*key, torch.device("cpu")))

    base = first(0, 100, 1, "noise")
    assert torch.equal(base, first(0, 100, 1, "noise"))
    for other in [(1, 100, 1, "noise"), (0, 101, 1, "noise"), (0, 100, 2, "noise"), (0, 100, 1, "batch")]:
        assert not torch.equal(base, first(*other))


@pytest.mark.parametrize("method", ["baoab", "leimkuhler_matthews", "sgld"])
def test_selected_chains_go_on_as_they_would_have(method):
    def run(rows):
        config = Dynamics(KERNELS[method], 1.0, 1.0, torch.full((len(rows),), 0.1))
        generators = [generator_for(0, 0, row, "n", torch.device("cpu")) for row in rows]
        return config, ChainState.begin(config, torch.zeros(len(rows), 4), generators)

    config, state = run([0, 1, 2])
    config.step(state, torch.zeros(3, 4))
    chosen = torch.tensor([2])
    part = state.select(chosen)
    Dynamics(KERNELS[method], 1.0, 1.0, config.step_size[chosen]).step(part, torch.zeros(1, 4))
    alone_config, alone = run([2])
    for _ in range(2):
        alone_config.step(alone, torch.zeros(1, 4))
    assert torch.equal(part.displacement, alone.displacement)


@pytest.mark.parametrize("method", ["baoab", "leimkuhler_matthews", "sgld"])
def test_columns_in_blocks_move_as_they_do_at_once(method, monkeypatch):
    def after(width):
        monkeypatch.setattr(base, "BLOCK", width)
        config = Dynamics(KERNELS[method], 2.0, 1.0, torch.tensor([0.1, 0.05, 0.1]))
        generators = [generator_for(0, 0, row, "n", torch.device("cpu")) for row in range(3)]
        state = ChainState.begin(config, torch.linspace(-1, 1, 111).view(3, 37), generators)
        state = state.select(torch.tensor([0, 2]))
        config = config.select(torch.tensor([0, 2]))
        seen = []
        for _ in range(3):
            gradients = state.displacement.sin()
            for columns, block in state.blocks():
                config.step(block, gradients[:, columns])
                seen.append(columns)
        return state.displacement, seen

    whole, seen = after(1000)
    assert seen == 3 * [slice(0, 37)]
    blocked, seen = after(8)
    assert seen == 3 * [slice(0, 8), slice(8, 16), slice(16, 24), slice(24, 32), slice(32, 37)]
    torch.testing.assert_close(blocked, whole, rtol=1e-6, atol=1e-6)
