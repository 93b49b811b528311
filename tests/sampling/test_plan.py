"""A plan repeats a function's arithmetic exactly, or refuses to."""

import weakref

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from groktrace.sampling.plan import Plan, run


class Convolutional(nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3).eval()
        self.out = nn.Linear(12, 4)

    def forward(self, x):
        return self.out(nn.functional.max_pool2d(self.norm(self.convolution(x)).relu(), 2).flatten(1))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, activation="gelu")
        self.out = nn.Linear(8, 4)

    def forward(self, tokens):
        return self.out(self.layer(self.embedding(tokens)).mean(1))


IMAGES = torch.randn(10, 1, 6, 6, generator=torch.Generator().manual_seed(5))
TOKENS = torch.randint(0, 7, (10, 5), generator=torch.Generator().manual_seed(6))
NETWORKS = {
    "perceptron": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(36, 5), nn.Tanh(), nn.Linear(5, 4)), IMAGES),
    "convolutional": (Convolutional, IMAGES),
    "attention": (Attention, TOKENS),
}


def stacked_gradient(name):
    """∇ of the mean cross-entropy of three stacked copies of a network, and their weights."""
    make, inputs = NETWORKS[name]
    torch.manual_seed(0)
    model = make()
    targets = torch.arange(len(inputs)) % 4
    names, parameters = zip(*model.named_parameters(), strict=True)
    weights = [torch.stack([p.detach() * scale for scale in (1.0, 0.9, 1.2)]) for p in parameters]

    def one(*tensors):
        outputs = torch.func.functional_call(model, dict(zip(names, tensors, strict=True)), (inputs,))
        return nn.functional.cross_entropy(outputs, targets)

    def function(*tensors):
        leaves = [tensor.detach().requires_grad_(True) for tensor in tensors]
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            losses = torch.func.vmap(one)(*leaves)
            return losses.detach(), *torch.autograd.grad(losses.sum(), leaves)

    return function, weights


@pytest.mark.parametrize("name", NETWORKS)
def test_a_plan_gives_the_same_bits_again_and_again(name):
    function, weights = stacked_gradient(name)
    plan = Plan(function, weights)
    for factor in (1.0, 0.5, 1.0, -2.0):
        arguments = [factor * each for each in weights]
        for got, expected in zip(plan(*arguments), function(*arguments), strict=True):
            assert torch.equal(got, expected)


def test_arguments_are_left_as_they_are():
    x, y = torch.randn(4, 3), torch.randn(4, 3)
    before = x.clone(), y.clone()
    plan = Plan(lambda a, b: (((a * 2 + b).exp() - a).relu(), a.T @ b), (x, y))
    plan(x, y)
    assert torch.equal(x, before[0])
    assert torch.equal(y, before[1])


def test_values_that_are_needed_later_are_not_written_over():
    def function(x):
        a = x + 1
        b = a * 3
        c = a.T * 2  # a view of a lives on
        d = b.exp()
        return d, c + 1, b[0] + a[1], a

    x = torch.linspace(-1, 1, 16).view(4, 4)
    plan = Plan(function, (x,))
    for argument in (x, 2 * x):
        for got, expected in zip(plan(argument), function(argument), strict=True):
            assert torch.equal(got, expected)


def test_elementwise_operations_share_a_buffer():
    def function(x):
        for _ in range(6):
            x = (x * 1.5).tanh()
        return (x,)

    plan = Plan(function, (torch.randn(100),))
    outs = {kwargs["out"].data_ptr() for _, _, kwargs in plan._calls}
    assert len(plan._calls) == 12
    assert len(outs - {plan.results[0].data_ptr()}) == 1


def test_what_depends_on_no_argument_is_computed_once():
    constant = torch.randn(5, 5)
    plan = Plan(lambda x: (x @ (constant @ constant).exp(),), (torch.randn(2, 5),))
    assert len(plan._calls) == 1


