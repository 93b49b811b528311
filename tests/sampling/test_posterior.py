import pytest
import torch
from torch import nn
from torch.nn import functional

from groktrace.run.task import Task
from groktrace.sampling.posterior import StackedLoss, WeightLayout


@pytest.fixture
def classifier():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Dropout(0.5), nn.Linear(7, 3))
    x, y = torch.randn(20, 5), torch.randint(0, 3, (20,))
    task = Task.from_model(model, loss="cross_entropy", train=(x, y))
    layout = WeightLayout(*zip(*[(name, tuple(p.shape)) for name, p in model.named_parameters()], strict=True))
    rows = [{name: p + 0.1 * torch.randn_like(p) for name, p in model.named_parameters()} for _ in range(3)]
    buffers = {name: torch.stack([b] * 3) for name, b in model.named_buffers()}
    buffers["1.running_mean"] = buffers["1.running_mean"] + torch.tensor([[0.0], [1.0], [2.0]])
    return model, task, layout, rows, buffers, (x, y)


def live(model, weights, buffers, row, x, y):
    model.eval()
    named = {**weights, **{name: tensor[row] for name, tensor in buffers.items()}}
    leaves = {name: t.detach().clone().requires_grad_(name in weights) for name, t in named.items()}
    loss = functional.cross_entropy(torch.func.functional_call(model, leaves, (x,)), y)
    gradients = torch.autograd.grad(loss, [leaves[name] for name in weights])
    return loss.detach(), torch.cat([gradient.reshape(-1) for gradient in gradients])


@pytest.mark.parametrize("vectorised", [True, False])
def test_stacked_losses_and_gradients_are_those_of_each_network(classifier, vectorised):
    model, task, layout, rows, buffers, (x, y) = classifier
    loss = StackedLoss(task.forward, layout, (x, y), buffers, vectorised)
    flat = torch.stack([layout.flatten(row) for row in rows])
    losses, gradients = loss.gradients(flat)
    for r in range(3):
        expected, gradient = live(model, rows[r], buffers, r, x, y)
        torch.testing.assert_close(losses[r], expected)
        torch.testing.assert_close(gradients[r], gradient)


@pytest.mark.parametrize("vectorised", [True, False])
def test_minibatches_take_each_rows_own_samples(classifier, vectorised):
    model, task, layout, rows, buffers, (x, y) = classifier
    loss = StackedLoss(task.forward, layout, (x, y), buffers, vectorised)
    index = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7], [19, 18, 0, 0]])
    losses, gradients = loss.gradients(torch.stack([layout.flatten(row) for row in rows]), index)
    for r in range(3):
        expected, gradient = live(model, rows[r], buffers, r, x[index[r]], y[index[r]])
        torch.testing.assert_close(losses[r], expected)
        torch.testing.assert_close(gradients[r], gradient)


def test_networks_that_cannot_be_stacked_go_row_by_row():
    layout = WeightLayout(("w",), ((2,),))

    def forward(weights, tensors):
        scale = 2.0 if weights["w"].sum().item() > 0 else 1.0
        return scale * weights["w"].square().sum(), None

    loss = StackedLoss(forward, layout, (torch.ones(1),), {}).probe(torch.ones(1, 2))
    assert not loss.vectorised
    losses, gradients = loss.gradients(torch.tensor([[1.0, 1.0], [-1.0, -1.0]]))
    torch.testing.assert_close(losses, torch.tensor([4.0, 2.0]))
    torch.testing.assert_close(gradients, torch.tensor([[4.0, 4.0], [-2.0, -2.0]]))


def test_flat_vectors_are_float32_unless_double():
    layout = WeightLayout(("a", "b"), ((2, 3), ()))
    weights = {"a": torch.arange(6.0).view(2, 3).bfloat16(), "b": torch.tensor(7.0)}
    flat = layout.flatten(weights)
    assert flat.dtype == torch.float32
    assert flat.tolist() == [0, 1, 2, 3, 4, 5, 7]
    assert layout.unflatten(flat)["a"].shape == (2, 3)
    assert layout.unflatten(flat)["b"].shape == ()
    assert layout.size == 7
    assert layout.flatten({"a": weights["a"], "b": weights["b"].double()}).dtype == torch.float64
