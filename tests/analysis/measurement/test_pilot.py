"""Large sets are sampled: λ is that of all samples, the chains stay in the basin, and batches fit their noise."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import groktrace
from groktrace.analysis.measurement import pilot
from groktrace.analysis.measurement.measure import Objective
from groktrace.analysis.measurement.pilot import choose_sampling, choose_scale
from groktrace.analysis.running.setup import weight_layout
from groktrace.analysis.tuning import Pilot
from groktrace.errors import SettingsError
from groktrace.run.task import Task
from groktrace.sampling import network
from groktrace.sampling.calibration import Scale
from groktrace.sampling.settings import SamplingSettings

CPU = torch.device("cpu")
TALL = 2048


@pytest.fixture
def large_set(monkeypatch):
    """Every set counts as large."""
    monkeypatch.setattr(network, "MEMORY", replace(network.MEMORY, whole_bytes=0))


def prepared(model, loss, data, **settings):
    task = Task.from_model(model, loss=loss, train=data)
    weights = {name: tensor.detach() for name, tensor in model.named_parameters()}
    layout = weight_layout({name: (tuple(t.shape), t.dtype, True) for name, t in weights.items()})
    chosen = replace(SamplingSettings(chains=2, method="baoab"), **settings)
    objective = Objective.of(task, layout, chosen, weights, CPU)
    (metrics,) = objective.metrics([weights], [0])
    return objective, weights, metrics


def choose(objective, weights, metrics, chance=1e9, **settings):
    objective = replace(objective, chance=(chance,), settings=replace(objective.settings, **settings))
    return choose_sampling(objective, lambda step: weights, [metrics])


def line(noise=0.1, inputs=20):
    """Linear regression at its minimum, and the eigenvalues of its Hessian."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TALL, inputs, generator=generator) * torch.linspace(0.1, 1.5, inputs)
    y = x @ torch.randn(inputs, 1, generator=generator) + noise * torch.randn(TALL, 1, generator=generator)
    model = nn.Linear(inputs, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.linalg.lstsq(x, y).solution.T)
    return model, (x, y), torch.linalg.eigvalsh(2 * x.double().T @ x.double() / TALL)


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_lambda_of_a_sampled_set_is_the_soft_rank_of_all_of_it(large_set, noise):
    model, data, spectrum = line(noise)
    found = groktrace.estimate_llc(model, "mse", data, nbeta=3000.0, localization=300.0, draws=600, seed=1)
    exact = float(0.5 * (3000 * spectrum / (3000 * spectrum + 300)).sum())
    # The minimum of all samples is that of some of them only where the fit is perfect.
    assert (found.llc == pytest.approx(exact, abs=4 * found.stderr + 0.03 * exact)) == (noise == 0)
    assert found.llc_centred == pytest.approx(exact, abs=4 * found.stderr_centred + 0.03 * exact)
    assert found.stderr < 0.05 * exact


def test_the_same_with_batches(large_set):
    model, data, spectrum = line(noise=0.0)
    found = groktrace.estimate_llc(model, "mse", data, nbeta=3000.0, localization=300.0, draws=600, batch_size=128)
    exact = float(0.5 * (3000 * spectrum / (3000 * spectrum + 300)).sum())
    assert found.diagnostics["heating"] > 0
    assert found.llc == pytest.approx(exact, abs=4 * found.stderr + 0.05 * exact)


@pytest.mark.parametrize("seed", [0, 1])
def test_what_the_noise_of_batches_adds_is_taken_off(large_set, seed):
    model, data, spectrum = line(noise=0.3)
    step_size = 0.9 / (1.5 * 3000 * float(spectrum[-1]) + 300) * 2
    objective, weights, metrics = prepared(model, "mse", data, draws=8000, step_size=step_size, seed=seed)
    scale = Scale(3000.0, 300.0, samples=TALL, batch_size=256)
    ((found, traces),) = objective.sample([weights], [metrics], scale)
    exact = float(0.5 * (3000 * spectrum / (3000 * spectrum + 300)).sum())
    heating, scatter = found.diagnostics["heating"], traces.error(traces.delta_loss)
    assert 0.03 < heating < 0.06
    assert found.reliable, found.reasons
    for value, raw in (found.llc, float(traces.delta_loss.mean())), (found.llc_centred, traces.centred):
        assert value == pytest.approx(exact, abs=3 * scatter)
        assert raw > exact + 4 * scatter
        assert raw - value == pytest.approx(heating * raw, rel=0.1)
    assert found.stderr == pytest.approx(math.hypot(scatter, 0.35 * traces.excess), rel=1e-3)