def test_a_bound_plan_reads_and_writes_the_tensors_that_it_was_given():
    def function(x, y):
        product = (x * y).tanh()
        return product.sum(1), product @ y.T

    plan = Plan(function, (torch.ones(4, 3), torch.ones(4, 3)))
    bound = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        arguments, results = (torch.randn(4, 3), torch.randn(4, 3)), (torch.empty(4), torch.empty(4, 4))
        bound.append((plan.bind(arguments, results), arguments, results))
    for factor in (1.0, -0.5):
        for calls, arguments, results in bound:
            arguments[0].mul_(factor)
            run(calls)
            assert not any(call[0] == results[1].copy_ for call in calls)
            for got, expected in zip(results, function(*arguments), strict=True):
                assert torch.equal(got, expected)
    assert not torch.equal(bound[0][2][1], bound[1][2][1])


def test_results_that_are_no_values_of_their_own_are_copied():
    constant = torch.tensor([2.0, 3.0])

    def function(x):
        a = x * 3
        b = x.exp() + 1
        return a, a.mT, a, x, constant, b.view(4), b, x.tanh()[1]

    plan = Plan(function, (torch.ones(2, 2),))
    for x in (torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[5.0, 0.0], [1.0, -1.0]])):
        for got, expected in zip(plan(x), function(x), strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize(
    "function", [lambda x: x.max(1), lambda x: ((x.mT * 2).mT,)], ids=["one of two values", "a view of a value"]
)
def test_results_that_an_operation_does_not_give_by_itself(function):
    plan = Plan(function, (torch.ones(2, 3),))
    for x in (torch.arange(6.0).view(2, 3), torch.tensor([[3.0, 1.0, 2.0], [0.0, -1.0, 5.0]])):
        for got, expected in zip(plan(x), function(x), strict=True):
            assert torch.equal(got, expected)


def test_products_that_are_computed_as_their_transposes_are_the_same():
    def only(a, b):
        return ((a @ b).mT.clone(memory_format=torch.contiguous_format) + 1,)

    def both(a, b):
        product = a @ b
        return product.mT.clone(memory_format=torch.contiguous_format) + 1, product.sum(2)

    def result(a, b):
        product = a @ b
        return product.mT.clone(memory_format=torch.contiguous_format) + 1, product

    def strided(a, b):
        return ((a @ b).mT.clone(memory_format=torch.preserve_format).sum(),)

    arguments = torch.randn(3, 20, 40), torch.randn(3, 40, 30)
    for function in (only, both, result, strided):
        plan = Plan(function, arguments)
        for factor in (1.0, 2.0):
            scaled = [factor * each for each in arguments]
            torch.testing.assert_close(plan(*scaled), list(function(*scaled)))


def test_a_plan_keeps_no_value_of_the_recording():
    seen = []

    def function(x):
        for _ in range(3):
            x = x.exp() @ x
            seen.append(weakref.ref(x))
        return (x,)

    plan = Plan(function, (torch.zeros(2, 2),))
    assert [each() for each in seen] == [None] * 3
    assert plan(torch.zeros(2, 2))[0].shape == (2, 2)


def test_activations_and_their_derivatives_are_written_into_buffers():
    weights = torch.randn(3, 4)

    def function(x):
        x = x.detach().requires_grad_(True)
        with torch.enable_grad():
            value = ((x @ weights).relu().tanh().sigmoid().softmax(1)[:, 0]).sum()
            return value.detach(), *torch.autograd.grad(value, x)

    x = torch.randn(5, 3)
    plan = Plan(function, (x,))
    names = {getattr(call[0], "__name__", "") for call in plan._calls}
    backward = {f"{name}_backward.grad_input" for name in ("threshold", "tanh", "sigmoid")}
    assert backward | {"clamp_min.out", "tanh.out", "sigmoid.out", "_softmax_backward_data.out"} <= names
    for argument in (x, -x):
        for got, expected in zip(plan(argument), function(argument), strict=True):
            assert torch.equal(got, expected)
