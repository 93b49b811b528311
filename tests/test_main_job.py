"""The main job end to end: what the reference run has to show, and another kind of training loop."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

import groktrace


def column(result, name):
    return np.array([np.nan if point[name] is None else point[name] for point in result["trajectory"]])


def test_the_network_groks(reference_run):
    _, result = reference_run
    steps, train, val = (column(result, name) for name in ("step", "train_accuracy", "val_accuracy"))
    assert len(steps) == 61
    assert val[-1] >= 0.99
    assert train[steps == 100] == 1
    assert val[steps == 100] < 0.2
    assert result["n"] == 317
    assert result["grokking"]["memorised_at"] <= 100
    assert 300 <= result["grokking"]["generalised_at"] <= 700
    assert result["grokking"]["severity"] > 0.05


@pytest.mark.parametrize("name", ["llc", "llc_centred"])
def test_llc_rises_peaks_before_generalisation_and_falls(reference_run, name):
    _, result = reference_run
    steps, llc, val = column(result, "step"), column(result, name), column(result, "val_accuracy")
    peak = int(np.argmax(llc))
    assert 0 < peak < len(llc) - 1
    assert val[peak] < 0.5
    assert llc[0] < 0.5 * llc[peak]
    assert llc[-1] <= 0.85 * llc[peak]
    assert np.abs(llc[steps >= 2500] / llc[-1] - 1).max() < 0.05


def test_one_complexification_and_one_simplification(reference_run):
    _, result = reference_run
    rise, fall = result["transitions"]
    assert (rise["kind"], rise["label"]) == ("complexification", "memorisation")
    assert (fall["kind"], fall["label"]) == ("simplification", "generalisation")
    steps, val = column(result, "step"), column(result, "val_accuracy")
    learning = steps[(val > 0.1) & (val < 0.9)]
    assert fall["onset"] <= learning.max()
    assert fall["end"] >= learning.min()
    assert fall["delta_llc"] < -30 * fall["stderr"]


def test_every_snapshot_from_memorisation_on_is_reliable(reference_run):
    _, result = reference_run
    for point in result["trajectory"]:
        if point["step"] >= 200:
            assert point["reliable"], point
            assert point["stderr"] <= 0.02 * point["llc"]
            assert point["llc"] == pytest.approx(point["llc_centred"], rel=0.06)
        if point["step"] <= 50:
            assert point["reasons"] == ["not at a minimum: the loss falls on moving away from the snapshot"]


def test_a_classifier_of_digits_works_with_the_same_line(tmp_path):
    digits = load_digits()
    x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    recorder = groktrace.watch(model, optimizer, train=(x, y), loss="cross_entropy", out=tmp_path / "run", every=50)
    for _ in range(200):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    recorder.close()
    trajectory = groktrace.analyze(tmp_path / "run", draws=30)
    assert [point.step for point in trajectory.points] == [0, 50, 100, 150, 200]
    assert trajectory.points[-1].train_accuracy > 0.95
    assert trajectory.points[-1].val_accuracy is None
    assert all(np.isfinite(trajectory.column("llc")))
    assert 0 < trajectory.points[-1].llc < 32 * 65 + 10 * 33
