"""Losses of single samples: those of the samples alone, whatever is evaluated together."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from groktrace.sampling import sample_losses
from groktrace.sampling.network import LargeNetwork
from groktrace.sampling.posterior import FACTOR, StackedLoss
from groktrace.sampling.sample_losses import DrawnSampleLosses, network_sample_losses, stacked_sample_losses
from groktrace.sampling.weights import WeightLayout

X, Y = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)), torch.arange(50) % 4
LAYOUT = WeightLayout(("weight",), ((4, 3),))


def forward(weights, tensors):
    outputs = tensors[0] @ weights["weight"].T + weights["bias"]
    return nn.functional.cross_entropy(outputs, tensors[1]), outputs


def awkward(weights, tensors):
    """The same, by what cannot be stacked."""
    return (forward(weights, tensors)[0] if float(tensors[0].sum()) < 10**6 else torch.zeros(())), None


def expected(weights, bias):
    return nn.functional.cross_entropy(X @ weights.view(4, 3).T + bias, Y, reduction="none")


def test_stacked_ones_are_those_of_each_row(monkeypatch):
    weights, bias = torch.randn(3, 12), torch.randn(3, 4)
    loss = StackedLoss(forward, LAYOUT, (X, Y), {"bias": bias, FACTOR: torch.tensor([1.0, 5.0, 0.1])})
    wanted = torch.stack([expected(*row) for row in zip(weights, bias, strict=True)])
    torch.testing.assert_close(stacked_sample_losses(loss, weights), wanted)
    seven_at_a_time = replace(sample_losses.MEMORY, part_bytes=3 * 7 * 100)
    monkeypatch.setattr(sample_losses, "MEMORY", seven_at_a_time)
    torch.testing.assert_close(stacked_sample_losses(replace(loss, sample_bytes=100), weights), wanted)


@pytest.mark.parametrize("function", [forward, awkward])
def test_those_of_a_large_network_need_not_be_stacked(function):
    weights, bias = torch.randn(4, 3), torch.randn(4)
    loss = StackedLoss(function, LAYOUT, (X, Y), {}, vectorised=False, micro_batch=20)
    network = LargeNetwork(loss, {"weight": weights, "bias": bias, FACTOR: torch.tensor(3.0)})
    torch.testing.assert_close(network_sample_losses(network), expected(weights, bias))
    at = torch.randn(12)
    torch.testing.assert_close(network_sample_losses(network, at), expected(at, bias))


def test_each_snapshot_has_those_of_its_own_draws():
    drawn = DrawnSampleLosses([(1, 2), (0, 1), (5, 0)])
    for t in range(6):
        due = drawn.due(t)
        if due:
            drawn.keep(due, torch.stack([torch.tensor([10.0 * t + s]) for s in due for _ in range(2)]))
    assert drawn.of(0).tolist() == [[[10.0], [10.0]], [[20.0], [20.0]]]
    assert drawn.of(1).tolist() == [[[1.0], [1.0]]]
    assert drawn.of(2) is None
