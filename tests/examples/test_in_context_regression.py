import csv
import importlib.util
from pathlib import Path

import pytest
import torch

EXAMPLE = Path(__file__).parents[2] / "examples" / "in_context_regression.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location(EXAMPLE.stem, EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_small_form(perform, tmp_path):
    perform("in_context_regression")
    rows = list(csv.DictReader((tmp_path / "in_context_regression.csv").read_text().splitlines()))
    assert {row["run"] for row in rows} == {"endless", "few"}
    for run in ("endless", "few"):
        first, *_, last = [row for row in rows if row["run"] == run]
        assert (int(first["step"]), int(last["step"])) == (0, 40)
        assert float(last["loss"]) < float(first["loss"])
        assert (last["from_dmmse"] == "") == (run == "endless")
    assert (tmp_path / "in_context_regression.png").exists()


def test_the_known_solutions_are_the_best(example):
    seed = torch.Generator().manual_seed(0)
    tasks = torch.randn(4, example.D, generator=seed)
    few, new = example.sample(4000, tasks, seed), example.sample(4000, None, seed)
    losses = {
        name: [(predicted(sequences) - sequences[..., 0]).square().mean().item() for sequences in (few, new)]
        for name, predicted in (("ridge", example.ridge), ("dmmse", lambda sequences: example.dmmse(sequences, tasks)))
    }
    assert example.NOISE < losses["dmmse"][0] < losses["ridge"][0]
    assert example.NOISE < losses["ridge"][1] < losses["dmmse"][1]
    # With no example before it, the prediction is that of the prior.
    assert example.ridge(new)[:, 0].abs().max() < 1e-5
    assert torch.allclose(example.dmmse(few, tasks)[:, 0], few[:, 0, 1:] @ tasks.mean(0), atol=1e-5)


def test_no_prediction_sees_what_it_predicts(example):
    torch.manual_seed(0)
    model, sequences = example.Regressor(8), torch.randn(2, example.K, example.D + 1)
    before = model(sequences)
    sequences[:, 3:, 0] += 1.0
    after = model(sequences)
    assert torch.allclose(before[:, :4], after[:, :4], atol=1e-6)
    assert not torch.allclose(before[:, 4:], after[:, 4:], atol=1e-3)
