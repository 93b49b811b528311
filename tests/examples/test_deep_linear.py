"""The example on deep linear networks: ranks are reduced as said, and λ̂ of small networks is near λ."""

import csv
import runpy
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "examples" / "deep_linear.py"


@pytest.fixture(scope="module")
def example():
    return runpy.run_path(str(SCRIPT))


def test_networks_are_within_their_family_and_some_layers_of_reduced_rank(example):
    reduced = layers = 0
    for seed in range(10):
        model, widths, rank = example["random_network"](seed, (1, 5000), (5, 50, 5))
        assert 2 <= len(widths) - 1 <= 5
        assert sum(weight.numel() for weight in model.parameters()) <= 5000
        ranks = [int(torch.linalg.matrix_rank(layer.weight, rtol=1e-5)) for layer in model]
        singular = torch.linalg.svdvals(example["product"](model, widths[0]))
        assert len(singular) == rank or singular[rank] < 1e-5 * singular[0]
        assert singular[rank - 1] > 1e-5 * singular[0]
        reduced += sum(rank < min(layer.weight.shape) for rank, layer in zip(ranks, model, strict=True))
        layers += len(ranks)
    assert 0.2 < reduced / layers < 0.7


def test_half_of_the_rank_is_that_of_the_jacobian(example):
    for seed in range(6):
        model, widths, _ = example["random_network"](seed, (1, 400), (3, 8, 4))
        weights = [layer.weight.detach().double() for layer in model]

        def product(*layers, inputs=widths[0]):
            whole = torch.eye(inputs).double()
            for layer in layers:
                whole = layer @ whole
            return whole

        parts = torch.autograd.functional.jacobian(product, tuple(weights))
        jacobian = torch.cat([part.reshape(widths[-1] * widths[0], -1) for part in parts], 1)
        assert example["half_rank"](model) == int(torch.linalg.matrix_rank(jacobian, rtol=1e-6)) / 2


def test_at_least_forty_networks_of_up_to_a_million_weights(example):
    assert sum(count for count, *_ in example["FAMILIES"]) >= 40
    assert max(most for _, (_, most), _ in example["FAMILIES"]) == 1e6
    assert max(layers for *_, (_, _, layers) in example["FAMILIES"]) == 20


def test_small_form_goes_on_where_it_stopped(perform, tmp_path, capsys):
    perform("deep_linear")
    assert (tmp_path / "deep_linear.png").stat().st_size > 10_000
    rows = list(csv.DictReader((tmp_path / "deep_linear.csv").read_text().splitlines()))
    assert len(rows) == 2
    for row in rows:
        assert 0.4 < float(row["llc_equilibrium"]) / float(row["exact"]) < 1.1, row
    stages = list(csv.DictReader((tmp_path / "deep_linear_saddles.csv").read_text().splitlines()))
    assert [int(stage["rank"]) for stage in stages] == [0]
    # One network taken away is measured again, to the same numbers; the training is not repeated.
    kept = tmp_path / "networks.jsonl"
    kept.write_text("".join(kept.read_text().splitlines(keepends=True)[:1]))
    capsys.readouterr()
    perform("deep_linear")
    assert capsys.readouterr().out.count("'seed'") == 1
    assert [
        row["llc_published"] for row in csv.DictReader((tmp_path / "deep_linear.csv").read_text().splitlines())
    ] == [row["llc_published"] for row in rows]
