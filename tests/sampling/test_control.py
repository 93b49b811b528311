"""What the noise of minibatches does to chains, beside what is said of it."""

import math
from dataclasses import replace

import pytest
import torch

from groktrace.sampling import chains
from groktrace.sampling.calibration import resolve, step_size
from groktrace.sampling.chains import profile_noise, sample
from groktrace.sampling.control import share_of_stiff
from groktrace.sampling.kernels import KERNELS
from groktrace.sampling.kernels.base import Dynamics
from groktrace.sampling.posterior import StackedLoss
from groktrace.sampling.settings import SamplingSettings
from groktrace.sampling.tuning import MINIBATCH_NOISE
from groktrace.sampling.weights import WeightLayout

NBETA, GAMMA = 100.0, 1.0


def linear_model(samples=4096, size=200):
    """½(x·w)² of Gaussian x with decaying variances: each sample has a curvature of its own; and the Hessian."""
    x = torch.randn(samples, size, generator=torch.Generator().manual_seed(0)) * torch.arange(1, size + 1) ** -0.25
    layout = WeightLayout(("w",), ((size,),))

    def forward(weights, tensors):
        return 0.5 * (tensors[0] @ weights["w"]).square().mean(), None

    loss = StackedLoss(forward, layout, (x,), {}, row_bytes=1000 * samples, sample_bytes=1000, is_sample_mean=True)
    return loss, (x.T @ x / samples).double()


def one_kind_a_sample(samples=4096, size=200):
    """The same of unit vectors: each sample has one of 200 directions."""
    kinds = torch.randint(size, (samples,), generator=torch.Generator().manual_seed(1))
    return replace(linear_model()[0], tensors=(torch.eye(size)[kinds],))


def test_the_heat_that_a_profile_foresees_is_what_chains_in_batches_get():
    (loss, hessian), batch = linear_model(), 512
    h = torch.linalg.eigvalsh(hessian)
    exact = float(0.5 * (NBETA * h / (NBETA * h + GAMMA)).sum())
    epsilon, anchor = step_size(NBETA, GAMMA, float(h.max())), torch.zeros(1, len(h))
    settings = resolve(SamplingSettings(chains=2, draws=2000, batch_size=batch, step_size=epsilon), len(h), True)
    profile = profile_noise(loss, anchor, 0, settings, NBETA, GAMMA, epsilon)
    foreseen = profile.heating * (1 / batch - 1 / len(loss.tensors[0]))
    (traces,) = sample(loss, anchor, [0], settings, NBETA, GAMMA, [epsilon], lambda traces: 1.0)
    excess = traces.centred / exact - 1
    assert traces.centred_error / exact < 0.1 * excess
    assert foreseen == pytest.approx(excess, rel=0.25)
    assert traces.heating == pytest.approx(excess, rel=0.4)  # from its own batches, and one sample of their noise


def test_the_curvature_of_single_samples_scatters_by_twice_its_mean_squared_where_they_are_gaussian():
    loss = linear_model()[0]
    settings, anchor = resolve(SamplingSettings(chains=2), loss.layout.size, True), torch.zeros(1, loss.layout.size)
    found = [profile_noise(loss, anchor, key, settings, NBETA, GAMMA, 0.01).curvature_variance for key in range(12)]
    assert sum(found) / len(found) == pytest.approx(2, rel=0.15)


def test_so_it_does_along_directions_that_owe_nothing_to_the_samples():
    loss = replace(one_kind_a_sample(), sample_bytes=2**14)  # 256 samples a chain, n of each of 200 kinds
    settings, anchor = resolve(SamplingSettings(chains=2), 200, True), torch.zeros(1, 200)
    # Along v = n·w of one chain, w Gaussian and n Poisson: ⟨v⁴⟩/⟨v²⟩² − 1 for the other's samples, by hand. (For its
    # own, where kinds with large n come more often, it would be 3⟨n⁵⟩⟨n⟩/⟨n³⟩² − 1 = 5.1.)
    m = 256 / 200
    expected = 3 * (m**4 + 6 * m**3 + 7 * m**2 + m) / (m**2 + m) ** 2 - 1
    found = [profile_noise(loss, anchor, key, settings, NBETA, GAMMA, 0.01).curvature_variance for key in range(24)]
    assert sum(found) / len(found) == pytest.approx(expected, rel=0.25)


def test_the_curvature_that_a_profile_goes_by_is_that_of_other_samples():
    """Where samples have directions of their own, each is steeper along its own noise than all are."""
    loss = one_kind_a_sample()
    size, epsilon = loss.layout.size, 0.01
    settings, anchor = resolve(SamplingSettings(chains=2), size, True), torch.zeros(1, size)
    h = torch.diagonal(loss.tensors[0].T @ loss.tensors[0]) / len(loss.tensors[0])
    # A sample's gradient is along its direction d, and of variance h_d·w_d² there; it adds to λ̂ what is stiff of it.
    total = NBETA * h + GAMMA
    gain = settings.kernel.noise_gain(epsilon, GAMMA) * NBETA
    expected = float(gain * (h * (1 - h) / total * NBETA * h / total).sum() / (h / total).sum())
    found = [profile_noise(loss, anchor, key, settings, NBETA, GAMMA, epsilon).heating for key in range(8)]
    assert sum(found) / len(found) == pytest.approx(expected, rel=0.1)
    assert max(found) < 1.2 * min(found)


