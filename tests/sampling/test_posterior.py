import pytest
import torch
from torch import nn
from torch.nn import functional

from groktrace.run.task import Task
from groktrace.sampling.posterior import StackedLoss
from groktrace.sampling.products import FixedProduct
from groktrace.sampling.weights import WeightLayout


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


@pytest.mark.parametrize("index", [None, torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7], [19, 18, 0, 0]])])
def test_a_probed_loss_repeats_recorded_operations_to_the_same_bits(classifier, index):
    _, task, layout, rows, buffers, (x, y) = classifier
    plain = StackedLoss(task.forward, layout, (x, y), buffers)
    flat = torch.stack([layout.flatten(row) for row in rows])
    probed = plain.probe(flat[:1])
    assert (probed.vectorised, probed.is_sample_mean) == (True, True)
    for weights in (flat, 0.5 * flat):
        expected = plain.gradients(weights, index)
        found = probed.gradients(weights, index)
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    (plan,) = probed.plans.values()
    assert plan is not None
    # Other rows of as many networks share the plan; their buffers are arguments of it.
    order = torch.tensor([2, 0, 1])
    swapped = None if index is None else index[order]
    found, expected = probed.select(order).gradients(flat[order], swapped), plain.gradients(flat, index)
    torch.testing.assert_close(found[1], expected[1][order])
    assert len(probed.plans) == 1


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="products are dense without MKL")
@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("levels", [40, 4])
def test_samples_that_are_mostly_zeros_give_the_same_gradients(linear, levels):
    torch.manual_seed(0)
    x = functional.one_hot(torch.randint(levels, (100, 2)), levels).flatten(1).float()
    y, width = torch.randn(100, 3), 400
    layout = WeightLayout(("a", "b"), ((width, 2 * levels) if linear else (2 * levels, width), (width, 3)))

    def forward(weights, tensors):
        hidden = functional.linear(tensors[0], weights["a"]) if linear else tensors[0] @ weights["a"]
        return (hidden.tanh() @ weights["b"] - tensors[1]).square().mean(), None

    flat = torch.randn(3, layout.size)
    plain = StackedLoss(forward, layout, (x, y), {})
    loss = plain.probe(flat[:1])
    for weights in (flat, 0.5 * flat):
        for found, expected in zip(loss.gradients(weights), plain._differentiate(weights), strict=True):
            torch.testing.assert_close(found, expected)
    (plan,) = loss.plans.values()
    without_zeros = [call for call in plan._calls if isinstance(call[0], FixedProduct)]
    assert len(without_zeros) == (2 if levels == 40 else 0)


def test_gradients_survive_the_next_call(classifier):
    _, task, layout, rows, buffers, (x, y) = classifier
    flat = torch.stack([layout.flatten(row) for row in rows])
    loss = StackedLoss(task.forward, layout, (x, y), buffers).probe(flat[:1])
    losses, gradients = loss.gradients(flat)
    kept = losses.clone(), gradients.clone()
    loss.gradients(2 * flat)
    assert torch.equal(losses, kept[0])
    assert torch.equal(gradients, kept[1])


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("batches", [True, False])
def test_a_bound_loss_follows_its_tensors(classifier, recorded, batches):
    _, task, layout, rows, buffers, (x, y) = classifier
    plain = StackedLoss(task.forward, layout, (x, y), buffers)
    flat = torch.stack([layout.flatten(row) for row in rows]).detach()
    loss = plain.probe(flat[:1]) if recorded else plain
    weights, index = flat.clone(), torch.zeros(3, 4, dtype=torch.long) if batches else None
    gradients, control = torch.empty_like(flat), torch.empty_like(flat)
    here, there = loss.bound(weights, gradients, index), loss.bound(flat, control, index)
    for seed in (0, 1):
        torch.manual_seed(seed)
        torch.add(flat, torch.randn_like(flat), alpha=0.1, out=weights)
        if batches:
            index.copy_(torch.randint(20, (3, 4)))
        losses, base = here(), there()
        for found, at in (((losses, gradients), weights), ((base, control), flat)):
            torch.testing.assert_close(found, plain._differentiate(at, index))
    assert len(loss.plans) == recorded