def test_the_slope_at_the_snapshot_is_what_the_mean_and_lambda_hat_owe_to_it():
    """Off the minimum of a bowl by m: ½m·(nβH + γ)m, and λ̂ = ½E[virial] less that."""
    model, (x, y), _ = line(noise=0.3)
    with torch.no_grad():
        model.weight.add_(0.03)
    objective, weights, metrics = prepared(model, "mse", (x, y), draws=4000, burn_in=100)
    ((found, traces),) = objective.sample([weights], [metrics], Scale(3000.0, 300.0))
    hessian = 2 * x.double().T @ x.double() / TALL
    stiff = 3000 * hessian + 300 * torch.eye(20, dtype=torch.float64)
    pull = 3000 * hessian @ torch.full((20,), 0.03, dtype=torch.float64)  # nβ∇L(w*)
    exact = float(0.5 * pull @ torch.linalg.solve(stiff, pull))
    assert traces.slope == pytest.approx(exact, rel=0.05)
    assert found.llc == pytest.approx(0.5 * float(traces.virial.mean()) - exact, abs=4 * found.stderr)


def test_nothing_is_taken_off_where_no_product_tells_where_the_noise_goes(large_set, monkeypatch):
    monkeypatch.setattr("groktrace.sampling.stack.stiff_share", lambda *_: torch.full((1,), torch.nan))
    model, data, _ = line(noise=0.3)
    objective, weights, metrics = prepared(model, "mse", data, draws=200, step_size=5e-5)
    ((found, traces),) = objective.sample([weights], [metrics], Scale(3000.0, 300.0, samples=TALL, batch_size=256))
    assert traces.heating > 0
    assert traces.excess == 0
    assert found.llc == pytest.approx(float(traces.delta_loss.mean()))


@pytest.mark.parametrize(
    ("samples", "n", "targets"), [(512, TALL, 1), (512, 10**6, 1), (TALL, TALL, 1), (512, TALL, 4)]
)
def test_what_unused_samples_would_add_is_told(large_set, samples, n, targets):
    """Of a linear regression λ_c/(S·m)·(1 − S/n), to first order in the number of weights over that of samples."""
    model, data, _ = line(noise=1.0)
    objective, weights, metrics = prepared(model, "mse", data)
    objective = replace(objective, task=replace(objective.task, n=n), targets=targets)
    ((found, _),) = objective.sample([weights], [metrics], Scale(3000.0, 300.0, samples=samples))
    expected = found.llc_centred / (samples * targets) * (1 - samples / n)
    assert found.diagnostics["unseen"] == pytest.approx(expected)


