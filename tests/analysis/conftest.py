"""Small networks with known answers."""

from collections import defaultdict

import pytest
import torch
from torch import nn

import groktrace
from groktrace.analysis.running.evaluator import Evaluator


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


@pytest.fixture
def record_like():
    """Records a training from the start of a recorded one, on its data, at another rate."""

    def record_like(run, out, learning_rate, scale=1.0, seen=None):
        opened = groktrace.open_run(run)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        model.load_state_dict(opened.snapshots[0].load())
        optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)
        x, y = opened.task.train.nested()
        x = scale * x
        with groktrace.watch(
            model, optimizer, train=(x, y), loss="cross_entropy", val=opened.task.val.nested(), out=out, every=10
        ) as recorder:
            for _ in range(50):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
                recorder.log(seen=seen or 0.0)
        return out

    return record_like
