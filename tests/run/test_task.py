from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional

from groktrace.errors import TaskError
from groktrace.run.batch import Batch
from groktrace.run.task import Task

N = 12


def data(classes=False, n=N):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 4, generator=generator)
    return x, torch.randint(3, (n,), generator=generator) if classes else torch.randn(n, 3, generator=generator)


def network(*layers):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 3), *layers)


def weights_of(model):
    return dict(model.named_parameters()) | dict(model.named_buffers())


def centred(outputs, targets):
    residual = outputs - targets
    return (residual - residual.mean(0)).square().sum() / (2 * len(residual))


@pytest.mark.parametrize(
    ("name", "function", "classes"),
    [("mse", functional.mse_loss, False), ("cross_entropy", functional.cross_entropy, True)],
)
def test_named_losses_are_those_of_torch(name, function, classes):
    model, train = network(), data(classes)
    task = Task.from_model(model, train=train, loss=name, val=(train[0][:5], train[1][:5]))
    loss, outputs = task.forward(weights_of(model), task.train.tensors)
    assert torch.equal(outputs, model(train[0]))
    assert torch.equal(loss, function(model(train[0]), train[1]))
    assert (task.n, len(task.train), len(task.val), task.shift_invariant) == (N, N, 5, False)


def test_the_loss_is_a_function_of_the_given_weights():
    model, train = network(), data()
    task = Task.from_model(model, train=train, loss="mse")
    other = {name: tensor + 1 for name, tensor in weights_of(model).items()}
    loss, _ = task.forward(other, task.train.tensors)
    assert torch.equal(loss, functional.mse_loss(torch.func.functional_call(model, other, train[0]), train[1]))
    assert task.val is None


def test_large_sets_are_cut_and_n_stays_true():
    train = data(n=8200)
    task = Task.from_model(network(), train=train, loss="mse", seed=1)
    assert (task.n, len(task.train)) == (8200, 8192)


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ({}, "loss: give exactly one of loss=f"),
        ({"loss": "mse", "batch_loss": lambda model, batch: 0}, "loss: give exactly one of loss=f"),
        ({"loss": "l1"}, "loss: expected a function or one of cross_entropy, mse, got 'l1'"),
        ({"loss": 3}, "loss: expected a function, got int"),
        ({"batch_loss": "mse"}, "loss: expected a function, got str"),
        ({"loss": lambda y, t: (y - t).square()}, r"loss: expected one number, .* got a tensor of shape \(2, 3\)"),
        ({"loss": lambda y, t: 0.5}, "loss: expected one number, the mean over the batch, got float"),
        ({"loss": lambda y, t: (y > t).sum()}, r"loss: expected one number, .* got a tensor of shape \(\)"),
        (
            {"batch_loss": lambda model, batch: model(batch[0])},
            r"expected one number, .* got a tensor of shape \(2, 3\)",
        ),
        ({"loss": "cross_entropy"}, "fail on the training data .*check that train has the form"),
        ({"loss": lambda y: y.mean()}, r"fail on the training data \(TypeError: .*takes 1 positional"),
        ({"batch_loss": lambda model, batch: batch["x"]}, r"fail on the training data \(TypeError: "),
    ],
)
def test_losses_that_do_not_fit_are_named(losses, message):
    train = data()[0], torch.randint(3, (N, 3))
    if "loss" in losses and losses["loss"] != "cross_entropy":
        train = data()
    with pytest.raises(TaskError, match=message):
        Task.from_model(network(), train=train, **losses)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"x": data()[0]}, r"train: with loss=f\(outputs, targets\) expected a pair \(inputs, targets\)"),
        (data()[0], r"expected a pair \(inputs, targets\)"),
        ((*data(), data()[0]), r"expected a pair \(inputs, targets\)"),
        ((data()[0][:, :3], data()[1]), r"model and loss fail on the training data \(RuntimeError: .*shapes"),
        ((data()[0], data()[1][:5]), "train: inputs and targets must have equally many samples"),
    ],
)
def test_training_data_that_do_not_fit_are_named(train, message):
    with pytest.raises(TaskError, match=message):
        Task.from_model(network(), train=train, loss="mse")


@pytest.mark.parametrize("val", [data()[0], list(data()), {"x": data()[0], "y": data()[1]}, (data(), data()[1])])
def test_validation_data_nest_as_training_data_do(val):
    with pytest.raises(TaskError, match="val: expected the same nesting of tensors as train"):
        Task.from_model(network(), train=data(), loss="mse", val=val)


