"""A small training run, and a stand-in for the tracing of programs, which has its own tests."""

import sys
import types

import pytest
import torch
from torch import nn

import groktrace
import groktrace.run.task  # before the stand-in


class FakeProgram:
    """What recording needs of groktrace.run.program.Program."""

    failure = None
    static_batch = None

    def __init__(self, live=None):
        self.constants = {"offset": torch.arange(3.0)}
        self.live = live

    @classmethod
    def trace(cls, forward, batch):
        torch.rand(3)  # a tracer may draw numbers; the training must not notice
        if cls.failure is not None:
            raise cls.failure
        return cls(forward)

    def forward(self, weights, tensors):
        return torch.func.functional_call(
            self.live, {f"model.{name}": value for name, value in weights.items()}, tensors
        )

    def to_json(self):
        return {"nodes": []}


@pytest.fixture(autouse=True)
def program(monkeypatch):
    """The class that recording gets for Program; set `failure` to make tracing fail."""
    module = types.ModuleType("groktrace.run.program")
    module.Program = type("Program", (FakeProgram,), {})
    monkeypatch.setitem(sys.modules, "groktrace.run.program", module)
    return module.Program


class Training:
    """A network, its data and its loop."""

    def __init__(self, make=torch.optim.SGD, **settings):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        self.x, self.y = torch.randn(6, 3), torch.randn(6, 2)
        self.optimizer = make(self.model.parameters(), **({"lr": 0.1} | settings))

    @property
    def data(self):
        return {"train": (self.x, self.y), "loss": "mse"}

    def update(self, n=1):
        for _ in range(n):
            self.optimizer.zero_grad()
            nn.functional.mse_loss(self.model(self.x), self.y).backward()
            self.optimizer.step()

    def record(self, root, updates, **settings):
        """Record some updates, every second one; returns the recorder, closed."""
        with groktrace.watch(
            self.model, self.optimizer, **self.data, out=root, **({"every": 2} | settings)
        ) as recorder:
            self.update(updates)
        return recorder


@pytest.fixture
def training():
    return Training()


@pytest.fixture
def root(tmp_path):
    """Where a run may go."""
    return tmp_path / "run"


@pytest.fixture
def make_training():
    return Training
