import csv
import importlib.util
from pathlib import Path

import pytest
import torch

EXAMPLE = Path(__file__).parents[2] / "examples" / "attention_only.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location(EXAMPLE.stem, EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_small_form(perform, tmp_path):
    perform("attention_only")
    first, *_, last = csv.DictReader((tmp_path / "attention_only.csv").read_text().splitlines())
    assert (int(first["step"]), int(last["step"])) == (0, 10)
    assert float(last["loss"]) < float(first["loss"])
    heads = [f"{layer}.{head}" for layer in range(2) for head in range(4)]
    for head in heads:
        assert 0 < float(last[f"previous_{head}"]) < 1
        assert 0 < float(last[f"induction_{head}"]) < 1
    assert len({last[f"llc_{name}"] for name in ("whole", *heads[::3])}) == 4  # of different weights each
    assert (tmp_path / "attention_only.png").exists()


def test_no_prediction_sees_what_it_predicts(example):
    torch.manual_seed(0)
    model, tokens = example.LanguageModel(example.Size(width=8, length=16)), torch.randint(1024, (2, 16))
    before = model(tokens)
    tokens[:, 10] += 1
    after = model(tokens % 1024)
    assert torch.allclose(before[:, :10], after[:, :10], atol=1e-6)
    assert not torch.allclose(before[:, 10:], after[:, 10:], atol=1e-3)


def test_text_comes_back_from_its_tokens(example):
    # A known word is a token, another one is spelled.
    counts = [len(module) for module in example.library(20)]
    assert min(counts) > 0
    contexts, held_back = example.data(example.Size(length=16, modules=20))
    some = contexts(8, among=10)
    assert some.shape == (8, 17)
    assert 0 <= int(some.min()) <= int(some.max()) < example.VOCABULARY
    assert len(contexts.tokens) + len(held_back.tokens) == sum(counts)


def test_contexts_stay_in_a_module_and_the_ones_that_repeat_are_taken(example):
    modules = [torch.arange(20), torch.arange(100, 120), torch.arange(2).repeat(10)]
    contexts = example.Contexts(modules, 8, seed=0)
    some = contexts(200)
    steps = some.diff()
    assert (steps.abs() == 1).all()  # never from the end of one module to the start of the next
    assert {int(start) // 50 for start in some[:, 0]} == {0, 2}
    assert (contexts(50, among=40) < 2).float().mean() > 0.9


def test_heads_share_the_weights_of_their_layer(example):
    model = dict(example.LanguageModel(example.Size(width=8, length=16)).named_parameters())
    covered = {name: torch.zeros_like(weight) for name, weight in model.items() if name.startswith("layers.1.")}
    for head in range(example.HEADS):
        for part in example.parts_of(f"1.{head}", 8):
            name, inside = part.rstrip("]").split("[")
            index = tuple(
                slice(*(int(end) if end.strip() else None for end in axis.split(":"))) if ":" in axis else int(axis)
                for axis in inside.split(",")
            )
            covered[name][index] += 1
    weights = {name for name in covered if "norm" not in name}
    assert all((covered[name] == 1).all() for name in weights)
    assert all((covered[name] == 0).all() for name in covered.keys() - weights)
