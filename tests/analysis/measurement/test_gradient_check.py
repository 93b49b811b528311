"""Chains that follow another gradient than the loss's sample no posterior; that is said, and of good losses nothing."""

import pytest
import torch
from torch import nn
from torch.nn import functional

import groktrace
from groktrace.analysis.measurement.gradient_check import wrong_gradient
from groktrace.run.task import Task
from groktrace.sampling.weights import WeightLayout

CPU = torch.device("cpu")
x, tokens = torch.linspace(-1, 1, 90).view(30, 3).sin(), torch.arange(120).view(30, 4) ** 2 % 6


class Words(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.words, self.out = nn.Embedding(6, 3, **options), nn.Linear(12, 1)

    def forward(self, tokens):
        return self.out(self.words(tokens).tanh().flatten(1))


class Blocked(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 1)

    def forward(self, x):
        with torch.no_grad():
            hidden = self.first(x).tanh()
        return self.last(hidden)


def bootstrapped(outputs, targets):
    """As a temporal difference: the target is the network's own output elsewhere."""
    return (outputs - targets - 0.9 * outputs.roll(1, 0).detach()).square().mean()


def check(model, data, loss="mse"):
    torch.manual_seed(0)
    task = Task.from_model(model, train=(data, torch.ones(len(data), 1)), loss=loss)
    sizes = {name: parameter.shape for name, parameter in model.named_parameters()}
    return wrong_gradient(task, WeightLayout(tuple(sizes), tuple(sizes.values())), dict(model.state_dict()), CPU)


@pytest.mark.parametrize(
    ("model", "data", "loss", "said"),
    [
        (Words(padding_idx=1), tokens, "mse", "that of words.weight"),
        (Words(scale_grad_by_freq=True), tokens, "mse", "that of words.weight"),
        (Blocked(), x, "mse", "that of first.weight, first.bias"),
        (nn.Linear(3, 1), x, bootstrapped, "that of weight, bias"),
    ],
)
def test_stopped_and_scaled_gradients_are_told_with_the_weights_whose_they_are(model, data, loss, said):
    assert check(model, data, loss).endswith(said)


@pytest.mark.parametrize(
    ("model", "data"),
    [
        (Words(), tokens),
        (nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1)), x),
        (nn.Sequential(nn.Unflatten(1, (1, 3)), nn.Conv1d(1, 4, 2), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(4, 1)), x),
        (nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.GELU(), nn.Dropout(0.5), nn.Linear(8, 1)), x),
        (nn.utils.parametrizations.weight_norm(nn.Linear(3, 1)), x),
    ],
)
def test_of_good_losses_nothing_is_said(model, data):
    assert check(model.eval(), data) == ""


def test_weights_that_are_all_zero_are_looked_at_too():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    assert check(model, x) == ""


def test_differences_that_do_not_agree_tell_nothing():
    """In half precision a loss moves by steps."""

    def rough(outputs, targets):
        return functional.mse_loss(outputs.half().float(), targets)

    assert check(nn.Linear(3, 1), x, rough) == ""


def test_an_estimate_is_flagged_until_the_row_that_never_moves_is_left_out():
    torch.manual_seed(0)
    model = Words(padding_idx=1)
    data = tokens, model(tokens).detach()
    found = groktrace.estimate_llc(model, "mse", data, progress=False)
    assert not found.reliable
    assert "another gradient: backward gives one that is off the loss's by" in found.reasons[0]
    rest = ["words.weight[0:1]", "words.weight[2:6]", "out.*"]
    assert groktrace.estimate_llc(model, "mse", data, progress=False, parameters=rest).reasons == ()