def test_a_loss_that_cannot_be_recorded_is_differentiated_each_time():
    layout = WeightLayout(("w",), ((2,),))

    def forward(weights, tensors):
        scratch = torch.zeros_like(weights["w"])
        scratch.copy_(weights["w"])  # writes in place
        return (scratch * weights["w"]).sum(), None

    loss = StackedLoss(forward, layout, (torch.ones(1),), {}).probe(torch.ones(1, 2))
    _, gradients = loss.gradients(torch.tensor([[1.0, 3.0], [-1.0, 0.5]]))
    torch.testing.assert_close(gradients, torch.tensor([[2.0, 6.0], [-2.0, 1.0]]))
    assert list(loss.plans.values()) == [None]


def test_single_samples_of_a_loss_that_is_a_mean_over_samples(classifier):
    model, task, layout, rows, buffers, (x, y) = classifier
    flat = torch.stack([layout.flatten(row) for row in rows])
    loss = StackedLoss(task.forward, layout, (x, y), buffers)
    singles = loss.sample_losses(flat)
    assert singles.shape == (3, 20)
    assert torch.equal(loss.sample_losses(flat, 3), singles[:, [0, 9, 19]])
    for sample in (0, 19):
        expected, _ = live(model, rows[1], buffers, 1, x[sample : sample + 1], y[sample : sample + 1])
        torch.testing.assert_close(singles[1, sample], expected)


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


def test_what_cannot_be_repeated_in_place_is_differentiated_anew():
    """The gradient of the real and the imaginary part side by side lies in memory that elements share."""
    torch.manual_seed(0)
    x = torch.randn(40, 5)

    def forward(weights, tensors):
        outputs = tensors[0].to(torch.complex64) @ weights["w"].T
        outputs = torch.cat([outputs.real, outputs.imag], 1)
        return outputs.square().mean(), outputs

    layout = WeightLayout(("w",), ((3, 5),), ("w",))
    flat = torch.randn(2, 30)
    loss = StackedLoss(forward, layout, (x,), {}).probe(flat[:1])
    _, gradients = loss.gradients(flat)
    again = flat.clone().requires_grad_()
    weights = [torch.view_as_complex(row.view(3, 5, 2)) for row in again]
    sum(forward({"w": w}, (x,))[0] for w in weights).backward()
    torch.testing.assert_close(gradients, again.grad)


@pytest.mark.parametrize("vectorised", [True, False])
def test_gradients_of_complex_weights_are_those_of_the_pairs(vectorised):
    torch.manual_seed(0)
    x, y = torch.randn(12, 6), torch.randn(12, 6)
    shape = (4,)

    def forward(weights, tensors):
        outputs = torch.fft.irfft(torch.fft.rfft(tensors[0]) * weights["w"] * weights["w"].conj().exp(), n=6)
        return (outputs + weights["b"] - tensors[1]).square().mean(), outputs

    layout = WeightLayout(("b", "w"), ((1,), shape), ("w",))
    rows = [{"b": torch.randn(1), "w": torch.randn(shape, dtype=torch.complex64)} for _ in range(3)]
    loss = StackedLoss(forward, layout, (x, y), {}, vectorised)
    flat = torch.stack([layout.flatten(row) for row in rows])
    probed = loss.probe(flat[:1])
    losses, gradients = (probed if vectorised else loss).gradients(flat)
    for r, row in enumerate(rows):
        pairs = torch.view_as_real(row["w"]).clone().requires_grad_()
        bias = row["b"].clone().requires_grad_()
        expected = forward({"b": bias, "w": torch.view_as_complex(pairs)}, (x, y))[0]
        torch.testing.assert_close(losses[r], expected.detach())
        found = torch.autograd.grad(expected, [bias, pairs])
        torch.testing.assert_close(gradients[r], torch.cat([each.flatten() for each in found]))
    direction = torch.randn_like(flat)
    exact = loss.hessian_products(flat, direction)
    near = (loss.gradients(flat + 1e-3 * direction)[1] - loss.gradients(flat - 1e-3 * direction)[1]) / 2e-3
    torch.testing.assert_close(exact, near, rtol=1e-2, atol=1e-2)
