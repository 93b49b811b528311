"""A training that goes on with a recording and is not the one that was recorded is told of."""

import copy
import warnings

import pytest
import torch
from torch import nn

import groktrace
from groktrace.run.store import open_run


class Training:
    def __init__(self, seed=0):
        torch.manual_seed(seed)
        self.model = nn.Linear(3, 2)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.05)
        self.data = torch.linspace(-1, 1, 60).view(20, 3), torch.zeros(20, 2)

    def state(self):
        return copy.deepcopy((self.model.state_dict(), self.optimizer.state_dict()))

    def load(self, state):
        self.model.load_state_dict(state[0])
        self.optimizer.load_state_dict(state[1])
        return self

    def update(self, count):
        for _ in range(count):
            self.optimizer.zero_grad()
            nn.functional.mse_loss(self.model(self.data[0]), self.data[1]).backward()
            self.optimizer.step()

    def record(self, out, updates, every=2):
        """Train with a recording; what was warned of."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with groktrace.watch(self.model, self.optimizer, train=self.data, loss="mse", out=out, every=every):
                self.update(updates)
        return [str(warning.message) for warning in caught]


@pytest.fixture
def out(tmp_path):
    return tmp_path / "run"


def recorded(out):
    """A run up to step 10, and its state at step 4."""
    training = Training()
    training.update(4)
    state, training = training.state(), Training()
    assert training.record(out, 10) == []
    return state


def test_steps_that_are_done_again_are_no_news(out):
    state = recorded(out)
    assert Training().load(state).record(out, 8) == []
    assert [snapshot.step for snapshot in open_run(out).snapshots] == [0, 2, 4, 6, 8, 10, 12]


def test_another_way_is_told_once_and_what_is_there_stays(out):
    state = recorded(out)
    before = open_run(out).snapshots[3].load()
    training = Training().load(state)
    training.optimizer.param_groups[0]["lr"] = 0.5
    (said,) = training.record(out, 8)
    assert "step 6: recorded already, with other weights: this training is another one, or has gone another way" in said
    run = open_run(out)
    assert all(torch.equal(before[name], tensor) for name, tensor in run.snapshots[3].load().items())
    (doubt,) = run.doubts  # which the analysis repeats
    assert doubt.startswith("step 6: recorded already, with other weights")


def test_another_training_is_told_where_it_begins(out):
    recorded(out)
    other = Training(seed=1)
    other.update(4)
    (said,) = other.record(out, 1)
    assert "step 4: recorded already, with other weights" in said


def test_of_snapshots_that_cannot_be_read_nothing_is_said(out):
    state = recorded(out)
    for snapshot in (out / "weights").glob("*"):
        snapshot.write_bytes(b"no tensors")
    assert Training().load(state).record(out, 2) == []
