import json
import random

import numpy as np
import pytest
import torch
from torch import nn

from groktrace.errors import TaskError
from groktrace.recording.prepare import prepare_task
from groktrace.recording.watch import watch
from groktrace.run import files, layout
from groktrace.run.store import check_info


def read(root):
    info = json.loads((root / layout.RUN_FILE).read_text())
    check_info(info, root)
    return {name: value for name, value in info.items() if name != files.DIGEST_KEY}


def test_what_is_written_at_the_start(make_training, tmp_path):
    training = make_training(torch.optim.AdamW, betas=(0.9, 0.98), lr=torch.tensor(0.5))
    val = (training.x[:2], training.y[:2])
    watch(training.model, training.optimizer, **training.data, val=val, out=tmp_path / "run", seed=3).close()
    info = read(tmp_path / "run")
    assert (info["format"], info["n"], info["seed"], info["task"]) == (layout.FORMAT_VERSION, 6, 3, None)
    assert info["torch"] == torch.__version__
    assert info["weights"]["0.weight"] == {"shape": [4, 3], "dtype": "float32", "trainable": True}
    assert info["schedule"] == {"kind": "every", "every": 100}
    assert info["optimizer"]["name"] == "AdamW"
    (group,) = info["optimizer"]["groups"]
    assert (group["betas"], group["lr"]) == ([0.9, 0.98], 0.5)
    assert "params" not in group
    nesting = {"tuple": [0, 1]}
    assert info["data"]["train"] == {"structure": nesting, "samples": 6, "stored": 6}
    assert info["data"]["val"] == {"structure": nesting, "samples": 2, "stored": 2}
    tensors, _ = files.read_tensors(tmp_path / "run" / layout.DATA_FILE)
    assert tensors.keys() == {"train.0", "train.1", "val.0", "val.1", "constant.offset"}
    assert torch.equal(tensors["train.1"], training.y)
    program = files.read_json(tmp_path / "run" / layout.PROGRAM_FILE)
    assert program == {"nodes": [], "offset_free": False}


def test_weights_alone(training, tmp_path):
    watch(training.model, out=tmp_path / "run").close()
    info = read(tmp_path / "run")
    assert info["n"] is info["data"] is info["optimizer"] is None
    names = {entry.name for entry in (tmp_path / "run").iterdir()}
    assert names == {layout.RUN_FILE, layout.LOCK_FILE, layout.WEIGHTS_FOLDER}


def test_large_sets_are_represented_by_a_subset():
    x, model = torch.randn(10_000, 1), nn.Linear(1, 1)
    evaluation = prepare_task(model, (x, x), None, "mse", None, 0)
    assert evaluation.data["train"]["samples"] == evaluation.n == 10_000
    assert evaluation.data["train"]["stored"] == len(evaluation.tensors["train.0"]) < 10_000


def test_awkward_data_can_be_written(tmp_path):
    x = torch.randn(2, 5).t()
    assert not x.is_contiguous()
    evaluation = prepare_task(nn.Linear(2, 2), (x, x), None, "mse", None, 0)
    files.write_tensors(tmp_path / "d", evaluation.tensors, {})
    assert torch.equal(files.read_tensors(tmp_path / "d")[0]["train.1"], x)


def test_shift_invariant_losses_are_recognised_and_odd_ones_tolerated():
    x, y = torch.randn(6, 2), torch.tensor([0, 1, 1, 0, 1, 0])
    model = nn.Linear(2, 2)

    def singles_only(outputs, targets):
        assert outputs.dtype == torch.float32
        return nn.functional.cross_entropy(outputs, targets)

    assert not prepare_task(model, (x, y), None, singles_only, None, 0).program["offset_free"]
    mse = prepare_task(model, (x, x), None, "mse", None, 0)
    assert not mse.program["offset_free"]


def test_models_with_their_own_loss():
    def batch_loss(model, batch):
        return (model(batch["x"]) - batch["y"]).square().mean()

    batch = {"x": torch.randn(4, 2), "y": torch.randn(4, 1)}
    evaluation = prepare_task(nn.Linear(2, 1), batch, None, None, batch_loss, 0)
    assert evaluation.data["train"]["structure"] == {"dict": {"x": 0, "y": 1}}
    assert evaluation.program["offset_free"] is False


def test_data_sets_that_draw_random_numbers_leave_the_generators_alone():
    class Noisy(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, i):
            return torch.rand(2) + random.random() + np.random.rand(), torch.rand(1)

    model = nn.Linear(2, 1)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    prepare_task(model, Noisy(), None, "mse", None, 0)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert (states[2] == np.random.get_state()[1]).all()


def test_buffers_that_a_model_changes_are_put_back():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2, 2))
            self.register_buffer("calls", torch.tensor(0))

        def forward(self, x):
            self.calls += 1
            return x @ self.weight

    model, x = Counting(), torch.randn(3, 2)
    prepare_task(model, (x, x), None, "mse", None, 0)
    assert model.calls == 0


def test_what_the_user_ought_to_know_of_the_data_is_told(tmp_path):
    class Noisy(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, i):
            return torch.rand(2), torch.rand(1)

    model = nn.Linear(2, 1)
    with pytest.warns(RuntimeWarning, match="groktrace: train: the samples are drawn at random each time that they"):
        watch(model, train=Noisy(), loss="mse", out=tmp_path / "run").close()
    with pytest.warns(RuntimeWarning, match="groktrace: val: the samples are drawn at random"):
        watch(
            model, train=(torch.rand(4, 2), torch.rand(4, 1)), val=Noisy(), loss="mse", out=tmp_path / "other"
        ).close()


def test_only_what_the_sampler_draws_is_recorded(tmp_path):
    x, model = torch.arange(20.0).reshape(20, 1), nn.Linear(1, 1)
    dataset = torch.utils.data.TensorDataset(x, x)
    parts = [torch.utils.data.SubsetRandomSampler(part) for part in (range(5, 15), [3])]
    train, val = (torch.utils.data.DataLoader(dataset, batch_size=4, sampler=part) for part in parts)
    watch(model, train=train, val=val, loss="mse", out=tmp_path / "run").close()
    info = read(tmp_path / "run")
    assert (info["n"], info["data"]["val"]["samples"]) == (10, 1)
    tensors, _ = files.read_tensors(tmp_path / "run" / layout.DATA_FILE)
    assert torch.equal(tensors["train.0"], x[5:15])
    assert torch.equal(tensors["val.0"], x[3:4])


def test_a_summed_loss_is_refused():
    x = torch.randn(6, 2)
    with pytest.raises(TaskError, match="loss: expected a mean over the samples"):
        prepare_task(nn.Linear(2, 2), (x, x), None, nn.MSELoss(reduction="sum"), None, 0)


def test_validation_data_that_the_model_cannot_take_are_named():
    x = torch.randn(6, 2)
    with pytest.raises(TaskError, match="model and loss fail on the validation data"):
        prepare_task(nn.Linear(2, 2), (x, x), (x[:1, :1], x[:1]), "mse", None, 0)


def test_views_are_recorded_as_any_other_data(tmp_path):
    wide = torch.randn(3, 8)
    views = wide[:2].T, wide[2:].expand(2, 8).T
    evaluation = prepare_task(nn.Linear(2, 2), views, views, "mse", None, 0)
    assert all(tensor.is_contiguous() for tensor in evaluation.tensors.values())
    assert torch.equal(evaluation.tensors["train.1"], views[1])
