import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from groktrace.sampling.gradient_accumulation import GradientAccumulation, leaf

aten = torch.ops.aten
INDICES = torch.tensor([[0, 3, 3], [6, 2, 0]])


class Shapes(TorchDispatchMode):
    """What operations return, forward and backward: name and shape."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.seen.append((func.overloadpacket.__name__, tuple(out.shape)))
        return out


def gradients(function, *weights):
    """By plain autograd, and added to places that hold ones."""
    plain = [weight.clone().requires_grad_() for weight in weights]
    function(*plain).square().sum().backward()
    places = [torch.ones_like(weight) for weight in weights]
    leaves = [leaf(weight, place) for weight, place in zip(weights, places, strict=True)]
    with (
        Shapes() as shapes,
        GradientAccumulation({id(each): place for each, place in zip(leaves, places, strict=True)}),
    ):
        function(*leaves).square().sum().backward()
    return [each.grad + 1 for each in plain], places, shapes.seen


def random(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


# Each uses weights of [7, 4] and [7], and says whether the gradient of the first is formed.
CASES = {
    "linear": (lambda w, b: functional.linear(random(5, 4), w, b), False),
    "linear without a bias": (lambda w, b: functional.linear(random(2, 3, 4), w) * b, False),
    "linear of one vector": (lambda w, b: functional.linear(random(4), w, b), False),
    "recorded linear": (lambda w, b: aten.linear.default(random(5, 4), w, b), False),
    "embedding": (lambda w, b: functional.embedding(INDICES, w) * b[:4], False),
    "embedding with padding": (lambda w, b: functional.embedding(INDICES, w, padding_idx=3) + b[0], False),
    "embedding with padding from the end": (
        lambda w, b: functional.embedding(INDICES, w, padding_idx=-1) + b[0],
        False,
    ),
    "recorded embedding": (lambda w, b: aten.embedding.default(w, INDICES) + b[0], False),
    "recorded embedding without padding": (lambda w, b: aten.embedding.default(w, INDICES, -1) + b[0], False),
    "recorded embedding with padding": (lambda w, b: aten.embedding.default(w, INDICES, 3) + b[0], False),
    "one index": (lambda w, b: functional.embedding(torch.tensor(2), w) * b[:4], False),
    "embedding by frequency": (lambda w, b: functional.embedding(INDICES, w, scale_grad_by_freq=True) + b[0], True),
    "product": (lambda w, b: random(5, 4) @ w.T + b, True),
    "not alone": (lambda w, b: functional.linear(random(5, 4), 2 * w, b), True),
    "by name": (lambda w, b: functional.linear(random(5, 4), weight=w, bias=b), True),
    "tied": (lambda w, b: functional.linear(functional.embedding(INDICES, w).tanh(), w, b), False),
    "tied, and used otherwise": (
        lambda w, b: functional.linear(functional.embedding(INDICES, w), w, b) * w[0, 0],
        True,
    ),
    "of itself": (lambda w, b: functional.linear(w, w, b), True),
}


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_added_to_what_is_there(name):
    function, formed = CASES[name]
    expected, found, seen = gradients(function, random(7, 4), random(7))
    for wanted, got in zip(expected, found, strict=True):
        torch.testing.assert_close(got, wanted)
    # Beside the place itself, nothing of the weight's size is made where its gradient is not formed.
    made = [op for op, shape in seen if shape in ((7, 4), (4, 7)) and op not in ("detach", "addmm_", "index_add_", "t")]
    assert bool(made) == formed, made


def test_a_gradient_flows_on_through_the_layer():
    x = random(3, 4).requires_grad_()
    again = x.detach().clone().requires_grad_()
    gradients(lambda w, b: functional.linear(again * 1, w, b), random(7, 4), random(7))
    w, b = random(7, 4), random(7)
    functional.linear(x, w, b).square().sum().backward()
    torch.testing.assert_close(again.grad, 2 * x.grad)  # of both evaluations


def test_what_autocast_or_a_transform_changes_is_left_to_autograd():
    def cast(w, b):
        with torch.autocast("cpu", torch.bfloat16):
            return functional.linear(random(5, 4), w, b).float()

    def mapped(w, b):
        return torch.vmap(lambda row: functional.linear(row, w, b))(random(5, 4))

    for function, close in ((cast, {"rtol": 0.02, "atol": 0.05}), (mapped, {})):
        expected, found, _ = gradients(function, random(7, 4), random(7))
        for wanted, got in zip(expected, found, strict=True):
            torch.testing.assert_close(got, wanted, **close)


def test_layers_of_modules_are_met():
    layer = nn.Linear(4, 7)
    place = torch.zeros(7, 4)
    each = leaf(layer.weight, place)
    with GradientAccumulation({id(each): place}):
        torch.func.functional_call(layer, {"weight": each}, random(5, 4)).sum().backward()
    torch.testing.assert_close(place, random(5, 4).sum(0).expand(7, 4))
