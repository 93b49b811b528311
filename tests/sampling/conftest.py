"""Losses whose posteriors are known exactly."""

import pytest
import torch

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
