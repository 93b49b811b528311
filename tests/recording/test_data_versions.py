"""Data that change after `watch` are told of; whatever else happens to them is not."""

import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Subset, TensorDataset

import groktrace
from groktrace.recording.data_versions import DataVersions, tensors_within

X, Y = torch.randn(12, 3), torch.randn(12, 1)


@pytest.mark.parametrize(
    "data",
    [
        (X, Y),
        [(X, Y)],
        {"x": X, "y": [Y]},
        TensorDataset(X, Y),
        DataLoader(TensorDataset(X, Y), 4),
        Subset(TensorDataset(X, Y), [0, 2]),
        ConcatDataset([TensorDataset(X, Y)]),
    ],
    ids=lambda data: type(data).__name__,
)
def test_tensors_are_found_wherever_they_are(data):
    assert [id(tensor) for tensor in tensors_within(data)] == [id(X), id(Y)]


@pytest.mark.parametrize("data", [None, "text", 3, range(4), (n for n in range(3)), nn.Linear(2, 2)])
def test_what_holds_no_data_holds_no_tensors(data):
    assert list(tensors_within(data)) == []


def test_tensors_that_pytorch_does_not_count_or_that_are_gone_say_nothing():
    with torch.inference_mode():
        uncounted = torch.ones(3)
    seen = DataVersions(train=[uncounted, torch.ones(2)])
    with torch.inference_mode():
        uncounted.add_(1)
    seen.report(lambda kind, text: pytest.fail(text), pytest.fail)


def train(x, y, out, between, val=None):
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with groktrace.watch(model, optimizer, train=(x, y), val=val, loss="mse", out=out, every=2):
        for step in range(6):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
            between(step)


def test_targets_that_get_noise_during_the_training_are_one_warning(tmp_path):
    x, y = X.clone(), Y.clone()
    with pytest.warns(
        RuntimeWarning, match="train: its tensors were written to after watch; the recording holds"
    ) as told:
        train(x, y, tmp_path, lambda step: y.add_(0.1))
    assert len(told) == 1
    run = groktrace.open_run(tmp_path)
    assert [snapshot.step for snapshot in run.snapshots][:3] == [0, 2, 4]
    (doubt,) = run.doubts  # which the analysis repeats
    assert doubt.startswith("step 2: train: its tensors were written to after watch")


def test_validation_data_are_seen_too(tmp_path):
    held_out = X.clone(), Y.clone()
    with pytest.warns(RuntimeWarning, match="val: its tensors were written to after watch"):
        train(X, Y, tmp_path, lambda step: held_out[0].mul_(2), held_out)


def test_data_that_are_only_read_say_nothing(tmp_path):
    x, y = X.clone(), Y.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(x, y, tmp_path, lambda step: (x + y).mul_(2).sum())
        groktrace.open_run(tmp_path)
