"""λ̂ of whole models against closed forms and exact spectra."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from groktrace import theory
from groktrace.analysis import point
from groktrace.analysis.measurement.llc import OFF_MINIMUM
from groktrace.analysis.point import estimate_llc
from groktrace.errors import SettingsError, TaskError


def half_square(outputs, targets):
    return 0.5 * (outputs - targets).square().sum(1).mean()


def exact_spectrum(model, loss, train):
    names = [name for name, _ in model.named_parameters()]
    shapes = [p.shape for p in model.parameters()]

    def flat_loss(flat):
        parts = flat.split([shape.numel() for shape in shapes])
        weights = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        return loss(torch.func.functional_call(model, weights, (train[0],)), train[1])

    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    return torch.linalg.eigvalsh(torch.autograd.functional.hessian(flat_loss, flat)).double()


@pytest.mark.parametrize(
    ("d", "p", "k", "llc"),
    [(6, 3, 4, 16.0), (4, 2, 12, 10.0)],  # ½·min(K(d + p − 1), p·d(d + 1)/2): under- and over-parameterised
)
def test_generic_quadratic_teachers_have_half_their_rank(teacher, d, p, k, llc):
    model, train = teacher(d, p, k, n=100)
    found = estimate_llc(model, half_square, train, nbeta=1e4, localization=100.0, chains=16, rtol=0.05)
    assert found.reliable, found.reasons
    assert found.llc == pytest.approx(llc, rel=0.05)
    assert found.llc_centred == pytest.approx(llc, rel=0.05)


def test_default_settings_give_the_soft_rank_of_the_exact_spectrum(teacher):
    model, train = teacher(10, 5, 12)
    found = estimate_llc(model, half_square, train, chains=4)
    spectrum = exact_spectrum(model, half_square, train)
    cutoff = found.localization / found.nbeta
    soft_rank = float(0.5 * (spectrum / (spectrum + cutoff)).sum())
    assert found.reliable, found.reasons
    assert found.stderr <= 0.02 * found.llc
    assert found.llc == pytest.approx(soft_rank, abs=3.5 * found.stderr + 0.03 * soft_rank)
    # The rule: E‖w − w*‖ of flat directions is 0.3‖w*‖, and h_max over the cutoff is 10.
    norm_squared = sum(float(w.detach().square().sum()) for w in model.parameters())
    assert spectrum.numel() / found.localization == pytest.approx(0.22**2 * norm_squared, rel=1e-4)
    assert float(spectrum.max()) / cutoff == pytest.approx(10, rel=0.05)


def test_linear_regression_is_exact_at_any_temperature():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(100, 20, generator=generator) * torch.logspace(-1.5, 0, 20)
    model = nn.Linear(20, 1, bias=False)
    y = model(x).detach()
    spectrum = torch.linalg.eigvalsh(x.double().T @ x.double() / 100)
    for nbeta, gamma in [(100.0, 1.0), ("wbic", 0.5)]:
        found = estimate_llc(model, half_square, (x, y), nbeta=nbeta, localization=gamma, rtol=0.01, chains=4)
        scale = found.nbeta * spectrum
        assert found.nbeta == (100 if nbeta == 100.0 else pytest.approx(100 / math.log(100)))
        assert found.llc == pytest.approx(float(0.5 * (scale / (scale + gamma)).sum()), abs=3.5 * found.stderr)
        assert found.reliable, found.reasons


def test_off_a_minimum_the_number_is_kept_and_the_reason_given():
    x = torch.randn(100, 20, generator=torch.Generator().manual_seed(0))
    model = nn.Linear(20, 1, bias=False)
    found = estimate_llc(model, half_square, (x, model(x).detach() + x.sum(1, keepdim=True)), nbeta=100, localization=1)
    assert found.llc < 0
    assert found.reasons == ("not at a minimum: the loss falls on moving away from the snapshot",)
    assert found.llc_centred == pytest.approx(10, rel=0.1)


def test_planted_failures_are_named(teacher):
    x = torch.randn(100, 20, generator=torch.Generator().manual_seed(0))
    model = nn.Linear(20, 1, bias=False)
    train = (x, model(x).detach())
    few = {"nbeta": 100.0, "localization": 1e-3, "chains": 2}
    cold = estimate_llc(model, half_square, train, method="sgld", burn_in=0, draws=50, step_size=1e-4, **few)
    assert any("not equilibrated" in reason for reason in cold.reasons)
    wild = estimate_llc(model, half_square, train, burn_in=10, draws=2000, step_size=1.0, **few)
    assert (wild.llc, wild.reliable) == (None, False)
    assert "diverging" in wild.reasons[0]
    quadratic, data = teacher(6, 3, 4, n=100)
    wide = {"nbeta": 1.0, "localization": 0.1, "chains": 16, "step_size": 3e-4}
    far = estimate_llc(quadratic, half_square, data, burn_in=500, draws=1000, **wide)
    assert any("not local" in reason for reason in far.reasons)
    short = estimate_llc(model, half_square, train, nbeta=100.0, localization=1.0, burn_in=100, draws=4)
    assert any("too few draws" in reason for reason in short.reasons)


def test_a_singular_loss_is_no_failure():
    # Π w_i² has no curvature at 0: λ̂ = D/4 for Σ w_i⁴, and half of the pull's expectation is twice that.
    class Quartic(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(40))

        def forward(self, x):
            return x * self.w.square()

    model, x = Quartic(), torch.ones(4, 40)
    settings = {"nbeta": 1e6, "localization": 1e-2, "burn_in": 1000, "draws": 1000, "step_size": 2e-5}
    found = estimate_llc(model, half_square, (x, torch.zeros(4, 40)), **settings)
    assert found.llc == pytest.approx(10, rel=0.05)
    assert found.llc_centred == pytest.approx(20, rel=0.05)
    assert found.diagnostics["anharmonicity"] == pytest.approx(2, rel=0.02)


def test_the_step_suits_the_curvature_that_the_chains_meet():
    # At the origin of f(x) = A·B·x nothing curves; where the chains go, much does. λ = 1 (Aoyagi & Watanabe 2005).
    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.A, self.B = nn.Parameter(torch.zeros(2, 4)), nn.Parameter(torch.zeros(4, 1))

        def forward(self, x):
            return x @ (self.A @ self.B).T

    train = (torch.ones(4, 1), torch.zeros(4, 2))
    found = estimate_llc(Product(), half_square, train, nbeta=100.0, localization=1.0, rtol=0.02)
    assert found.reliable, found.reasons
    assert found.diagnostics["anharmonicity"] == pytest.approx(2, rel=0.01)
    exact = theory.reduced_rank_llc(2, 4, 1, 0).llc
    assert found.llc == pytest.approx(exact, rel=0.15)  # the correction at so small an nβ
    # Where |B| = b, A is Gaussian, and λ̂ is nβb²/(nβb² + γ); with A integrated out, b has this density.
    b = torch.linspace(0, 10, 100_001).double()
    density = b**3 * torch.exp(-0.5 * b**2) / (100 * b**2 + 1)
    there = float((density * 100 * b**2 / (100 * b**2 + 1)).sum() / density.sum())
    assert found.llc == pytest.approx(there, abs=3.5 * found.stderr)
    assert found.stderr < 0.03


def test_singular_fluctuation_and_wbic_of_a_regular_model():
    # In linear regression with noise of variance 1 both λ and ν are D/2 (Watanabe 2009, regular models).
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 10, generator=generator)
    model = nn.Linear(10, 1, bias=False)
    y = model(x).detach() + torch.randn(2000, 1, generator=generator)
    with torch.no_grad():
        model.weight.copy_(torch.linalg.lstsq(x, y).solution.T)
    found = estimate_llc(model, half_square, (x, y), nbeta="wbic", localization=1.0, rtol=0.01)
    assert found.llc == pytest.approx(5, rel=0.04)
    assert found.diagnostics["singular_fluctuation"] == pytest.approx(5, rel=0.1)
    assert found.diagnostics["wbic"] == pytest.approx(2000 * found.loss + found.llc * math.log(2000), rel=1e-6)


def test_a_loss_that_couples_its_samples_has_no_singular_fluctuation(teacher):
    def centred(outputs, targets):
        return half_square(outputs - outputs.mean(0), targets - targets.mean(0))

    model, train = teacher(6, 3, 4)
    assert estimate_llc(model, centred, train, draws=20).diagnostics["singular_fluctuation"] is None
    assert estimate_llc(model, half_square, train, draws=20).diagnostics["singular_fluctuation"] is not None


def test_another_seed_repeats_the_measurement_on_the_same_samples():
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(9000, 1, generator=generator), torch.randn(9000, 1, generator=generator)
    model = nn.Linear(1, 1)
    estimates = [
        estimate_llc(model, "mse", (x, noise), chains=2, burn_in=2, draws=4, batch_size=64, seed=seed)
        for seed in (0, 1)
    ]
    assert estimates[0].loss == estimates[1].loss
    assert estimates[0].llc != estimates[1].llc


def test_a_loss_that_is_no_mean_or_no_function_is_refused():
    x = torch.randn(20, 3)
    with pytest.raises(TaskError, match="expected a mean over the samples"):
        estimate_llc(nn.Linear(3, 3), nn.MSELoss(reduction="sum"), (x, x))
    with pytest.raises(TaskError, match="expected a function of the weights"):
        estimate_llc(nn.Linear(3, 3), lambda o, t: (o + torch.randn(o.shape) - t).square().mean(), (x, x))


def test_small_networks_get_more_chains():
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(1))
    for inputs, chains in ((3, 16), (3000, 5), (20_000, 2)):
        model = nn.Linear(inputs, 1, bias=False)
        data = torch.ones(3, inputs) if inputs > 3 else x
        assert estimate_llc(model, half_square, (data, model(data).detach()), draws=4).chains == chains


def test_nothing_of_the_model_is_changed():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 2)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    estimate_llc(model, "cross_entropy", (torch.arange(24.0).view(8, 3), torch.tensor([0, 1] * 4)), draws=4)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert all(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_frozen_parameters_stay_where_they_are():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    model[0].requires_grad_(False)
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(1))
    found = estimate_llc(model, half_square, (x, model(x).detach()), nbeta=100.0, localization=1.0, chains=4)
    # Only the second layer moves: linear regression on the first layer's outputs and a constant.
    features = torch.cat([model[0](x), torch.ones(50, 1)], dim=1).double()
    scale = 100.0 * torch.linalg.eigvalsh(features.T @ features / 50)
    assert found.llc == pytest.approx(float(0.5 * (scale / (scale + 1.0)).sum()), abs=3.5 * found.stderr)


def test_refined_llc_moves_only_the_named_parameters():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(1))
    train = (x, model(x).detach())
    common = {"nbeta": 100.0, "localization": 1.0, "seed": 5}
    refined = estimate_llc(model, half_square, train, parameters="1.*", **common)
    model[0].requires_grad_(False)
    frozen = estimate_llc(model, half_square, train, **common)
    assert refined.llc == pytest.approx(frozen.llc, rel=1e-4)
    with pytest.raises(
        SettingsError, match=r"parameters: '2\.\*' fits none of the trainable weights: 1\.weight, 1\.bias"
    ):
        estimate_llc(model, half_square, train, parameters=["2.*"], **common)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ({"nbeta": -1.0}, SettingsError, "nbeta: expected a positive number"),
        ({"steps": 5}, SettingsError, "settings: unknown steps; expected some of method, nbeta"),
        ({"device": "tpu9"}, SettingsError, "device: 'tpu9' cannot be used here"),
        ({"loss": "hinge"}, TaskError, "loss: expected a function or one of cross_entropy, mse, got 'hinge'"),
        ({"train": (torch.zeros(3, 2), torch.zeros(4, 1))}, TaskError, r"equally many samples, got \[3, 4\]"),
        ({"train": (torch.zeros(0, 2), torch.zeros(0, 1))}, TaskError, "at least one sample, got an empty set"),
        ({"loss": lambda o, t: o - t}, TaskError, r"expected one number, the mean over the batch, got a tensor"),
        ({"loss": lambda o, t: t.mean()}, TaskError, "differentiated .* function of the sampled weights: weight, bias"),
        ({"train": (torch.full((3, 2), math.nan), torch.zeros(3, 1))}, TaskError, "expected a finite loss .* got nan"),
    ],
)
def test_bad_input_is_named(call, error, message):
    arguments = {"loss": "mse", "train": (torch.ones(3, 2), torch.ones(3, 1)), **call}
    with pytest.raises(error, match=message):
        estimate_llc(nn.Linear(2, 1), arguments.pop("loss"), arguments.pop("train"), **arguments)


def test_a_model_without_trainable_weights_is_refused():
    model = nn.Linear(2, 1).requires_grad_(False)
    with pytest.raises(TaskError, match="at least one trainable parameter of real or complex numbers, found none"):
        estimate_llc(model, "mse", (torch.ones(3, 2), torch.ones(3, 1)))


def test_minibatch_noise_is_kept_small_or_named():
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(400, 30, generator=generator)
    model = nn.Linear(30, 1, bias=False)
    train = (x, model(x).detach())
    scale = 3000.0 * torch.linalg.eigvalsh(x.double().T @ x.double() / 400)
    exact = float(0.5 * (scale / (scale + 100.0)).sum())
    common = {"nbeta": 3000.0, "localization": 100.0, "rtol": 0.01}
    found = estimate_llc(model, half_square, train, batch_size=32, **common)
    assert found.reliable, found.reasons
    assert found.llc == pytest.approx(exact, abs=3.5 * found.stderr + 0.02 * exact)
    assert 0 < found.diagnostics["heating"] <= 0.02
    full = estimate_llc(model, half_square, train, **common)
    assert full.diagnostics["heating"] == 0
    few = common | {"rtol": 0.05}
    hot = estimate_llc(model, half_square, train, batch_size=32, step_size=full.step_size / 8, **few)
    assert hot.llc > 1.1 * exact
    assert any("heated by minibatch noise" in reason for reason in hot.reasons)


def of_tokens(outputs, targets):
    """The mean over the tokens of sequences, whose lengths differ."""
    return nn.functional.cross_entropy(outputs.flatten(0, 1), targets.flatten(), ignore_index=-100)


def contrastive(outputs, targets):
    """Of each sample among those beside it."""
    return nn.functional.cross_entropy(outputs.flatten(1) @ outputs.flatten(1).T, torch.arange(len(outputs)))


@pytest.mark.parametrize("loss", [of_tokens, contrastive, nn.CrossEntropyLoss(weight=torch.tensor([5.0, 1, 1]))])
def test_batches_of_a_loss_that_is_no_mean_over_samples_are_refused(loss):
    torch.manual_seed(0)
    x, y = torch.randn(64, 6, 4), torch.randint(3, (64, 6))
    y[torch.arange(6) >= torch.randint(1, 7, (64, 1))] = -100
    model, data = nn.Linear(4, 3), (x, y)
    if isinstance(loss, nn.Module):
        data = x[:, 0], y[:, 0]
    with pytest.raises(SettingsError, match="batch_size: expected none, got 8: the loss is no mean over samples"):
        estimate_llc(model, loss, data, batch_size=8)
    assert estimate_llc(model, loss, data, draws=4, burn_in=4).llc is not None


def test_nbeta_that_follows_the_curvature_measures_at_one_resolution():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 6, generator=generator)
    model = torch.nn.Linear(6, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.randn(1, 6, generator=generator))
        y = model(x)
    found = {}
    for size in (1.0, 1e-4):

        def loss(outputs, targets, size=size):
            return size * (outputs - targets).square().mean()

        found[size] = estimate_llc(model, loss, (x, y), nbeta="curvature", localization=1.0, draws=2000)
    large, small = found[1.0], found[1e-4]
    assert small.nbeta == pytest.approx(1e4 * large.nbeta, rel=1e-3)
    curvatures = torch.linalg.eigvalsh(2 * x.T.double() @ x.double() / 64)
    exact = float(0.5 * (curvatures / (curvatures + 1 / large.nbeta)).sum())
    assert large.llc == pytest.approx(exact, abs=4 * large.stderr)
    assert small.llc == pytest.approx(exact, abs=4 * small.stderr)


def test_where_nbeta_follows_draws_grow_off_a_minimum_too():
    # Of 30 weights on 200 samples, with w* so far off that λ̂ is no measure: at one nβ no more draws are spent there.
    x = torch.randn(200, 30, generator=torch.Generator().manual_seed(0))
    model = nn.Linear(30, 1, bias=False)
    train = (x, model(x).detach() + 0.5 * x.sum(1, keepdim=True))
    settings = {"localization": 1.0, "chains": 2, "rtol": 0.01}
    following = estimate_llc(model, half_square, train, nbeta="curvature", **settings)
    fixed = estimate_llc(model, half_square, train, nbeta=following.nbeta, **settings)
    assert OFF_MINIMUM in following.reasons
    assert OFF_MINIMUM in fixed.reasons
    assert following.draws > fixed.draws
    assert following.stderr_centred <= 0.01 * following.llc_centred < fixed.stderr_centred


class Autoencoder(nn.Module):
    """Two layers on one memory, in one of several ways."""

    def __init__(self, how, d=4):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(d, d, bias=False), nn.Linear(d, d, bias=False)
        if how == "transposed":
            self.decoder.weight = nn.Parameter(self.encoder.weight.t())
        elif how == "parts":
            self.both = nn.Parameter(torch.zeros(2 * d, d))
            self.encoder.weight, self.decoder.weight = nn.Parameter(self.both[d:]), nn.Parameter(self.both[d:].t())
        with torch.no_grad():
            self.encoder.weight.copy_(torch.linalg.qr(torch.randn(d, d))[0])
            if how == "apart":
                self.decoder.weight.copy_(self.encoder.weight.t())

    def forward(self, x):
        return self.decoder(self.encoder(x))


@pytest.mark.parametrize(("how", "llc"), [("transposed", 5.0), ("parts", 5.0), ("apart", 8.0)])
def test_numbers_in_one_memory_count_once(how, llc):
    torch.manual_seed(0)
    model, x = Autoencoder(how), torch.randn(300, 4)
    # WᵀW = 1 leaves W free to turn: of its d² directions d(d + 1)/2 count.
    found = estimate_llc(model, "mse", (x, x), nbeta=3e3, localization=10.0)
    assert found.llc == pytest.approx(llc, abs=max(0.15, 3.5 * found.stderr))


def test_overlaps_that_cannot_be_sampled_are_refused():
    model, flat = Autoencoder("apart"), torch.zeros(24)
    model.encoder.weight = nn.Parameter(flat[:16].view(4, 4))
    model.decoder.weight = nn.Parameter(flat[8:].view(4, 4))
    with pytest.raises(TaskError, match="share some of their memory, and neither is a part of the other"):
        estimate_llc(model, "mse", (torch.randn(30, 4),) * 2)


class Reader(nn.Module):
    """A recurrent network, whose gradients are taken one chain after the other."""

    def __init__(self):
        super().__init__()
        self.cell, self.output = nn.GRU(2, 3, batch_first=True), nn.Linear(3, 1)

    def forward(self, x):
        return self.output(self.cell(x)[0][:, -1])


def test_of_networks_that_cannot_be_stacked_there_are_but_two_chains():
    torch.manual_seed(0)
    data, few = (torch.randn(20, 4, 2), torch.randn(20, 1)), {"draws": 2, "burn_in": 2}
    assert estimate_llc(Reader(), "mse", data, **few).chains == 2
    assert estimate_llc(nn.Linear(1, 1), "mse", (data[0][:, 0, :1], data[1]), **few).chains == 16


class Filter(nn.Module):
    """A filter of signals with 8 samples: 5 complex numbers, of which 8 real ones count, and a constant."""

    def __init__(self, form):
        super().__init__()
        values = torch.randn(5, dtype=torch.complex128 if form == "double" else torch.complex64)
        self.form, self.offset = form, nn.Parameter(torch.zeros(1, dtype=values.real.dtype))
        pairs = torch.view_as_real(values).clone()
        self.weight = nn.Parameter({"pairs": pairs, "flat": pairs.flatten()}.get(form, values))

    def forward(self, x):
        weight = self.weight
        if self.form in ("pairs", "flat"):
            weight = torch.view_as_complex(weight.view(5, 2))
        return torch.fft.irfft(torch.fft.rfft(x) * weight, n=8) + self.offset


@pytest.mark.parametrize("form", ["complex", "double", "pairs", "flat"])
def test_complex_weights_count_as_two_each(form):
    torch.manual_seed(0)
    model = Filter(form)
    x = torch.randn(300, 8, dtype=torch.float64 if form == "double" else torch.float32)
    found = estimate_llc(model, "mse", (x, model(x).detach()), nbeta=3e3, localization=10.0)
    assert found.llc == pytest.approx(4.5, abs=max(0.25, 3.5 * found.stderr))


class Shifted(nn.Module):
    """A loss with three weights of its own."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(3))

    def forward(self, outputs, targets):
        return half_square(outputs + self.shift, targets)


