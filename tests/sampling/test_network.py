import math
import weakref
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional

from groktrace.run.task import Task
from groktrace.sampling import network as module
from groktrace.sampling.network import LargeNetwork, with_micro_batch
from groktrace.sampling.noise import NormalNoise, normal_like
from groktrace.sampling.posterior import StackedLoss
from groktrace.sampling.weights import WeightLayout


def of_memory(monkeypatch, **changed):
    """Have other things count as large."""
    monkeypatch.setattr(module, "MEMORY", replace(module.MEMORY, **changed))


class Tied(nn.Module):
    """A small language model whose unembedding is its embedding; one buffer, one frozen layer."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.mix = nn.Linear(6, 6)
        self.register_buffer("scale", torch.tensor(0.7))

    def forward(self, tokens):
        x = self.embedding(tokens)
        return functional.linear(torch.tanh(self.mix(self.frozen(x))) * self.scale, self.embedding.weight)


def tied_loss(dtype=torch.float32):
    torch.manual_seed(0)
    model = Tied().to(dtype)
    x, y = torch.randint(11, (10, 4)), torch.randint(11, (10, 4))
    task = Task.from_model(
        model, loss=lambda o, t: functional.cross_entropy(o.flatten(0, 1), t.flatten()), train=(x, y)
    )
    layout = WeightLayout(
        *zip(*[(n, tuple(p.shape)) for n, p in model.named_parameters() if p.requires_grad], strict=True)
    )
    weights = {n: t.detach() for n, t in (dict(model.named_parameters()) | dict(model.named_buffers())).items()}
    return StackedLoss(task.forward, layout, (x, y), {}, vectorised=False), weights


def stacked(loss, weights):
    fixed = {name: t.float()[None] for name, t in weights.items() if name not in loss.layout.names}
    return StackedLoss(loss.forward, loss.layout, loss.tensors, fixed, vectorised=False)


@pytest.mark.parametrize("micro_batch", [1, 3, 10, 50])
@pytest.mark.parametrize("index", [None, torch.tensor([0, 4, 4, 9, 2])])
def test_micro_batches_give_the_loss_and_gradient_of_the_whole(micro_batch, index):
    loss, weights = tied_loss()
    flat = loss.layout.flatten(weights)
    moved = flat + 0.1
    network = LargeNetwork(replace(loss, micro_batch=micro_batch), weights)
    rows = None if index is None else index[None]
    for at in (None, moved):
        expected = stacked(loss, weights).gradients((flat if at is None else at)[None], rows)
        out = torch.ones_like(flat)
        found = network.add_gradient(out, at, index, -2.0)
        assert found == pytest.approx(float(expected[0]), rel=1e-6)
        torch.testing.assert_close(out, 1 - 2 * expected[1][0], rtol=1e-5, atol=1e-6)
    assert network.mean_loss(moved) == pytest.approx(float(stacked(loss, weights).losses(moved[None])), rel=1e-6)


made = []


class KeepsItsOutput(torch.autograd.Function):
    """Saves what it returns, as exp and softmax do; `made` tells whether it is still there."""

    @staticmethod
    def forward(ctx, x):
        out = x.exp()
        ctx.save_for_backward(out)
        made.append(weakref.ref(out))
        return out


def test_a_look_at_the_activations_keeps_none_of_them(monkeypatch):
    of_memory(monkeypatch, large_weights=1)
    layout = WeightLayout(("w",), ((3,),))
    loss = StackedLoss(
        lambda w, t: (KeepsItsOutput.apply(t[0] @ w["w"]).mean(), None), layout, (torch.randn(12, 3),), {}
    )
    with_micro_batch(loss, {"w": torch.ones(3)})
    assert made
    assert all(each() is None for each in made)


def test_half_precision_weights_are_not_copied_and_gradients_are_float32():
    loss, weights = tied_loss(torch.bfloat16)
    kept = {name: tensor.clone() for name, tensor in weights.items()}
    network = LargeNetwork(replace(loss, micro_batch=4), weights)
    vector = network.vector()
    assert vector.dtype == torch.float32
    assert {part.data_ptr() for part in network._anchor} == {weights[name].data_ptr() for name in loss.layout.names}
    out = torch.zeros_like(vector)
    network.add_gradient(out)
    wide, _ = tied_loss()
    expected = stacked(wide, weights).gradients(vector[None])[1][0]
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-7)
    assert all(torch.equal(weights[name], tensor) for name, tensor in kept.items())


@pytest.mark.parametrize("sizes", [(5,), (3, 0, 40), (100, 1, 61, 2), (32, 48)])
def test_pieces_make_up_the_flat_vector(sizes, monkeypatch):
    of_memory(monkeypatch, piece=32)
    layout = WeightLayout(tuple(map(str, range(len(sizes)))), tuple((size,) for size in sizes))
    weights = {str(i): torch.randn(size) for i, size in enumerate(sizes)}
    network = LargeNetwork(StackedLoss(None, layout, (torch.ones(1),), {}), weights)
    assert torch.equal(network.vector(), layout.flatten(weights))
    # Noise drawn in pieces is the noise drawn at once, so that the last piece is not too short.
    noise = NormalNoise((1, network.longest_piece), torch.float32, torch.device("cpu"))
    generator = torch.Generator().manual_seed(5)
    drawn = []
    for _, piece in network.pieces():
        noise.fill(piece[None], [generator])
        drawn.append(piece.clone())
    at_once = normal_like(torch.empty(1, layout.size), [torch.Generator().manual_seed(5)])
    assert torch.equal(torch.cat(drawn), at_once[0])


def test_small_networks_stay_stacked_and_large_ones_go_alone(monkeypatch):
    loss, weights = tied_loss()
    assert with_micro_batch(loss, weights).micro_batch is None
    of_memory(monkeypatch, large_weights=100)
    assert with_micro_batch(loss, weights).micro_batch == 10
    of_memory(monkeypatch, micro_batch_share=0, micro_batch_bytes=1)
    assert with_micro_batch(loss, weights).micro_batch == 1
    of_memory(monkeypatch, large_weights=math.inf, large_activations=1000)
    assert with_micro_batch(loss, weights).micro_batch == 1


def test_a_loss_that_is_no_mean_over_samples_is_not_divided(monkeypatch):
    of_memory(monkeypatch, large_weights=1, micro_batch_share=0, micro_batch_bytes=1)
    x = torch.randn(12, 3)
    layout = WeightLayout(("w",), ((3,),))
    centred = StackedLoss(lambda w, t: ((t[0] @ w["w"]).var(unbiased=False), None), layout, (x,), {})
    mean = StackedLoss(lambda w, t: ((t[0] @ w["w"]).square().mean(), None), layout, (x,), {})
    weights = {"w": torch.ones(3)}
    assert with_micro_batch(centred, weights).micro_batch == 12
    assert with_micro_batch(mean, weights).micro_batch == 1


def test_large_sets_are_sampled_only_where_batches_make_the_same_loss(monkeypatch):
    of_memory(monkeypatch, whole_bytes=0)
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))

    def plain(weights, tensors):
        return (tensors[0] @ weights["w"]).square().mean(), None

    def centred(weights, tensors):
        outputs = tensors[0] @ weights["w"]
        return (outputs - outputs.mean()).square().mean(), None

    layout = WeightLayout(("w",), ((3,),))
    weights = {"w": torch.ones(3)}
    sampled = with_micro_batch(StackedLoss(plain, layout, (x,), {}), weights)
    assert sampled.sample_bytes > 0
    # In another order, of which the first are a subset.
    assert not torch.equal(sampled.tensors[0], x)
    assert torch.equal(sampled.tensors[0].sort(0).values, x.sort(0).values)
    assert len(sampled.subset(16).tensors[0]) == 16
    whole = with_micro_batch(StackedLoss(centred, layout, (x,), {}), weights)
    assert whole.sample_bytes is None
    assert torch.equal(whole.tensors[0], x)


def test_what_a_sample_keeps_is_counted_the_same_each_time():
    net = torch.nn.Sequential(*[torch.nn.Linear(16, 16) for _ in range(6)])
    weights = {name: tensor.detach() for name, tensor in net.named_parameters()}
    layout = WeightLayout(tuple(weights), tuple(tuple(each.shape) for each in weights.values()))

    def forward(named, tensors):
        return torch.func.functional_call(net, named, tensors[0]).square().mean(), None

    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    network = LargeNetwork(replace(StackedLoss(forward, layout, (x,), {}), micro_batch=4), weights)
    counts = {module._activation_bytes(network) for _ in range(5)}
    assert len(counts) == 1
    assert counts.pop() >= 5 * 16 * 4


def test_gradients_of_complex_weights_are_added_as_pairs():
    torch.manual_seed(0)
    weights = {"b": torch.randn(3), "w": torch.randn(5, 3, dtype=torch.complex64), "e": torch.randn(7, 3).cfloat()}
    x, y = torch.randn(8, 3), torch.randint(7, (8,))

    def forward(named, tensors):
        hidden = functional.linear(tensors[0].cfloat(), named["w"]) @ named["w"]
        hidden = hidden + named["e"][tensors[1]]
        return (hidden.abs().square().sum(1) + named["b"].square().sum()).mean(), None

    layout = WeightLayout(("b", "w", "e"), ((3,), (5, 3), (7, 3)), ("w", "e"))
    loss = StackedLoss(forward, layout, (x, y), {}, vectorised=False)
    flat = layout.flatten(weights)
    network = LargeNetwork(replace(loss, micro_batch=3), weights)
    assert torch.equal(network.vector(), flat)
    for at in (None, 0.5 * flat):
        expected = loss.gradients((flat if at is None else at)[None])
        out = torch.zeros_like(flat)
        assert network.add_gradient(out, at) == pytest.approx(float(expected[0]), rel=1e-5)
        torch.testing.assert_close(out, expected[1][0], rtol=1e-4, atol=1e-4)
