"""Small networks with known answers."""

from collections import defaultdict

import pytest
import torch
from torch import nn

from groktrace.analysis.evaluator import Evaluator


class Quadratic(nn.Module):
    """f(x) = V (Wᵀx)²."""

    def __init__(self, d, k, p, generator):
        super().__init__()
        self.W = nn.Parameter(torch.randn(d, k, generator=generator))
        self.V = nn.Parameter(torch.randn(p, k, generator=generator))

    def forward(self, x):
        return (x @ self.W).square() @ self.V.T


@pytest.fixture
def teacher():
    """A quadratic network at a generic true solution, and its noiseless Gaussian data."""

    def make(d, p, k, n=400, seed=0):
        generator = torch.Generator().manual_seed(seed)
        model = Quadratic(d, k, p, generator)
        x = torch.randn(n, d, generator=generator)
        return model, (x, model(x).detach())

    return make


@pytest.fixture
def evaluated(monkeypatch):
    """The steps of all snapshots that this process evaluates, by phase."""
    steps = defaultdict(list)
    plain = Evaluator.evaluate

    def noting(self, item, snapshots):
        steps[item.phase].extend(item.steps)
        return plain(self, item, snapshots)

    monkeypatch.setattr(Evaluator, "evaluate", noting)
    return steps
