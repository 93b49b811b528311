import math

import torch

from groktrace.sampling.hutchinson import hessian_trace
from groktrace.sampling.noise import generator_for
from groktrace.sampling.posterior import StackedLoss
from groktrace.sampling.weights import WeightLayout

DIMENSION = 12


def rotated_bowl():
    """L(w) = ½ wᵀHw with H of a known spectrum in a random basis."""
    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(DIMENSION, DIMENSION, generator=generator, dtype=torch.float64))
    hessian = (basis * torch.logspace(0, -2, DIMENSION, dtype=torch.float64)) @ basis.T

    def forward(weights, tensors):
        return 0.5 * weights["w"] @ (hessian @ weights["w"]) * tensors[0].mean(), None

    layout = WeightLayout(("w",), ((DIMENSION,),))
    return StackedLoss(forward, layout, (torch.ones(4, dtype=torch.float64),), {}), hessian


def generators(rows, seed=0):
    return [generator_for(seed, row, 0, "test", torch.device("cpu")) for row in range(rows)]


def test_mean_scatter_and_error_bar_are_those_of_a_known_hessian():
    loss, hessian = rotated_bowl()
    rows, vectors = 400, 50
    traces, errors = hessian_trace(loss, torch.ones(rows, DIMENSION).double(), generators(rows), vectors)
    exact = float(hessian.trace())
    off = hessian - torch.diag(hessian.diagonal())
    scatter = math.sqrt(2 * float(off.square().sum()) / vectors)
    assert abs(float(traces.mean()) - exact) < 4 * scatter / math.sqrt(rows)
    # The relative error of a standard deviation over n values is 1/√(2n), of one row's over m vectors 1/√(2m) or so.
    assert abs(float(traces.std()) / scatter - 1) < 4 / math.sqrt(2 * rows)
    assert abs(float(errors.mean()) / scatter - 1) < 0.05
    covered = float(((traces - exact).abs() < 1.96 * errors).double().mean())
    assert 0.90 < covered < 0.98


def test_a_diagonal_hessian_is_exact_with_any_signs(bowl):
    loss = bowl([3.0, 2.0, 0.5, 0.0])
    traces, errors = hessian_trace(loss, torch.ones(3, 4).double(), generators(3), 2)
    torch.testing.assert_close(traces, torch.full((3,), 5.5).double(), rtol=1e-6, atol=0)
    assert float(errors.max()) < 1e-6


def test_negative_curvature_counts_negatively(bowl):
    traces, _ = hessian_trace(bowl([1.0, -4.0]), torch.ones(1, 2).double(), generators(1), 2)
    torch.testing.assert_close(traces, torch.tensor([-3.0]).double(), rtol=1e-6, atol=0)


def test_a_row_does_not_depend_on_what_it_is_stacked_with():
    loss, _ = rotated_bowl()
    weights = torch.randn(3, DIMENSION, generator=torch.Generator().manual_seed(1)).double()
    together, _ = hessian_trace(loss, weights, generators(3), 5)
    alone, _ = hessian_trace(loss, weights[2:], generators(3)[2:], 5)
    torch.testing.assert_close(together[2:], alone, rtol=1e-9, atol=0)
