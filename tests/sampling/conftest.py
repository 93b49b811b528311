"""Losses whose posteriors are known exactly."""

import pytest
import torch

from groktrace.sampling.posterior import StackedLoss, WeightLayout


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
