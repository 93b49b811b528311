"""The example on superposition: its critical points are the published ones."""

import csv
import runpy
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "examples" / "superposition.py"


@pytest.fixture(scope="module")
def example():
    return runpy.run_path(str(SCRIPT))


@pytest.mark.parametrize("name", ["4", "4+", "4++", "5", "5+", "6"])
def test_critical_points_have_the_published_losses_and_no_gradient(example, name):
    k, positive, published, *_ = example["POINTS"][name]
    W, b = (tensor.requires_grad_() for tensor in example["critical_point"](k, positive))
    loss = example["population_loss"](W, b)
    assert loss.item() == pytest.approx(published, abs=6e-6)
    gradients = torch.autograd.grad(loss, (W, b))
    assert max(gradient.abs().max().item() for gradient in gradients) < 1e-5  # lengths are published to five digits


def test_the_closed_form_is_the_mean_over_many_inputs(example):
    generator = torch.Generator().manual_seed(0)
    W, b = torch.randn(2, 6, generator=generator).double(), 0.3 * torch.randn(6, generator=generator).double()
    sizes = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    x = (sizes[:, None, None] * torch.eye(6, dtype=torch.float64)).flatten(0, 1)
    mean = example["loss_fn"](example["Superposition"](W, b)(x), x)
    assert example["population_loss"](W, b).item() == pytest.approx(mean.item(), rel=1e-6)


def test_small_form(perform, tmp_path):
    perform("superposition")
    assert (tmp_path / "superposition.png").stat().st_size > 10_000
    rows = {row["point"]: row for row in csv.DictReader((tmp_path / "superposition.csv").read_text().splitlines())}
    assert [float(rows[name]["half_rank"]) for name in ("5", "5+", "6")] == [7.0, 8.5, 8.5]
    assert 6 < float(rows["5"]["llc"]) < 7.5  # κ = 100 shows nearly all of 7
    plateaus = list(csv.DictReader((tmp_path / "superposition_plateaus.csv").read_text().splitlines()))
    assert plateaus[0]["point"].startswith("4")