def test_validation_data_are_checked_like_training_data():
    with pytest.raises(TaskError, match="val: expected at least one sample, got an empty set"):
        Task.from_model(network(), train=data(), loss="mse", val=(data()[0][:0], data()[1][:0]))


def test_flags_gradients_and_buffers_stay_as_they_are():
    model = network(nn.BatchNorm1d(3), nn.Dropout(0.5))
    model[1].eval()
    flags = [module.training for module in model.modules()]
    weights = {name: tensor.detach().clone() for name, tensor in weights_of(model).items()}
    state = torch.get_rng_state()
    task = Task.from_model(model, train=data(), loss="mse")
    first = task.forward(weights, task.train.tensors)[0]
    assert torch.equal(task.forward(weights, task.train.tensors)[0], first)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(weights[name], tensor) for name, tensor in weights_of(model).items())
    assert all(parameter.grad is None for parameter in model.parameters())
    model.eval()
    assert torch.equal(first, functional.mse_loss(model(data()[0]), data()[1]))


def test_flags_are_put_back_when_the_model_fails():
    model = network()
    with pytest.raises(TaskError, match="model and loss fail on the training data"):
        Task.from_model(model, train=(torch.randn(N, 5), data()[1]), loss="mse")
    assert model.training
    task = Task.from_model(model, train=data(), loss="mse")
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        task.forward(weights_of(model), (torch.randn(N, 5), data()[1]))
    assert model.training


@pytest.mark.parametrize("loss", ["mse", centred])
def test_stacked_weights_give_what_a_loop_gives(loss):
    model = network(nn.Tanh(), nn.BatchNorm1d(3), nn.Dropout(0.5)).double()
    x, y = (tensor.double() for tensor in data())
    task = Task.from_model(model, train=(x, y), loss=loss)
    noise = torch.Generator().manual_seed(1)
    stacked = {
        name: torch.stack([w + 0.1 * torch.randn(w.shape, generator=noise) for _ in range(5)])
        for name, w in weights_of(model).items()
        if w.is_floating_point()
    }
    stacked = {name: tensor.detach().abs() for name, tensor in stacked.items()}
    losses, outputs = torch.func.vmap(task.forward, in_dims=(0, None))(stacked, task.train.tensors)
    for i in range(5):
        one, out = task.forward({name: tensor[i] for name, tensor in stacked.items()}, task.train.tensors)
        torch.testing.assert_close(losses[i], one, rtol=1e-12, atol=0)
        torch.testing.assert_close(outputs[i], out, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3, 1e6])
@pytest.mark.parametrize("output_scale", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (centred, True),
        (lambda y, t: centred(y, t).sqrt(), True),
        (lambda y, t: (y - t - (y - t).mean(0)).abs().mean(), True),
        ("mse", False),
        (functional.l1_loss, False),
        (functional.huber_loss, False),
        (lambda y, t: (y - t - (y - t).mean(1, keepdim=True)).square().mean(), False),
    ],
)
def test_losses_that_ignore_an_offset_are_recognised(loss, expected, scale, output_scale):
    model = network()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(output_scale)
    x, y = data()
    assert Task.from_model(model, train=(x, scale * y), loss=loss).shift_invariant is expected


def test_a_converged_fit_still_sees_an_offset():
    x, y = data()
    model = network()
    design = torch.cat([x, torch.ones(N, 1)], 1)
    solution = torch.linalg.lstsq(design, y).solution
    with torch.no_grad():
        model[0].weight.copy_(solution[:4].T)
        model[0].bias.copy_(solution[4])
    assert not Task.from_model(model, train=(x, y), loss="mse").shift_invariant
    assert Task.from_model(model, train=(x, model(x).detach()), loss=centred).shift_invariant


def test_losses_of_classes_see_an_offset():
    assert not Task.from_model(network(), train=data(classes=True), loss="cross_entropy").shift_invariant
    weighted = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]))
    assert not Task.from_model(network(), train=data(classes=True), loss=weighted).shift_invariant