@pytest.mark.parametrize("samples", [512, 1024])
def test_that_is_about_what_they_add_to_the_soft_rank_of_a_regression(samples):
    """Exact, of 400 inputs whose variances fall as i⁻²: of i^−α it is 2/α of that, by the theory of random matrices."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8 * TALL, 400, generator=generator).double() * 60 / torch.arange(1, 401)

    def soft_rank(some):
        spectrum = torch.linalg.eigvalsh(2 * some.T @ some / len(some))
        return float(0.5 * (spectrum / (spectrum + 1)).sum())

    few, whole = soft_rank(x[:samples]), soft_rank(x)
    assert whole / few - 1 == pytest.approx(few / samples * (1 - samples / len(x)), rel=0.2)
    assert whole > 1.03 * few


def test_losses_of_a_sampled_set_come_with_their_errors(large_set):
    model, data, _ = line(noise=1.0)
    objective, _, metrics = prepared(model, "mse", data)
    exact = float(nn.functional.mse_loss(model(data[0]), data[1]).detach())
    assert objective.large_set
    assert metrics.train_loss == pytest.approx(exact, abs=5 * metrics.train_loss_stderr)
    assert 0 < metrics.train_loss_stderr < 0.2 * exact


def test_small_sets_are_used_whole():
    model, data, _ = line()
    objective, weights, metrics = prepared(model, "mse", data)
    assert not objective.large_set
    assert metrics.train_loss_stderr is None
    scale = choose(objective, weights, metrics, 10.0)
    assert (scale.samples, scale.batch_size, scale.locality) == (None, None, 0.22)


@pytest.mark.parametrize("count", [20, 70])
def test_few_large_samples_are_all_used(large_set, count):
    model, (x, y), _ = line()
    scale = choose(*prepared(model, "mse", (x[:count], y[:count])))
    assert (scale.samples, scale.batch_size) == (count, None)


def test_noise_calls_for_larger_batches(large_set):
    """Where a few samples carry all of the curvature, small batches would heat the chains."""
    model, (x, y), _ = line(inputs=2)
    even = choose(*prepared(model, "mse", (x, y), localization=300.0, samples=TALL))
    heavy = x.clone()
    heavy[::64] *= 30
    with torch.no_grad():
        model.weight.copy_(torch.linalg.lstsq(heavy, y).solution.T)
    uneven = choose(*prepared(model, "mse", (heavy, y), localization=300.0, samples=TALL))
    assert even.batch_size is not None
    assert uneven.batch_size is None or uneven.batch_size > even.batch_size


class Well(nn.Module):
    """A loss that is flat beyond a short distance from the minimum: 1 − exp(−‖w − a‖²/2s²) in the mean over weights."""

    def __init__(self, width, reach):
        super().__init__()
        self.w = nn.Parameter(torch.ones(width))
        self.reach = reach

    def forward(self, x):
        return (1 - torch.exp(-0.5 * ((self.w - 1) / self.reach).square())).mean() + 0 * x


@pytest.mark.parametrize(("reach", "wide"), [(10.0, True), (0.05, False)])
def test_a_basin_that_the_chains_would_leave_gets_a_smaller_locality(reach, wide):
    model = Well(400, reach)
    objective, weights, metrics = prepared(
        model, lambda out, y: (out - y).abs().mean(), (torch.zeros(8, 1), torch.zeros(8, 1))
    )
    scale = choose(objective, weights, metrics, 1.0)
    assert (scale.locality == 0.22) == wide
    # What is chosen is what the scale is of.
    expected = choose_scale(objective, [metrics], locality=scale.locality)
    assert (scale.nbeta, scale.localization) == (expected.nbeta, expected.localization)
    given = choose(objective, weights, metrics, 1.0, locality=0.22)
    assert given.locality == 0.22


def test_a_model_that_has_learned_is_not_what_knows_nothing():
    """Its loss on the samples that tell the loss of chance lies above that on all, or below, as it happens."""
    model, (x, y), _ = line()
    y = y.clone()
    y[:: TALL // 256] += 0.03
    for data in ((x, y), (x[:200], y[:200])):
        found = groktrace.estimate_llc(model, "mse", data, nbeta=3000.0, draws=20, progress=False)
        wide = groktrace.estimate_llc(model, "mse", data, nbeta=3000.0, draws=20, progress=False, locality=0.22)
        assert found.localization == wide.localization


@pytest.mark.parametrize("draws", [None, 5, 100_000])
def test_trials_of_small_sets_take_few_draws_however_many_are_asked_for(monkeypatch, draws):
    sample, taken = Objective.sample, []

    def counted(own, weights, metrics, scale, *rest):
        taken.append(own.settings.draws)
        return sample(own, weights, metrics, scale, *rest)

    monkeypatch.setattr(Objective, "sample", counted)
    model, data, _ = line()
    choose(*prepared(model, "mse", data, draws=draws))
    assert taken == [5 if draws == 5 else Pilot().few_draws]


def test_a_trial_whose_chains_small_batches_throw_out_is_made_on_all_samples(large_set, monkeypatch):
    sample = Objective.sample

    def thrown_out(own, weights, metrics, scale, *rest):
        found = sample(own, weights, metrics, scale, *rest)
        return found if scale.batch_size is None else [(replace(one, llc=None), traces) for one, traces in found]

    monkeypatch.setattr(Objective, "sample", thrown_out)
    model, data, _ = line()
    assert choose(*prepared(model, "mse", data)).locality == 0.22


@pytest.mark.parametrize("met", [True, False])
def test_a_trial_on_all_samples_that_too_large_a_step_throws_out_is_made_with_a_smaller_one(
    large_set, monkeypatch, met
):
    sample, steps = Objective.sample, []

    def thrown_out(own, weights, metrics, scale, *rest):
        ((one, traces),) = sample(own, weights, metrics, scale, *rest)
        steps.append((own.settings.step_size, own.settings.burn_in, own.settings.draws))
        top = 3 * metrics[0].top_curvature if met else None
        return [(replace(one, llc=None), replace(traces, curvature=top)) if len(steps) == 1 else (one, traces)]

    monkeypatch.setattr(Objective, "sample", thrown_out)
    model, data, _ = line()
    found = choose(*prepared(model, "mse", data, batch_size=len(data[0])))
    assert found.locality == (0.22 if met else 0.1)
    (first, *_), (second, burn_in, draws) = steps[:2]
    if met:
        slow = first / second
        assert slow == pytest.approx(3, rel=0.2)
        assert (burn_in, draws) == (round(20 * slow), round(12 * slow))


@pytest.mark.parametrize(("unknown", "samples"), [(1024, 512), (2048, 2048)])
def test_chains_that_batches_keep_up_do_not_say_how_many_samples_are_used(large_set, monkeypatch, unknown, samples):
    sample = Objective.sample
    monkeypatch.setattr(pilot, "PILOT", Pilot(unknown_samples=unknown))

    def heated(own, weights, metrics, scale, *rest):
        found = sample(own, weights, metrics, scale, *rest)
        if scale.batch_size is None:
            return found
        return [(replace(one, llc=1e20, llc_centred=1e20), traces) for one, traces in found]

    monkeypatch.setattr(Objective, "sample", heated)
    model, data, _ = line()
    found = choose(*prepared(model, "mse", data))
    assert found.locality == 0.01
    assert found.samples == pytest.approx(samples, rel=0.25)  # of 2048


def test_no_trial_is_made_twice(large_set, monkeypatch):
    """Chains that batches throw out, and that leave on all samples, at every locality: the last is asked for again."""
    sample, made = Objective.sample, []

    def leaving(own, weights, metrics, scale, *rest):
        made.append((metrics[0].step, scale, own.settings))
        llc = None if scale.batch_size else 1e20
        return [(replace(one, llc=llc), traces) for one, traces in sample(own, weights, metrics, scale, *rest)]

    monkeypatch.setattr(Objective, "sample", leaving)
    model, data, _ = line()
    assert choose(*prepared(model, "mse", data)).locality == 0.01
    assert len(made) == len(set(made)) == 2 * len(Pilot().localities)


@pytest.mark.parametrize("count", [1, 2])
def test_idle_threads_try_smaller_localities_beforehand_and_change_no_choice(large_set, monkeypatch, count):
    sample, tried = Objective.sample, []

    def leaving(own, weights, metrics, scale, *rest):
        tried.append(scale.locality)
        found = sample(own, weights, metrics, scale, *rest)
        leaves = scale.locality > (0.05 if metrics[0].step == 0 else 0.1)
        return [(replace(one, llc=1e20), traces) for one, traces in found] if leaves else found

    monkeypatch.setattr(Objective, "sample", leaving)
    model, data, _ = line()
    objective, weights, metrics = prepared(model, "mse", data)
    objective, snapshots = replace(objective, chance=(1e9,)), [replace(metrics, step=step) for step in range(count)]
    alone = choose_sampling(objective, lambda step: weights, snapshots)
    one_by_one = set(tried)
    assert min(one_by_one) == alone.locality == 0.05
    for threads in (2, 3, 10):
        assert choose_sampling(objective, lambda step: weights, snapshots, threads=threads) == alone
    assert min(tried) == 0.01


def test_samples_grow_with_what_they_would_miss(large_set, monkeypatch):
    """λ of few samples is too small by about λ over how many targets they have."""
    model, data, _ = line()
    objective, weights, metrics = prepared(model, "mse", data, localization=300.0)
    monkeypatch.setattr(pilot, "PILOT", Pilot(min_samples=64, max_bias=0.04))
    profiled, profile = [], pilot.profile_noise
    monkeypatch.setattr(
        pilot,
        "profile_noise",
        lambda loss, *rest: profiled.append(len(loss.tensors[0])) or profile(loss, *rest),
    )
    few = choose(objective, weights, metrics)
    monkeypatch.setattr(pilot, "PILOT", Pilot(min_samples=64, max_bias=0.005))
    more = choose(objective, weights, metrics)
    assert few.samples < more.samples <= TALL
    # Their noise is that of as many, but for what does not fill a batch.
    assert len(profiled) == 2
    for scale, samples in zip((few, more), profiled, strict=True):
        assert 0 <= samples - scale.samples < (scale.batch_size or 1)
    given = choose(objective, weights, metrics, batch_size=48)
    assert (given.samples % 48, given.batch_size) == (0, 48)
    assert math.isclose(few.nbeta, more.nbeta)


@pytest.mark.parametrize(("most", "expected"), [(1100, 2048), (600, 1024)])
def test_samples_are_many_where_no_chain_tells_how_many_are_needed(large_set, monkeypatch, most, expected):
    sample = Objective.sample

    def thrown_out(*arguments):
        return [(replace(one, llc=None, llc_centred=None), traces) for one, traces in sample(*arguments)]

    monkeypatch.setattr(Objective, "sample", thrown_out)
    monkeypatch.setattr(pilot, "PILOT", Pilot(unknown_samples=most))
    model, data, _ = line()
    found = choose(*prepared(model, "mse", data))
    assert 0 <= expected - found.samples < (found.batch_size or 1)


@pytest.mark.parametrize(("least", "expected"), [(1700, TALL), (1500, 1500)])
def test_all_samples_are_used_where_few_would_be_left(large_set, monkeypatch, least, expected):
    monkeypatch.setattr(pilot, "PILOT", Pilot(min_samples=least, max_bias=1.0))
    model, data, _ = line()
    found = choose(*prepared(model, "mse", data, localization=300.0))
    assert 0 <= expected - found.samples < (found.batch_size or 1)


def test_snapshots_around_which_the_loss_is_flat_have_no_part_in_the_scale(large_set):
    objective, weights, metrics = prepared(*line()[:1], "mse", line()[1])
    flat = [replace(metrics, step=step, top_curvature=0.0) for step in (1, 2, 3)]
    known = [metrics, *flat, replace(metrics, step=4, top_curvature=metrics.top_curvature / 20)]
    scale = choose_scale(objective, known)
    assert scale.curvature == pytest.approx(metrics.top_curvature * 0.525)  # which nβ follows
    found = choose_sampling(objective, lambda step: weights, known)
    assert found.curvature == scale.curvature
    with pytest.raises(SettingsError, match="nbeta: cannot be derived from a curvature that is zero within rounding"):
        choose_scale(objective, flat)


def test_nothing_is_tried_where_all_is_given(large_set, monkeypatch):
    model, data, _ = line()
    prepared_run = prepared(model, "mse", data, localization=300.0)
    monkeypatch.setattr(Objective, "sample", lambda *_: pytest.fail("chains were run"))
    scale = choose(*prepared_run, samples=200, batch_size=64)
    assert (scale.samples, scale.batch_size) == (192, 64)


def test_samples_of_a_set_that_is_used_whole_are_refused():
    model, data, _ = line()
    with pytest.raises(groktrace.GroktraceError, match="samples: expected none of a set that is used whole, got 64 of"):
        groktrace.estimate_llc(model, "mse", data, samples=64)


def test_the_published_method_draws_its_batches_from_all_samples(large_set):
    model, data, _ = line()
    published = {"method": "sgld", "nbeta": 30.0, "localization": 5.0, "step_size": 1e-4, "burn_in": 5, "draws": 10}
    scale = choose(*prepared(model, "mse", data, batch_size=32, **published))
    assert (scale.samples, scale.batch_size) == (None, 32)


def test_batches_that_throw_chains_out_give_way_to_all_samples(large_set):
    """Where a few samples have most of the curvature and the batches do not tell, nothing wrong comes out."""
    model, (x, y), _ = line(noise=0.0)
    x = x.clone()
    x[::256] *= 60
    y = x @ model.weight.detach().T + 0.01
    objective, weights, metrics = prepared(model, "mse", (x, y), nbeta=3000.0, localization=300.0, draws=300)
    spectrum = torch.linalg.eigvalsh(2 * x.double().T @ x.double() / TALL)
    exact = float(0.5 * (3000 * spectrum / (3000 * spectrum + 300)).sum())
    scale = Scale(3000.0, 300.0, samples=TALL, batch_size=32)
    (found,) = replace(objective, chance=()).estimate([weights], [metrics], scale)
    assert found.diagnostics["heating"] == 0
    assert found.diagnostics["lost_steps"] > 0
    assert found.llc_centred == pytest.approx(exact, abs=4 * found.stderr_centred + 0.05 * exact)


def test_noise_that_goes_into_flat_directions_is_no_heat(large_set):
    """All of the gradient's noise lies in flat directions: the batches' noise is counted there, and adds nothing."""
    generator = torch.Generator().manual_seed(0)
    signs = torch.randn(TALL, 40, generator=generator)
    signs -= signs.mean(0)

    class Bowl(nn.Module):
        def __init__(self):
            super().__init__()
            self.stiff, self.flat = nn.Parameter(torch.zeros(20)), nn.Parameter(torch.zeros(40))

        def forward(self, x):
            # The sum over samples of the second part has no curvature; each alone bends one way or the other.
            return 1 + self.stiff.square().sum() + 0.25 * ((2 * x) * self.flat.square()).sum(1, keepdim=True)

    objective, weights, metrics = prepared(
        Bowl(),
        lambda out, y: (out - y).mean(),
        (signs, torch.zeros(TALL, 1)),
        nbeta=500.0,
        localization=100.0,
        draws=400,
    )
    scale = Scale(500.0, 100.0, samples=TALL, batch_size=64)
    settings = replace(objective.settings, batch_size=64)
    (found,) = replace(objective, settings=settings, chance=()).estimate([weights], [metrics], scale)
    exact = 0.5 * 20 * 1000 / 1100
    assert 0 < found.diagnostics["heating"] < 0.02
    assert found.diagnostics["lost_steps"] == 0  # as heat, the noise would call for a smaller step
    assert choose(objective, weights, metrics, draws=None).batch_size <= 48  # of heat none would do
    assert found.llc_centred == pytest.approx(exact, abs=4 * found.stderr_centred + 0.02 * exact)


@pytest.mark.parametrize(("off", "burn_in"), [(0.0, 8), (10.0, 31)])
def test_burn_in_ends_where_chains_are_in_equilibrium(large_set, off, burn_in):
    """Off the minimum along a direction that is slow to fall along, it takes its time."""
    curvature = torch.cat([torch.full((20,), 2.0), torch.full((1,), 0.05), torch.zeros(2000)])

    class Bowl(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(2021))
            self.w.data[20] = off

        def forward(self, x):
            return 1 + 0.5 * (curvature * self.w.square()).sum() + 0 * x

    data = torch.zeros(64, 1), torch.zeros(64, 1)
    settings = {"nbeta": 300.0, "localization": 3.0, "draws": 200}
    found = groktrace.estimate_llc(Bowl(), lambda out, y: (out - y).mean(), data, **settings)
    stiff = (300 * curvature).double()
    exact = float(0.5 * (stiff / (stiff + 3)).sum())
    assert (found.burn_in == 8) == (burn_in == 8)
    assert found.llc_centred == pytest.approx(exact, abs=4 * found.stderr_centred + 0.02 * exact)


def test_snapshots_without_a_basin_are_told_after_a_few_steps(large_set):
    model, data, _ = line(noise=0.0)
    with torch.no_grad():
        model.weight += 100
    found = groktrace.estimate_llc(model, "mse", data, nbeta=300.0, localization=3.0, draws=300)
    assert found.llc is None
    assert found.llc_centred is None
    assert found.reasons[0].startswith("not in a basin: nβ times the loss falls by ")


@pytest.mark.parametrize("small", [False, True])
def test_trials_beside_each_other_share_no_recorded_gradients(monkeypatch, small):
    """A recording has buffers: two threads that used one mixed the weights of two snapshots."""
    if not small:
        monkeypatch.setattr(network, "MEMORY", replace(network.MEMORY, whole_bytes=0))
    model, data, _ = line()
    objective, weights, metrics = prepared(model, "mse", data)
    objective = replace(objective, chance=(1e9,))
    both = [metrics, replace(metrics, step=1)]
    used, sample, profile = [], Objective.sample, pilot.profile_noise
    monkeypatch.setattr(Objective, "sample", lambda own, *rest: used.append(own.loss.plans) or sample(own, *rest))
    monkeypatch.setattr(pilot, "profile_noise", lambda loss, *rest: used.append(loss.plans) or profile(loss, *rest))
    alone = choose_sampling(objective, lambda step: weights, both, threads=1)
    assert choose_sampling(objective, lambda step: weights, both, threads=2) == alone
    assert len(used) >= 4
    assert len({id(plans) for plans in used} | {id(objective.loss.plans)}) == len(used) + 1
