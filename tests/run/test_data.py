"""Samples in a file of their own, and how they are held against those of a run."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch.utils.data import DataLoader, TensorDataset

import groktrace
from groktrace.errors import GroktraceError, RunError, SettingsError, TaskError
from groktrace.run.batch import Batch, flatten
from groktrace.run.data import read_data, take_data

X, Y = torch.arange(12.0).view(6, 2), torch.arange(6)
RECORDED = Batch((torch.zeros(3, 2), torch.zeros(3, dtype=torch.long)), {"tuple": [0, 1]})


@pytest.mark.parametrize(
    "data",
    [
        (X, Y),
        [X, Y],
        TensorDataset(X, Y),
        DataLoader(TensorDataset(X, Y), batch_size=4),
        [(X[:4], Y[:4]), (X[4:], Y[4:])],
    ],
)
def test_whatever_watch_takes_is_taken_and_kept(data, tmp_path):
    path = tmp_path / "other.safetensors"
    groktrace.save_data(path, data)
    for given_data in (data, path, str(path)):
        batch, n = take_data(given_data, "train", RECORDED)
        assert (n, batch.structure) == (6, RECORDED.structure)
        assert torch.equal(batch.tensors[0], X)
        assert torch.equal(batch.tensors[1], Y)


def test_dicts_are_taken_by_their_keys(tmp_path):
    tensors, structure = flatten({"y": Y, "x": (X, X + 1)})
    recorded = Batch(tuple(tensor[:2] for tensor in tensors), structure)
    batch, _ = take_data({"x": [X, X + 1], "y": Y}, "train", recorded)
    assert [torch.equal(a, b) for a, b in zip(batch.tensors, (Y, X, X + 1), strict=True)] == [True] * 3
    groktrace.save_data(tmp_path / "d", {"x": (X, X + 1), "y": Y})
    assert torch.equal(take_data(tmp_path / "d", "d", recorded)[0].tensors[0], Y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.complex128, torch.bool, torch.float8_e4m3fn])
def test_any_dtype_is_kept(dtype, tmp_path):
    values = X.to(dtype)
    groktrace.save_data(tmp_path / "f", (values, Y))
    tensors, structure, n = read_data(tmp_path / "f")
    assert (tensors[0].dtype, structure, n) == (dtype, {"tuple": [0, 1]}, 6)
    assert torch.equal(tensors[0].to(torch.complex128), values.to(torch.complex128))


def test_large_sets_are_kept_as_a_subset_that_stands_for_all(tmp_path):
    many = torch.arange(9000.0)[:, None]
    groktrace.save_data(tmp_path / "f", (many, many))
    tensors, _, n = read_data(tmp_path / "f")
    assert (len(tensors[0]), n) == (8192, 9000)
    recorded = Batch((many[:1], many[:1]), {"tuple": [0, 1]})
    assert take_data(tmp_path / "f", "f", recorded)[1] == 9000
    assert take_data((many, many), "train", recorded, 10**6)[1] == 10**6
    with pytest.raises(SettingsError, match="n: expected a whole number of at least 8192, as many as there are, got 9"):
        take_data(tmp_path / "f", "f", recorded, 9)
    groktrace.save_data(tmp_path / "g", (X, Y), n=50)
    assert read_data(tmp_path / "g")[2] == 50
    with pytest.raises(SettingsError, match="n: expected a whole number of at least 6, as many as there are, got 5"):
        groktrace.save_data(tmp_path / "h", (X, Y), n=5)
    assert not (tmp_path / "h").exists()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ((X.double(), Y), r"train: tensor 0 is float64\[samples, 2\], but that of the .* is float32\[samples, 2\]"),
        ((X, Y.int()), r"train: tensor 1 is int32\[samples\], but that of the recorded .* is int64\[samples\]"),
        ((X[:, :1], Y), r"tensor 0 is float32\[samples, 1\], .* only their number may differ"),
        ((X, Y, Y), r"train: expected samples nested like those recorded, {'tuple': \[0, 1\]}, got"),
        ({"x": X, "y": Y}, "nested like those recorded"),
        (X, "nested like those recorded"),
        ((X, Y[:3]), "inputs and targets must have equally many samples"),
        ((X[:0], Y[:0]), "expected at least one sample"),
        (5, "train: expected .* got int"),
    ],
)
def test_samples_of_another_form_are_refused(data, said):
    with pytest.raises(TaskError, match=said):
        take_data(data, "train", RECORDED)


def test_a_runs_own_file_is_one_too(small_run):
    run = groktrace.open_run(small_run)
    batch, n = take_data(small_run / "data.safetensors", "data", run.data.train)
    assert (n, batch.structure) == (60, run.data.train.structure)
    assert all(torch.equal(a, b) for a, b in zip(batch.tensors, run.data.train.tensors, strict=True))
    with pytest.raises(TaskError, match="data: expected 1 tensors, as recorded, got 2"):
        take_data(small_run / "data.safetensors", "data", Batch((X,), 0))
    with pytest.raises(TaskError, match=r"does not say how its tensors nest; write it with groktrace\.save_data"):
        take_data(small_run / "data.safetensors", "data", None)


def test_other_files_are_refused_with_what_to_do(tmp_path):
    advice = r"Expected a file that groktrace.save_data\(path, data\) wrote"
    with pytest.raises(RunError, match=f"none: cannot be read .*{advice}"):
        read_data(tmp_path / "none")
    save_file({"train.0": X}, tmp_path / "plain")
    with pytest.raises(RunError, match=f"plain: holds no digests.*{advice}"):
        read_data(tmp_path / "plain")
    with pytest.raises(SettingsError, match="cannot be written"):
        groktrace.save_data(tmp_path / "no" / "folder", (X, Y))
    with pytest.raises(SettingsError, match="cannot be stored; convert them"):
        groktrace.save_data(tmp_path / "f", (torch.ones(6, dtype=torch.float8_e8m0fnu), Y))


@settings(deadline=None, max_examples=60)
@given(st.binary(max_size=40), st.integers(0, 600), st.integers(0, 40))
def test_damaged_files_are_refused_or_make_no_difference(tmp_path_factory, junk, at, cut):
    path = tmp_path_factory.mktemp("junk") / "f"
    groktrace.save_data(path, (X, Y))
    whole = path.read_bytes()
    path.write_bytes(whole[:at] + junk + whole[at + cut :])
    try:
        tensors, structure, n = read_data(path)
    except GroktraceError:
        return
    assert torch.equal(tensors[0], X)
    assert (json.dumps(structure), n) == ('{"tuple": [0, 1]}', 6)
