"""Losses whose posteriors are known exactly."""

from functools import cache

import pytest
import torch
from torch import nn

from groktrace.run.task import Task
from groktrace.sampling.posterior import StackedLoss
from groktrace.sampling.weights import WeightLayout


@pytest.fixture
def bowl():
    """A harmonic bowl as a stacked loss: L(w) = mean over samples of ½ Σ h_i (w_i − m_i)²; the samples are idle."""

    def make(curvatures, rows=1, minimum=None, dtype=torch.float64):
        h = torch.as_tensor(curvatures, dtype=dtype)
        centre = torch.zeros_like(h) if minimum is None else torch.as_tensor(minimum, dtype=dtype)

        def forward(weights, tensors):
            return 0.5 * (h * (weights["w"] - centre).square()).sum() * tensors[0].mean(), None

        layout = WeightLayout(("w",), (tuple(h.shape),))
        return StackedLoss(forward, layout, (torch.ones(8, dtype=dtype),), {})

    return make


@pytest.fixture
def confident_classifier():
    """A logistic loss with margins of 12, probed; its weights [1, 4]; the largest eigenvalue of the Hessian there.

    Beside a large weight that it does not depend on, so that within a thousandth of the weights' norm the loss bends.
    """
    x = torch.tensor([[3.0, 0.0, 0.0], [0.0, 2.0, 1.0]])
    layout = WeightLayout(("w", "spare"), ((3,), (1,)))

    def forward(weights, tensors):
        return torch.nn.functional.softplus(-tensors[0] @ weights["w"]).mean(), None

    flat = torch.tensor([[4.0, 4.0, 4.0, 400.0]])
    loss = StackedLoss(forward, layout, (x,), {}).probe(flat)
    hessian = torch.autograd.functional.hessian(lambda w: loss.losses(w[None])[0], flat[0])
    return loss, flat, torch.linalg.eigvalsh(hessian).max()


@pytest.fixture(scope="session")
def kinked():
    """A function that makes a classifier with ReLUs, trained on random labels, whose data count as many or as few.

    It gives its loss, its weights and nine tenths of these, [2, D], and h_max of each.
    """

    @cache
    def make(sampled):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2))
        train = (torch.randn(64, 10), torch.randint(0, 2, (64,)))
        task = Task.from_model(model, loss="cross_entropy", train=train)
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for _ in range(200):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(train[0]), train[1]).backward()
            optimizer.step()
        layout = WeightLayout(*zip(*[(name, tuple(p.shape)) for name, p in model.named_parameters()], strict=True))
        flat = layout.flatten(dict(model.named_parameters())).detach()[None]
        loss = StackedLoss(task.forward, layout, train, {}, sample_bytes=1000 if sampled else None).probe(flat)
        both = torch.cat([flat, 0.9 * flat])
        function = torch.autograd.functional.hessian
        hessians = [function(lambda w: loss.losses(w[None])[0], row, vectorize=True) for row in both]
        return loss, both, torch.stack([torch.linalg.eigvalsh(h.double()).abs().max() for h in hessians]).float()

    return make