def test_outputs_that_must_stay_in_a_range_are_not_moved_out_of_it():
    x, y = data()
    task = Task.from_model(network(nn.Sigmoid()), train=(x, y.sigmoid()), loss=functional.binary_cross_entropy)
    assert not task.shift_invariant


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_an_offset_is_recognised_in_every_precision(dtype):
    x, y = (tensor.to(dtype) for tensor in data())
    assert Task.from_model(network().to(dtype), train=(x, y), loss=centred).shift_invariant
    assert not Task.from_model(network().to(dtype), train=(x, y), loss="mse").shift_invariant


@pytest.mark.parametrize("shape", [(1, 3), (N, 3, 1)])
def test_other_outputs_are_not_asked_for_an_offset(shape):
    x, y = torch.randn(shape[0], 4), torch.randn(shape)
    model = network() if len(shape) == 2 else network(nn.Unflatten(1, (3, 1)))
    assert not Task.from_model(model, train=(x, y), loss=centred).shift_invariant


class Wrapped(nn.Module):
    """Takes its inputs in the given way, and answers as transformers do."""

    def __init__(self, answer):
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.answer = answer

    def forward(self, ids, mask):
        return self.answer(self.linear(ids * mask))


@pytest.mark.parametrize("keywords", [True, False])
@pytest.mark.parametrize("answer", [lambda outputs: outputs, lambda outputs: SimpleNamespace(logits=outputs)])
def test_models_of_several_inputs(answer, keywords):
    model, (x, y) = Wrapped(answer), data(classes=True)
    mask = torch.randint(2, x.shape)
    inputs = {"mask": mask, "ids": x} if keywords else (x, mask)
    task = Task.from_model(model, train=(inputs, y), loss="cross_entropy", val=(inputs, y))
    loss, outputs = task.forward(weights_of(model), task.train.tensors)
    assert torch.equal(outputs, model.linear(x * mask))
    assert torch.equal(loss, functional.cross_entropy(outputs, y))


def test_outputs_that_are_no_tensor_stay_with_the_loss():
    model = Wrapped(lambda outputs: (outputs, outputs))
    x, y = data()
    task = Task.from_model(model, train=((x, x), y), loss=lambda outputs, t: functional.mse_loss(outputs[1], t))
    loss, outputs = task.forward(weights_of(model), task.train.tensors)
    assert outputs is None
    assert torch.equal(loss, functional.mse_loss(model.linear(x * x), y))
    assert not task.shift_invariant


def test_models_that_compute_their_own_loss():
    model, (x, y) = network(), data()
    task = Task.from_model(
        model, train={"x": x, "y": y}, batch_loss=lambda m, batch: functional.mse_loss(m(batch["x"]), batch["y"])
    )
    loss, outputs = task.forward(weights_of(model), task.train.tensors)
    assert outputs is None
    assert torch.equal(loss, functional.mse_loss(model(x), y))
    assert not task.shift_invariant


def test_a_task_without_data_takes_those_it_is_given():
    model, (x, y) = network(), data()
    bare = Task.from_model(model, loss="mse")
    assert (bare.train, bare.val, bare.n) == (None, None, 0)
    own = Task.from_model(model, train=(x, y), loss="mse", val=(x[:3], y[:3]))
    bound = bare.with_data(own.train, own.val, 1000)
    assert (bound.n, bound.train, bound.val, bound.shift_invariant) == (1000, own.train, own.val, own.shift_invariant)
    given, wanted = (task.forward(weights_of(model), own.train.tensors)[0] for task in (bound, own))
    assert torch.equal(given, wanted)
    assert own.with_data(own.val, None, 3) is own
    with pytest.raises(TaskError, match="the task has no data of its own"):
        bare.forward(weights_of(model), (x, y))
    with pytest.raises(TaskError, match="val: of no use without train"):
        Task.from_model(model, loss="mse", val=(x, y))
    with pytest.raises(TaskError, match="expected a function or one of cross_entropy, mse, got 'hinge'"):
        Task.from_model(model, loss="hinge")
    with pytest.raises(TaskError, match="model and loss fail on the training data"):
        bare.with_data(Batch((torch.ones(2, 9), torch.ones(2, 9)), {"tuple": [0, 1]}), None, 2)


def test_sequences_of_classes_are_told_their_loss():
    words = torch.randint(0, 5, (6, 4))
    with pytest.raises(TaskError, match=r"with classes on the last axis give loss=lambda o, t: cross_entropy"):
        Task.from_model(nn.Embedding(5, 5), train=(words, words), loss="cross_entropy")