@pytest.mark.parametrize("form", ["module", "closure", "tensor"])
def test_weights_of_the_loss_are_sampled(form):
    torch.manual_seed(0)
    x, model, criterion = torch.randn(300, 3), nn.Linear(3, 3, bias=False), Shifted()
    shift = torch.zeros(3, requires_grad=True)
    loss = {
        "module": criterion,
        "closure": lambda o, t: criterion(o, t),
        "tensor": lambda o, t: half_square(o + shift, t),
    }[form]
    settings = {"nbeta": 1e4, "localization": 10.0}
    found = estimate_llc(model, loss, (x, model(x).detach()), **settings)
    assert found.llc == pytest.approx(6.0, abs=max(0.1, 3.5 * found.stderr))
    name = {"module": "loss.shift", "closure": "loss.criterion.shift", "tensor": "loss.shift"}[form]
    refined = estimate_llc(model, loss, (x, model(x).detach()), parameters=(name,), **settings)
    assert refined.llc == pytest.approx(1.5, abs=max(0.05, 3.5 * refined.stderr))
    assert criterion.shift.requires_grad
    assert not criterion.shift.any()


def test_a_penalty_on_weights_that_the_loss_holds_moves_with_them():
    torch.manual_seed(0)
    x, model = torch.randn(200, 3), nn.Linear(3, 1)
    held = list(model.parameters())
    settings = {"nbeta": 1e3, "localization": 1.0, "seed": 1}
    found = estimate_llc(
        model, lambda o, t: half_square(o, t) + sum(tensor.square().sum() for tensor in held), (x, x[:, :1]), **settings
    )
    same = estimate_llc(
        model,
        None,
        (x, x[:, :1]),
        batch_loss=lambda m, b: (
            half_square(m(b[0]), b[1]) + sum(parameter.square().sum() for parameter in m.parameters())
        ),
        **settings,
    )
    assert found.llc == pytest.approx(same.llc, rel=1e-4)


