import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Normal
from torch.nn import functional as F  # noqa: N812

import groktrace
from groktrace.errors import TaskError
from groktrace.run.loss_noise import without_noise
from groktrace.run.program import Program
from groktrace.run.task import Task

X = torch.randn(70, 4, generator=torch.Generator().manual_seed(1))


def network():
    torch.manual_seed(0)
    return nn.Linear(4, 6)


def vae(model, x):
    mean, log_std = model(x)[:, :4].chunk(2, -1)
    code = mean + log_std.exp() * torch.randn_like(mean)
    return (code - x[:, :2]).square().mean() + log_std.square().mean()


def reparametrised(model, x):
    mean, log_std = model(x)[:, :4].chunk(2, -1)
    return Normal(mean, log_std.exp()).rsample((3,)).square().mean()


def diffusion(model, x):
    time = torch.randint(0, 10, (len(x),), device=x.device)
    noise = torch.empty_like(x).normal_(generator=torch.Generator())
    share = (time / 10)[:, None]
    return (model((1 - share) * x + share * noise)[:, :4] - noise).square().mean()


def masked(model, x):
    kept = torch.bernoulli(torch.full_like(x, 0.5)) * (torch.rand(len(x), 1) > 0.1)
    return (model(kept * x)[:, :4] - x).square().mean()


LOSSES = [vae, reparametrised, diffusion, masked]


def mean_of(task, batch, parts):
    model = task.module.model
    weights = dict(model.named_parameters())
    return sum(len(part) * task.forward(weights, batch.take(part).tensors)[0].item() for part in parts) / len(batch)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_sample_has_one_loss_in_whatever_batch_and_at_every_call(loss):
    model = network()
    task = Task.from_model(model, train=X, batch_loss=loss, noise="fixed", val=X[:9])
    assert torch.equal(without_noise(task.train).tensors[0], X)
    assert len(task.val) == 9
    everything = torch.arange(70)
    whole = mean_of(task, task.train, [everything])
    torch.manual_seed(5)
    assert mean_of(task, task.train, [everything]) == whole
    shuffled = everything[torch.randperm(70)]
    assert mean_of(task, task.train, shuffled.split(9)) == pytest.approx(whole, rel=1e-5)
    with torch.no_grad():
        torch.manual_seed(0)
        drawn = torch.stack([loss(model, X) for _ in range(400)])
    assert abs(whole - drawn.mean()) < 4 * drawn.std()  # one of the losses that are trained on
    again = Task.from_model(model, train=X, batch_loss=loss, noise="fixed")
    assert all(map(torch.equal, again.train.tensors, task.train.tensors))
    other = Task.from_model(model, train=X, batch_loss=loss, noise="fixed", seed=1)
    assert mean_of(other, other.train, [everything]) != whole


@pytest.mark.parametrize("loss", LOSSES)
def test_it_can_be_recorded_as_a_program(loss):
    model = network()
    task = Task.from_model(model, train=X, batch_loss=loss, noise="fixed")
    program = Program.trace(task.module, task.train)
    assert program.static_batch is None
    for scale in (1.0, -2.0):
        weights = {name: scale * tensor.detach() for name, tensor in model.named_parameters()}
        live, _ = task.forward(weights, task.train.tensors)
        torch.testing.assert_close(program.forward(weights, task.train.tensors)[0], live)


def test_drawing_leaves_training_and_generators_alone():
    model = network()
    before, states = [p.detach().clone() for p in model.parameters()], torch.get_rng_state()
    versions = [p._version for p in model.parameters()]
    Task.from_model(model, train=X, batch_loss=vae, noise="fixed")
    assert torch.equal(torch.get_rng_state(), states)
    assert all(map(torch.equal, before, model.parameters()))
    assert [p._version for p in model.parameters()] == versions


def test_noise_within_the_model_leaves_the_outputs_known():
    class Noisy(nn.Linear):
        def forward(self, x):
            return super().forward(x + 0.1 * torch.randn_like(x))

    torch.manual_seed(0)
    model, y = Noisy(4, 3), torch.randint(0, 3, (70,))
    task = Task.from_model(model, train=(X, y), loss="cross_entropy", noise="fixed")
    outputs = task.forward(dict(model.named_parameters()), task.train.tensors)[1]
    expected = nn.functional.linear(X + 0.1 * task.train.tensors[2], model.weight, model.bias)
    torch.testing.assert_close(outputs, expected)


def test_a_loss_that_draws_nothing_stays_as_it_is():
    task = Task.from_model(network(), train=X, batch_loss=lambda m, x: m(x).square().mean(), noise="fixed")
    assert len(task.train.tensors) == 1


def shared(model, x):
    return (model(x) * torch.rand(())).square().mean()


def scaled(model, x):
    out = model(x)
    return torch.normal(out, torch.ones_like(out)).square().mean() + out.square().mean()


def by_numpy(model, x):
    return model(x).square().mean() * float(np.random.rand())


def by_python(model, x):
    return model(x + torch.randn_like(x)).square().mean() * random.random()


def gumbel(model, x):
    return F.gumbel_softmax(model(x)).square().mean()


def of_two(model, x):
    return model(x.view(2, 4) + torch.randn_like(x)).square().mean()


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (of_two, r"the loss fails on 3 samples \(RuntimeError: .*shape.*; draw the numbers once"),
        (
            shared,
            r"of each sample's own, got a draw of shape \(\) for 2 samples and \(\) for 3; .* torch.randn\(len\(x\)",
        ),
        (scaled, r"a distribution that depends on the weights; .* as mean \+ std \* torch.randn_like"),
        (by_numpy, "at the same weights and samples the loss is .* not so what NumPy"),
        (by_python, "at the same weights and samples the loss is .* not so what NumPy, Python"),
        (gumbel, "at the same weights and samples the loss is .* gumbel_softmax"),
    ],
)
def test_noise_that_cannot_be_fixed_is_named(loss, message):
    with pytest.raises(TaskError, match=f"noise: .*{message}"):
        Task.from_model(network(), train=X, batch_loss=loss, noise="fixed")


def test_wrong_arguments_and_other_losses():
    with pytest.raises(TaskError, match="noise: expected None or 'fixed', got 'fresh'"):
        Task.from_model(network(), batch_loss=vae, noise="fresh")
    with pytest.raises(TaskError, match='noise="fixed" keeps one draw for each sample'):
        Task.from_model(network(), train=X, batch_loss=vae)
    batch = Task.from_model(network(), train=X, batch_loss=vae, noise="fixed").train
    with pytest.raises(TaskError, match="what another loss drew, 1 times for each; this one draws 2 times"):
        Task.from_model(network(), batch_loss=masked).with_data(batch, None, 70)


def test_a_point_is_measured_reproducibly():
    few = {"chains": 1, "burn_in": 4, "draws": 8, "nbeta": 10.0, "localization": 10.0}
    estimates = [groktrace.estimate_llc(network(), None, X, batch_loss=vae, noise="fixed", **few) for _ in range(2)]
    assert estimates[0].llc == estimates[1].llc
