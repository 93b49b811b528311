"""A task that differs from the recording is noticed, and one that does not is not."""

import pytest
import torch
from torch import nn
from torch.nn import functional

import groktrace
from groktrace.analysis.results.task_differences import reminders
from groktrace.analysis.running.setup import run_layout


def network():
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def said_of(run, **given):
    opened = groktrace.open_run(run)
    model = given.pop("model", network())
    given = {"loss": "cross_entropy"} | given
    task = groktrace.Task.from_model(model, **given)
    return reminders(opened, task, run_layout(opened, None), opened.snapshots[0].load())


@pytest.fixture
def samples(recorded):
    return groktrace.open_run(recorded).task.train.nested()


def test_the_same_samples_in_whatever_form_are_no_others(recorded, samples):
    x, y = samples
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    val = (x[:9], y[:9])
    for given in (
        {},
        {"train": (x, y)},
        {"train": (x[order], y[order]), "val": (val[0].flip(0), val[1].flip(0))},
        {"train": torch.utils.data.TensorDataset(x, y)},
        {
            "train": (x.double(), y.int()),
            "model": network().double(),
            "loss": lambda o, t: functional.cross_entropy(o, t.long()),
        },
        {
            "train": {"y": y, "x": x},
            "loss": None,
            "batch_loss": lambda m, b: functional.cross_entropy(m(b["x"]), b["y"]),
        },
    ):
        assert said_of(recorded, **given) == [], given.keys()


def others(x, y):
    repeated = torch.arange(60).clamp_max(58)
    changed = x.clone()
    changed[7, 2] += 1e-3
    return {
        r"40 training samples, not 60": {"train": (x[:40], y[:40])},
        r"as many training samples, but with other values": {"train": (changed, y)},
        r"but with other values\)": {"train": (x[repeated], y[repeated])},
        r"with other values\); the task's are used": {"train": (x, y.roll(1))},
        r"validation samples: 9 others than the 9 recorded": {"train": (x, y), "val": (x[10:19], y[10:19])},
    }


@pytest.mark.parametrize("number", range(5))
def test_other_samples_are_named(recorded, samples, number):
    message, given = list(others(*samples).items())[number]
    (found,) = said_of(recorded, **given)
    assert found.startswith("the task's data are others than those recorded (")
    with pytest.raises(ValueError, match=message):
        raise ValueError(found)


@pytest.mark.parametrize(
    ("given", "same"),
    [
        ({}, True),
        ({"loss": lambda o, t: functional.nll_loss(o.log_softmax(1), t)}, True),
        ({"loss": lambda o, t: functional.cross_entropy(o, t, label_smoothing=0.01)}, False),
        ({"loss": lambda o, t: 2 * functional.cross_entropy(o, t)}, False),
        ({"model": nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))}, False),
        ({"model": nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3), nn.Dropout(0.5))}, True),
    ],
)
@pytest.mark.parametrize("own_data", [False, True])
def test_another_loss_on_the_recorded_samples_is_named(recorded, samples, given, same, own_data):
    found = said_of(recorded, **given, **({"train": samples} if own_data else {}))
    if same:
        assert found == []
    else:
        assert found[0].startswith("the task's loss is another than that recorded (loss of 60 samples at the first")


def test_where_nothing_was_recorded_nothing_is_compared(tmp_path):
    model = network()
    groktrace.watch(model, out=tmp_path / "run").close()
    assert said_of(tmp_path / "run", train=(torch.randn(5, 4), torch.zeros(5).long())) == []