def test_of_small_batches_it_is_that_of_others():
    """Along its own noise a batch of 16 is twelve times as steep here as all samples, and six with one other batch."""
    loss = one_kind_a_sample()
    size, batch, epsilon = loss.layout.size, 16, 0.5
    h = torch.diagonal(loss.tensors[0].T @ loss.tensors[0]) / len(loss.tensors[0])
    exact = float(0.5 * (NBETA * h / (NBETA * h + GAMMA)).sum())
    settings = resolve(SamplingSettings(chains=2, draws=2000, batch_size=batch, step_size=epsilon), size, True)
    (traces,) = sample(loss, torch.zeros(1, size), [0], settings, NBETA, GAMMA, [epsilon], lambda traces: 1.0)
    excess = traces.centred / exact - 1
    assert traces.centred_error / exact < 0.1 * excess
    assert 0.25 * excess < traces.heating < 1.4 * excess
    # Of few draws, too, as there may be no time for a second look.
    few = replace(settings, burn_in=0, draws=4)
    (traces,) = sample(loss, torch.zeros(1, size), [0], few, NBETA, GAMMA, [epsilon], lambda traces: 1.0)
    assert traces.heating > 0.1 * excess


def test_noise_counts_where_chains_settle_and_a_fifth_of_that_where_they_start(monkeypatch):
    """Chains of many weights start too far along stiff directions; here noise grows with the fifth power of that."""
    stiffness = torch.cat([torch.logspace(0, 3, 40), torch.zeros(3960)])
    sign = torch.randn(2048, 1, generator=torch.Generator().manual_seed(0))
    layout = WeightLayout(("w",), ((len(stiffness),),))
    nbeta = 1.0

    def forward(weights, tensors):
        energy = nbeta * stiffness * weights["w"].square()
        return (0.5 * energy.sum() + 0.001 * tensors[0].mean() * energy.square().sum()) / nbeta, None

    sizes = {"row_bytes": 2_048_000, "sample_bytes": 1000, "is_sample_mean": True}
    loss, anchor = StackedLoss(forward, layout, (sign - sign.mean(),), {}, **sizes), torch.zeros(1, len(stiffness))
    epsilon = step_size(nbeta, GAMMA, 1000.0)
    settings = resolve(SamplingSettings(chains=2, draws=16, batch_size=64), len(stiffness), True)

    def heating(far):
        monkeypatch.setattr(chains, "MINIBATCH_NOISE", replace(MINIBATCH_NOISE, start_discount=far))
        return profile_noise(loss, anchor, 0, settings, nbeta, GAMMA, epsilon).heating

    settled, at_start = heating(math.inf), 1e-6 * heating(1e-6)
    assert settled < 0.02 * at_start
    assert heating(MINIBATCH_NOISE.start_discount) == pytest.approx(0.2 * at_start)
    (traces,) = sample(loss, anchor, [0], settings, nbeta, GAMMA, [epsilon], lambda traces: 1.0)
    assert 0 < traces.heating < 0.02 * at_start / 64
    assert traces.lost == 0


@pytest.mark.parametrize("name", sorted(KERNELS))
@pytest.mark.parametrize("curvature", [0.02, 0.5, 1.0])
def test_the_share_is_the_stationary_variance_that_noisy_gradients_add_to_a_bowl(name, curvature):
    """Of one direction, without any other noise: Var[w] over many chains, in place of the Lyapunov equation."""
    nbeta, gamma, epsilon, rows = 50.0, 1.0, 0.04, 20_000
    dynamics = Dynamics(KERNELS[name], nbeta, gamma, torch.full((1,), epsilon))
    share = float(share_of_stiff(lambda direction: curvature * direction, torch.ones(1, 1), dynamics))
    every = Dynamics(KERNELS[name], nbeta, gamma, torch.full((rows,), epsilon))
    w, momentum, none = torch.zeros(rows, 1), torch.zeros(rows, 1), torch.zeros(rows, 1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        noisy = curvature * w + torch.randn(rows, 1, generator=generator)
        every.kernel.step(w, momentum, noisy, none, every.coefficients)
    added = 0.5 * nbeta * curvature * float(w.square().mean())
    assert added == pytest.approx(0.5 * float(dynamics.noise_gain) * nbeta**2 * share, rel=0.04)


def test_there_is_no_share_where_a_product_is_not_finite():
    dynamics = Dynamics(KERNELS["baoab"], 50.0, 1.0, torch.full((2,), 0.04))
    broken = torch.tensor([[1.0], [torch.nan]])
    share = share_of_stiff(lambda direction: broken * direction, torch.ones(2, 1), dynamics)
    assert float(share[0]) == pytest.approx(50 / 51 / (1 - 0.25 * 0.04 * 51))
    assert torch.isnan(share[1])
