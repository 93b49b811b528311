import functools
import time

import pytest
import torch
from torch import nn

from groktrace.run.batch import Batch
from groktrace.run.loss_tensors import reachable_tensors
from groktrace.run.task import make_forward

X, Y = torch.randn(6, 3), torch.randn(6, 2)


class ScaleChanged(nn.Module):
    """A loss with a weight, a buffer, and a part that it does not use."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2))
        self.register_buffer("centre", torch.zeros(2))
        self.idle = nn.Linear(2, 2)

    def forward(self, outputs, targets):
        return ((outputs - self.centre - targets) * self.scale).square().mean()


class Trainer:
    """An object whose method is the loss."""

    def __init__(self, model):
        self.model, self.criterion = model, ScaleChanged()

    def loss(self, outputs, targets):
        return self.criterion(outputs, targets)


def of_closure(model):
    criterion = ScaleChanged()
    return lambda outputs, targets: criterion(outputs, targets)


def of_partial(model):
    return functools.partial(lambda outputs, targets, by: by(outputs, targets), by=ScaleChanged())


def of_default(model):
    return lambda outputs, targets, by=ScaleChanged(): by(outputs, targets)  # noqa: B008


def of_helper(model):
    criterion = ScaleChanged()

    def helper(outputs, targets):
        return criterion(outputs, targets)

    return lambda outputs, targets: helper(outputs, targets)


def of_global(model):
    global everywhere
    everywhere = ScaleChanged()
    return lambda outputs, targets: everywhere(outputs, targets)


def of_callable(model):
    class Callable:
        def __init__(self):
            self.parts = {"first": ScaleChanged()}

        def __call__(self, outputs, targets):
            return self.parts["first"](outputs, targets)

    return Callable()


def found(model, loss, batch_loss=None):
    batch = Batch((X, Y), {"tuple": [0, 1]})
    forward = make_forward(model, loss, batch_loss, batch)
    forward.find_tensors(batch)
    return forward.own


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda model: ScaleChanged(), ["loss.scale", "loss.centre"]),
        (lambda model: ScaleChanged().forward, ["loss.scale", "loss.centre"]),
        (lambda model: torch.compile(ScaleChanged(), backend="eager"), ["loss.scale", "loss.centre"]),
        (of_closure, ["loss.criterion.scale", "loss.criterion.centre"]),
        (of_partial, ["loss.by.scale", "loss.by.centre"]),
        (of_default, ["loss.by.scale", "loss.by.centre"]),
        (of_helper, ["loss.helper.criterion.scale", "loss.helper.criterion.centre"]),
        (of_global, ["loss.everywhere.scale", "loss.everywhere.centre"]),
        (of_callable, ["loss.parts.first.scale", "loss.parts.first.centre"]),
        (lambda model: Trainer(model).loss, ["loss.criterion.scale", "loss.criterion.centre"]),
    ],
    ids=["module", "method", "compiled", "closure", "partial", "default", "helper", "global", "object", "trainer"],
)
def test_tensors_of_a_module_that_the_loss_uses_are_found_wherever_it_hangs(make, names):
    own = found(nn.Linear(3, 2), make(nn.Linear(3, 2)))
    assert [*own.parameters(), *own.buffers()] == names
    assert not own.loose
    assert not own.holds_weights


def test_tensors_that_a_function_holds_by_themselves():
    weights, fixed, unused = torch.ones(2, requires_grad=True), torch.ones(2), torch.ones(2, requires_grad=True)

    def loss(outputs, targets):
        if len(outputs) > 10**6:
            return unused.sum()
        return ((outputs - targets) * weights * fixed).square().mean()

    own = found(nn.Linear(3, 2), loss)
    assert own.parameters().keys() == own.loose.keys() == {"loss.weights"}
    assert own.parameters()["loss.weights"] is weights


def test_the_models_own_tensors_keep_their_names():
    model = nn.Linear(3, 2)
    own = found(model, None, lambda network, batch: (model(batch[0]) - batch[1]).square().mean())
    assert not own.parameters()
    held = list(model.parameters())
    own = found(model, lambda o, t: (o - t).square().mean() + sum(tensor.square().sum() for tensor in held))
    assert not own.parameters()
    assert own.holds_weights
    rows = model.weight.detach()[:1]
    assert found(model, lambda o, t: (o - t).square().mean() + rows.sum()).holds_weights


def test_names_cannot_clash_with_the_models():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.loss = nn.Linear(3, 2)
            self.loss.scale = nn.Parameter(torch.zeros(1))

        def forward(self, x):
            return self.loss(x)

    own = found(Model(), ScaleChanged())
    assert not own.parameters().keys() & dict(Model().named_parameters()).keys()
    assert len(own.parameters()) == 1


def test_constants_of_modules_without_parameters_are_no_weights_unless_the_loss_moves_them():
    class Centred(nn.Module):
        def __init__(self, moves):
            super().__init__()
            self.register_buffer("centre", torch.zeros(2))
            self.moves = moves

        def forward(self, outputs, targets):
            if self.training and self.moves:
                self.centre += outputs.detach().mean(0)
            return (outputs - self.centre - targets).square().mean()

    assert not found(nn.Linear(3, 2), Centred(False)).buffers()
    moving = Centred(True).eval()
    assert list(found(nn.Linear(3, 2), moving).buffers()) == ["loss.centre"]
    assert not moving.centre.any()
    assert not moving.training


def test_a_function_that_holds_itself_is_read_once():
    def loss(outputs, targets):
        return loss

    loss.parts = [loss]
    assert list(reachable_tensors(loss)) == []


def test_weights_in_the_place_of_the_losses_own_are_put_back():
    model, criterion = nn.Linear(3, 2), ScaleChanged()
    batch = Batch((X, Y), {"tuple": [0, 1]})
    for loss in (criterion, lambda o, t: criterion(o, t)):
        forward = make_forward(model, loss, None, batch)
        forward.find_tensors(batch)
        before = criterion.scale
        (name,) = forward.own.parameters()
        value, _ = forward.evaluate({name: torch.zeros(2)}, batch.tensors)
        assert value == 0
        assert criterion.scale is before
        assert torch.equal(forward(*batch.tensors)[0], (model(X) - Y).square().mean())


def test_a_loss_that_holds_a_heap_of_numbers_is_read_in_no_time():
    numbers = [[[float(i + j + k) for k in range(30)] for j in range(100)] for i in range(500)]
    start = time.perf_counter()
    assert list(reachable_tensors(lambda outputs, targets: outputs.sum() * len(numbers))) == []
    assert time.perf_counter() - start < 5
