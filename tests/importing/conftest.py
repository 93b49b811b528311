"""A small training that is recorded by the hook and saved by other means, step by step."""

import pytest
import torch
from torch import nn

import groktrace

FEW = {"chains": 2, "burn_in": 4, "draws": 8}
STEPS = (0, 10, 20, 30)


class Saved:
    """A training of a small classifier with AdamW; `save(step, model, optimizer)` is called beside each snapshot."""

    def __init__(self, out):
        self.out = out
        torch.manual_seed(0)
        self.x, self.y = torch.randn(40, 4), torch.randint(0, 3, (40,))

    def network(self):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))
        model[0].bias.requires_grad_(False)
        return model

    @property
    def data(self):
        return {"train": (self.x, self.y), "loss": "cross_entropy", "val": (self.x[:9], self.y[:9])}

    def task(self):
        return groktrace.Task.from_model(self.network(), **self.data)

    def train(self, save):
        model = self.network()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        with groktrace.watch(model, optimizer, **self.data, out=self.out, every=10):
            save(0, model, optimizer)
            for step in range(1, STEPS[-1] + 1):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(self.x), self.y).backward()
                optimizer.step()
                if step in STEPS:
                    save(step, model, optimizer)
        return model


@pytest.fixture
def saved(tmp_path):
    return Saved(tmp_path / "hooked")


@pytest.fixture
def same_analysis():
    """Asserts that the analysis of two runs is the same, bit by bit."""

    def check(hooked, imported, unlogged=False):
        hooked, imported = (groktrace.open_run(run) for run in (hooked, imported))
        assert [s.step for s in hooked.snapshots] == [s.step for s in imported.snapshots]
        assert [s.fingerprint() for s in hooked.snapshots] == [s.fingerprint() for s in imported.snapshots]
        assert hooked.weight_decay == imported.weight_decay
        hooked, imported = (groktrace.analyze(run, **FEW).to_dict() for run in (hooked, imported))
        assert hooked.pop("run") != imported.pop("run")
        for point in (*hooked["points"], *imported["points"]):
            if unlogged:
                point.pop("metrics")
        assert hooked == imported
        assert hooked["points"]

    return check