def test_tensors_of_a_loss_that_cannot_be_followed_are_told():
    weight = torch.ones(1, requires_grad=True)

    def loss(outputs, targets):
        if float(outputs.sum()) > 1e9:
            return outputs.mean()
        return half_square(outputs * weight, targets)

    x, model = torch.randn(30, 3), nn.Linear(3, 3, bias=False)
    with pytest.warns(RuntimeWarning, match="the loss holds tensors that train, or the model's own, and stays"):
        estimate_llc(model, loss, (x, x), draws=4)


@pytest.mark.parametrize("large", [False, True])
def test_an_operation_takes_one_thread_unless_the_network_is_large(monkeypatch, large):
    monkeypatch.setattr(point, "MEMORY", replace(point.MEMORY, large_weights=1 if large else 2**24))
    seen, before = set(), torch.get_num_threads()
    torch.set_num_threads(2)

    def loss(outputs, targets):
        seen.add(torch.get_num_threads())
        return half_square(outputs, targets)

    try:
        x = torch.randn(20, 3)
        estimate_llc(nn.Linear(3, 2), loss, (x, x[:, :2]), draws=20, burn_in=5)
        with pytest.raises(TaskError):
            estimate_llc(nn.Linear(3, 2), lambda outputs, targets: None, (x, x[:, :2]))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert seen == {2 if large else 1}


@pytest.mark.parametrize("constant", [0.0, 1e5])
def test_a_constant_in_the_loss_that_takes_its_digits_is_named(constant):
    """λ_c needs differences of gradients alone, and is right whatever is added to the loss."""
    torch.manual_seed(0)
    model, x = nn.Linear(12, 1, bias=False), torch.randn(60, 12)

    def loss(outputs, targets):
        return nn.functional.mse_loss(outputs, targets) + constant

    scale = {"nbeta": 2000.0, "localization": 200.0}
    curvature = 2 * torch.linalg.eigvalsh(x.double().T @ x.double() / 60)
    exact = float((0.5 * curvature / (curvature + 0.1)).sum())
    found = estimate_llc(model, loss, (x, model(x).detach()), progress=False, **scale)
    assert found.llc_centred == pytest.approx(exact, abs=4 * found.stderr_centred)
    if constant:
        assert any(reason.startswith("rounded: single precision tells losses near 1e+05") for reason in found.reasons)
    else:
        assert found.reasons == ()
        assert found.llc == pytest.approx(exact, abs=4 * found.stderr)
