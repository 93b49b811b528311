"""What results depend on: a difference is seen, and what is no difference is not."""

import dataclasses
import shutil

import pytest
import torch
from torch import nn
from torch.nn import functional

import groktrace
from groktrace.analysis.results.identity import identify, measure_behaviour, noise_key, recorded_digest
from groktrace.analysis.running.setup import run_layout
from groktrace.run.files import write_json


def network():
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def key_of(run, task):
    opened = groktrace.open_run(run)
    weights = opened.snapshots[0].load()
    return identify(opened, task, task or opened.task, run_layout(opened, None), weights).key


def task_with(run, loss="cross_entropy", **changes):
    """The recorded task with something changed, as a user would make it."""
    recorded = groktrace.open_run(run).task
    train, val = recorded.train.nested(), recorded.val.nested()
    given = {"train": train, "val": val, "loss": loss} | changes
    return groktrace.Task.from_model(given.pop("model", network()), **given)


def smoothed(outputs, targets):
    return functional.cross_entropy(outputs, targets, label_smoothing=0.1)


def decayed(model, batch):
    return functional.cross_entropy(model(batch[0]), batch[1]) + 1e-4 * sum(
        p.square().sum() for p in model.parameters()
    )


def test_the_same_task_made_again_has_the_same_key_whatever_it_is_called(recorded):
    assert key_of(recorded, task_with(recorded)) == key_of(recorded, task_with(recorded))
    other = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))  # its own weights are not looked at
    assert key_of(recorded, task_with(recorded, model=other)) == key_of(recorded, task_with(recorded))


def test_whatever_a_task_is_made_of_shows_in_its_key(recorded):
    (x, y), (xv, yv) = (
        groktrace.open_run(recorded).task.train.nested(),
        groktrace.open_run(recorded).task.val.nested(),
    )
    relu = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    changed = x.clone()
    changed[-1, -1] += 1e-3
    tasks = {
        "recorded": None,
        "plain": task_with(recorded),
        "fewer": task_with(recorded, train=(x[:40], y[:40])),
        "a value": task_with(recorded, train=(changed, y)),
        "labels": task_with(recorded, train=(x, y.roll(1))),
        "no validation": task_with(recorded, val=None),
        "validation": task_with(recorded, val=(xv + 1, yv)),
        "smoothed": task_with(recorded, smoothed),
        "decayed": task_with(recorded, None, batch_loss=decayed),
        "model": task_with(recorded, model=relu),
        "n": dataclasses.replace(task_with(recorded), n=61),
    }
    keys = {name: key_of(recorded, task) for name, task in tasks.items()}
    assert len(set(keys.values())) == len(keys), keys


def test_losses_that_agree_at_the_snapshot_are_told_apart(recorded):
    """At zero outputs smoothing leaves the cross-entropy as it is; for small residuals Huber's loss is that of mse."""
    run = groktrace.open_run(recorded)
    recorded_weights = run.snapshots[0].load()
    zero = {name: torch.zeros_like(tensor) for name, tensor in recorded_weights.items()}

    def rounded(weights, **changes):
        return measure_behaviour(task_with(recorded, **changes), run_layout(run, None), weights).rounded()

    assert rounded(zero) != rounded(zero, loss=smoothed)
    x = run.task.train.nested()[0]
    small = {"train": (x, torch.zeros(len(x), 3)), "val": None}
    huber = {"loss": lambda o, t: functional.huber_loss(o, t, delta=3.0), **small}
    half = {"loss": lambda o, t: 0.5 * functional.mse_loss(o, t), **small}
    outputs = network_of(recorded_weights)(x)
    assert functional.huber_loss(outputs, 0 * outputs, delta=3.0) == 0.5 * functional.mse_loss(outputs, 0 * outputs)
    assert rounded(recorded_weights, **huber) != rounded(recorded_weights, **half)


def test_what_is_left_at_a_perfect_fit_is_rounding_and_tells_nothing_apart(recorded):
    run = groktrace.open_run(recorded)
    weights = run.snapshots[0].load()
    x = run.task.train.nested()[0].double()
    y = network_of(weights).double()(x).detach()
    found = []
    for change in (0.0, 1e-15):
        task = groktrace.Task.from_model(network().double(), loss="mse", train=(x, y * (1 + change)))
        found.append(measure_behaviour(task, run_layout(run, None), weights).rounded())
    assert found[0] == found[1]


def network_of(weights):
    model = network()
    model.load_state_dict(weights)
    return model


def test_a_key_depends_neither_on_threads_nor_on_the_order_in_which_batches_are_summed(recorded):
    threads = torch.get_num_threads()
    task = task_with(recorded)
    keys = set()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            keys.add(key_of(recorded, task))
    finally:
        torch.set_num_threads(threads)

    def other_order(weights, tensors):
        index = torch.arange(len(tensors[0])).flip(0)
        return task.forward(weights, tuple(tensor[index] for tensor in tensors))[0], task.forward(weights, tensors)[1]

    keys.add(key_of(recorded, dataclasses.replace(task, forward=other_order)))
    assert len(keys) == 1


class OnlySingle(nn.Module):
    """A network that takes single precision only."""

    def __init__(self):
        super().__init__()
        self.inner = network()

    def forward(self, x):
        assert x.dtype == torch.float32
        return self.inner(x)


class OnlyAll(nn.Module):
    """A network that takes all 60 samples at once only."""

    def forward(self, x):
        return self.inner(x.view(60, 4))

    def __init__(self):
        super().__init__()
        self.inner = network()


@pytest.mark.parametrize("kind", [OnlySingle, OnlyAll])
def test_networks_that_take_one_form_only_have_keys_too(kind):
    x, y = torch.randn(60, 4), torch.randint(0, 3, (60,))
    model = kind()
    weights = {name: tensor.detach() for name, tensor in model.named_parameters()}
    task = groktrace.Task(
        lambda weights, tensors: (
            functional.cross_entropy(torch.func.functional_call(model, weights, tensors[0]), tensors[1]),
            None,
        ),
        groktrace.Task.from_model(network(), loss="cross_entropy", train=(x, y)).train,
        None,
        60,
        False,
    )
    layout = groktrace.sampling.weights.WeightLayout(
        tuple(weights), tuple(tuple(tensor.shape) for tensor in weights.values())
    )
    found = measure_behaviour(task, layout, weights)
    assert found == measure_behaviour(task, layout, weights)
    assert not any(tensor.requires_grad for tensor in weights.values())
    assert found.digits == (4 if kind is OnlySingle else 8)


def test_a_loss_that_is_not_finite_has_a_key(recorded):
    task = task_with(recorded, lambda outputs, targets: outputs.mean() / 0)
    assert key_of(recorded, task) == key_of(recorded, task)


def test_noise_is_keyed_by_what_a_run_holds_and_not_by_where_it_lies(recorded, tmp_path):
    copy = shutil.copytree(recorded, tmp_path / "copy")
    runs = [groktrace.open_run(path) for path in (recorded, copy)]
    assert recorded_digest(runs[0]) == recorded_digest(runs[1])
    keys = []
    for run in runs:
        identity = identify(run, None, run.task, run_layout(run, None), run.snapshots[0].load())
        keys.append([noise_key(identity, snapshot.fingerprint()) for snapshot in run.snapshots])
    assert keys[0] == keys[1]
    assert len(set(keys[0])) == len(keys[0])
    info = runs[1].info
    write_json(copy / "run.json", {**info, "n": 600})
    assert recorded_digest(groktrace.open_run(copy)) != recorded_digest(runs[0])
