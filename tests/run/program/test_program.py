"""The traced program against the live model it was traced from, and against documents that are not what they seem."""

import contextlib
import copy
import json
import math
import random
import types

import numpy
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn import functional as F  # noqa: N812
from torch.nn.attention import SDPBackend, sdpa_kernel

from groktrace.attention import twice_differentiable
from groktrace.errors import GroktraceError, RunError, TaskError
from groktrace.run.batch import Batch, flatten
from groktrace.run.program import Program
from groktrace.run.task import evaluation_mode, make_forward

N = 12


class Quadratic(nn.Module):
    def __init__(self):
        super().__init__()
        self.W = nn.Parameter(torch.randn(10, 6))
        self.V = nn.Parameter(torch.randn(6, 5))

    def forward(self, x):
        return (x @ self.W).square() @ self.V


def centred(outputs, targets):
    R = outputs - targets
    return 0.5 * (R - R.mean(0)).square().sum() / len(R)


class Conv(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.out = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Linear(12, 4)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.norm(self.conv(x))), 2)
        return self.out(F.dropout(x.flatten(1), 0.5, self.training))


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden, self.out = nn.Linear(6, 8), nn.Linear(8, 4)
        self.scale = torch.linspace(1, 2, 8)  # neither parameter nor buffer

    def forward(self, x):
        h = F.relu_(self.hidden(x)) * 3
        h += 1
        h[:, 0] = 0.5
        return self.out(h * self.scale * torch.tensor(2.0))


class Stopped(nn.Module):
    """Gradients stop in a no_grad block and at a detach."""

    def __init__(self):
        super().__init__()
        self.hidden, self.out = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x):
        h = self.hidden(x)
        with torch.no_grad():
            size, offset = h.abs().mean(), h.sum()
        return self.out(h / size + offset * h.detach())


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.lstm, self.out = nn.Embedding(7, 4), nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 4)

    def forward(self, x):
        return self.out(self.lstm(self.embed(x))[0][:, -1])


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(7, 4), nn.Linear(6, 4)
        self.gru = nn.GRU(4, 3, num_layers=2, bidirectional=True, bias=False, batch_first=True)

    def forward(self, x):
        return self.out(self.gru(self.embed(x))[0][:, -1])


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width), nn.Dropout(0.1))

    def forward(self, x):
        B, T, C = x.shape
        parts = self.qkv(self.norm1(x)).split(C, dim=2)
        q, k, v = (part.view(B, T, self.heads, C // self.heads).transpose(1, 2) for part in parts)
        p = 0.1 if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=p)
        x = x + self.proj(y.transpose(1, 2).contiguous().view(B, T, C))
        return x + self.mlp(self.norm2(x))


class LanguageModel(nn.Module):
    """Causal, with tied embeddings; computes its own loss."""

    def __init__(self):
        super().__init__()
        self.tokens, self.places = nn.Embedding(7, 8), nn.Embedding(5, 8)
        self.blocks = nn.ModuleList([Block(8, 2), Block(8, 2)])
        self.head = nn.Linear(8, 7, bias=False)
        self.tokens.weight = self.head.weight
        self.register_buffer("positions", torch.arange(5), persistent=False)

    def forward(self, x, y):
        h = self.tokens(x) + self.places(self.positions)
        for block in self.blocks:
            h = block(h)
        logits = self.head(h)
        return logits, F.cross_entropy(logits.view(-1, 7), y.view(-1), ignore_index=-1)


class Answer(nn.Module):
    """Takes keywords, returns an object with logits."""

    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(7, 4), nn.Linear(12, 4)

    def forward(self, ids, mask):
        h = self.embed(ids) * mask.unsqueeze(-1).float()
        return types.SimpleNamespace(logits=self.out(h.flatten(1)))


class EmbeddingNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.hidden, self.out = nn.Embedding(7, 4), nn.Linear(8, 6), nn.Linear(6, 4)

    def forward(self, x):
        return self.out(F.relu(self.hidden(self.embed(x).flatten(1))))


def mlp():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


def frozen():
    model = mlp()
    model[0].weight.requires_grad_(False)
    return model


def encoder():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
    return nn.Sequential(nn.Embedding(7, 8), nn.TransformerEncoder(layer, 2), nn.Flatten(), nn.Linear(40, 4))


def rows(*shape):
    return lambda: (torch.randn(N, *shape), torch.randint(4, (N,)))


def ids(*shape):
    return lambda: (torch.randint(7, (N, *shape)), torch.randint(4, (N,)))


def one_hot():
    return F.one_hot(torch.randint(10, (N,)), 10).float(), F.one_hot(torch.randint(5, (N,)), 5).float()


def nll(outputs, targets):
    return F.nll_loss(F.log_softmax(outputs, -1), targets)


def scaled(outputs, targets):
    return F.cross_entropy(outputs, targets, reduction="sum") * (1.0 / len(outputs))


CASES = {
    "quadratic, centred": (Quadratic, one_hot, {"loss": centred}),
    "MLP": (mlp, rows(6), {"loss": "cross_entropy"}),
    "MLP, sum over batch size": (mlp, rows(6), {"loss": scaled}),
    "MLP, log-softmax and NLL": (mlp, rows(6), {"loss": nll}),
    "MLP, weighted classes": (mlp, rows(6), {"loss": nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0, 4.0]))}),
    "MLP, frozen": (frozen, rows(6), {"loss": "cross_entropy"}),
    "MLP, compiled": (lambda: torch.compile(mlp(), backend="eager"), rows(6), {"loss": "cross_entropy"}),
    "MLP, batch_loss": (mlp, rows(6), {"batch_loss": lambda model, batch: F.cross_entropy(model(batch[0]), batch[1])}),
    "in place": (InPlace, rows(6), {"loss": "cross_entropy"}),
    "stopped gradients": (Stopped, rows(6), {"loss": "cross_entropy"}),
    "CNN": (Conv, rows(1, 6, 6), {"loss": "cross_entropy"}),
    "embedding": (EmbeddingNet, ids(2), {"loss": "cross_entropy"}),
    "LSTM": (Recurrent, ids(5), {"loss": "cross_entropy"}),
    "GRU": (Gated, ids(5), {"loss": "cross_entropy"}),
    "encoder": (encoder, ids(5), {"loss": "cross_entropy"}),
    "language model": (
        LanguageModel,
        lambda: (torch.randint(7, (N, 5)), torch.randint(7, (N, 5))),
        {"batch_loss": lambda model, batch: model(*batch)[1]},
    ),
    "dict inputs, object out": (
        Answer,
        lambda: ({"ids": torch.randint(7, (N, 3)), "mask": torch.rand(N, 3) > 0.3}, torch.randint(4, (N,))),
        {"loss": "cross_entropy"},
    ),
}


def batch_of(data):
    tensors, structure = flatten(data)
    return Batch(tuple(tensors), structure)


def build(case):
    torch.manual_seed(0)
    make, data, losses = CASES[case]
    model, batch = make(), batch_of(data())
    return model, make_forward(model, losses.get("loss"), losses.get("batch_loss"), batch), batch


def weights_of(model):
    plain = getattr(model, "_orig_mod", model)
    return {k: t.detach().clone() for k, t in (dict(plain.named_buffers()) | dict(plain.named_parameters())).items()}


def names_of_parameters(model):
    return [name for name, _ in getattr(model, "_orig_mod", model).named_parameters()]


def fingerprint(model):
    """Everything about a model and the generators that tracing could disturb."""
    return {
        "weights": [
            (id(p), p.detach().clone(), p.requires_grad, None if p.grad is None else p.grad.clone())
            for p in [*model.parameters(), *model.buffers()]
        ],
        "flags": [module.training for module in model.modules()],
        "names": [sorted(vars(module)) for module in model.modules()],
        "random": (torch.get_rng_state(), random.getstate(), str(numpy.random.get_state())),
        "fast": torch.backends.mha.get_fastpath_enabled(),
    }


def assert_same(left, right):
    if isinstance(left, torch.Tensor):
        assert torch.equal(left, right)
    elif isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, list | tuple):
        assert len(left) == len(right)
        for a, b in zip(left, right, strict=True):
            assert_same(a, b)
    else:
        assert left == right


def reread(program):
    return Program.from_json(
        json.loads(json.dumps(program.to_json(), allow_nan=False)), program.constants, "program.json"
    )


@pytest.fixture(scope="module")
def traced():
    """Each case traced once."""
    kept = {}

    def get(case):
        if case not in kept:
            model, forward, batch = build(case)
            kept[case] = model, forward, batch, reread(Program.trace(forward, batch))
        return kept[case]

    return get


def live_loss(forward, batch, weights=None):
    forward = make_forward(getattr(forward.model, "_orig_mod", forward.model), forward.loss, forward.batch_loss, batch)
    with evaluation_mode(forward), sdpa_kernel(SDPBackend.MATH):
        if weights is None:
            return forward(*batch.tensors)[0]
        named = {f"model.{name}": tensor for name, tensor in weights.items()}
        return functional_call(forward, named, batch.tensors)[0]


def stacked(model):
    """Three copies of the weights, each a little different."""
    weights = weights_of(model)
    return {
        name: torch.stack([t * (1 + 0.1 * i) if t.is_floating_point() else t for i in range(3)])
        for name, t in weights.items()
    }


@pytest.mark.parametrize("case", CASES)
def test_tracing_leaves_everything_as_it_was(case, capfd):
    model, forward, batch = build(case)
    model.train()
    list(model.modules())[-1].eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn_like(parameter)
    before = fingerprint(model)
    Program.trace(forward, batch)
    assert_same(before, fingerprint(model))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", [N, N // 2, 1])
def test_the_loss_is_bitwise_that_of_the_live_model(traced, case, size):
    model, forward, batch, program = traced(case)
    part = batch.take(slice(0, size))
    with twice_differentiable():  # as the live one is evaluated
        loss, outputs = program.forward(weights_of(model), part.tensors)
    assert torch.equal(loss, live_loss(forward, part))
    assert (outputs is None) == (forward.batch_loss is not None)
    assert outputs is None or outputs.shape[0] == size


@pytest.mark.parametrize("case", CASES)
def test_the_gradient_is_that_of_the_live_model(traced, case):
    model, forward, batch, program = traced(case)
    weights = weights_of(model)
    leaves = {name: weights[name].clone().requires_grad_() for name in names_of_parameters(model)}
    expected = torch.autograd.grad(live_loss(forward, batch, weights | leaves), leaves.values(), allow_unused=True)
    loss = program.forward(weights | leaves, batch.tensors)[0]
    got = torch.autograd.grad(loss, leaves.values(), allow_unused=True)
    for a, b in zip(expected, got, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("case", CASES)
def test_stacked_weights_give_what_a_loop_gives(traced, case):
    model, _, batch, program = traced(case)
    stack = stacked(model)
    singles = [{name: t[i] for name, t in stack.items()} for i in range(3)]

    def loss(weights):
        return program.forward(weights, batch.tensors)[0]

    losses = vmap(loss)(stack)
    moving = {name: stack[name].requires_grad_() for name in names_of_parameters(model)}
    sums = torch.autograd.grad(vmap(loss)(stack).sum(), moving.values(), allow_unused=True)
    torch.testing.assert_close(losses, torch.stack([loss(single) for single in singles]).detach())
    gradient = grad(lambda some, rest: loss(rest | some))
    for i, single in enumerate(singles):
        expected = gradient({name: t for name, t in single.items() if name in moving}, single)
        for name, total in zip(moving, sums, strict=True):
            total = torch.zeros_like(moving[name]) if total is None else total
            torch.testing.assert_close(total[i], expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("case", CASES)
def test_stacked_hessian_products_agree_with_central_differences(traced, case):
    model, _, batch, program = traced(case)
    stack = {name: t.double() if t.is_floating_point() else t for name, t in stacked(model).items()}
    moving = {name: stack[name] for name in names_of_parameters(model)}
    fixed = {name: t for name, t in stack.items() if name not in moving}
    torch.manual_seed(1)
    direction = {name: torch.randn_like(t) for name, t in moving.items()}

    def gradient(some, rest):
        return grad(lambda w: program.forward(rest | w, batch.tensors)[0])(some)

    product = vmap(lambda w, v, rest: jvp(lambda w: gradient(w, rest), (w,), (v,))[1])(moving, direction, fixed)
    ahead, behind = (
        vmap(gradient)({name: t + sign * 1e-6 * direction[name] for name, t in moving.items()}, fixed)
        for sign in (1, -1)
    )
    for name, p in product.items():
        assert p.dtype == torch.float64
        if case != "stopped gradients":  # there the gradient is not that of a function
            torch.testing.assert_close(p, (ahead[name] - behind[name]) / 2e-6, rtol=1e-4, atol=1e-6)


def test_minibatches_drawn_per_row_can_be_stacked(traced):
    model, _, batch, program = traced("language model")
    stack, index = stacked(model), torch.tensor([[0, 1, 2], [3, 4, 5], [6, 7, 8]])
    losses = vmap(lambda w, t: program.forward(w, t)[0])(stack, tuple(t[index] for t in batch.tensors))
    for i in range(3):
        one = program.forward({name: t[i] for name, t in stack.items()}, batch.take(index[i]).tensors)[0]
        torch.testing.assert_close(losses[i], one)


class Hidden(nn.Module):
    """An MLP that does something to its hidden layer."""

    def __init__(self, function):
        super().__init__()
        self.hidden, self.out, self.function = nn.Linear(6, 8), nn.Linear(8, 4), function

    def forward(self, x):
        return self.out(self.function(self.hidden(x)))


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, g):
        return g


def traced_hidden(function, loss="cross_entropy"):
    torch.manual_seed(0)
    batch = batch_of(rows(6)())
    model = Hidden(function)
    return model, make_forward(model, loss, None, batch), batch


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            lambda h: h if h.sum() > 0 else -h,
            "cannot be traced by torch.export .GuardOnDataDependentSymNode: ",
        ),
        (
            lambda h: h + torch.randn_like(h),
            "not a function of the weights alone: aten.randn_like.default draws",
        ),
        (lambda h: F.dropout(h, 0.5), "draws random numbers"),
        (lambda h: h * numpy.random.rand(), "not a function of the weights alone: two evaluations of it differ"),
        (lambda h: h * random.random(), "two evaluations of it differ"),
        (Straight.apply, "another gradient than live"),
        (lambda h: undefined_name, "cannot be traced by torch.export .NameError: name 'undefined_name'"),  # noqa: F821
        (lambda h: h.detach().requires_grad_().cholesky_solve(h), "cannot be traced"),
    ],
)
def test_what_cannot_be_traced_is_said_in_one_line(function, message, capfd):
    model, forward, batch = traced_hidden(function)
    before = fingerprint(model)
    with pytest.raises(TaskError, match=message) as caught:
        Program.trace(forward, batch)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 400
    assert_same(before, fingerprint(model))
    assert capfd.readouterr() == ("", "")


def test_a_loss_that_changes_the_weights_is_refused():
    model = mlp()
    batch = batch_of(rows(6)())
    forward = make_forward(model, None, lambda m, b: (m[0].weight.data.mul_(0.5), nll(m(b[0]), b[1]))[1], batch)
    before = fingerprint(model)
    with pytest.raises(TaskError):
        Program.trace(forward, batch)
    assert_same(before, fingerprint(model))


def test_a_loss_without_gradient_is_refused():
    _, forward, batch = traced_hidden(torch.detach, lambda outputs, targets: (outputs > 0).float().mean())
    with pytest.raises(TaskError, match="its gradient with respect to the weights fails"):
        Program.trace(forward, batch)


def test_a_penalty_on_the_weights_stays_a_function_of_them():
    model = mlp()
    batch = batch_of(rows(6)())
    held = list(model.parameters())
    forward = make_forward(model, lambda o, y: F.cross_entropy(o, y) + sum(p.square().sum() for p in held), None, batch)
    program = reread(Program.trace(forward, batch))
    assert not program.constants
    weights = {name: 2 * t for name, t in weights_of(model).items()}
    expected = F.cross_entropy(functional_call(model, weights, batch.tensors[0]), batch.tensors[1])
    expected = expected + sum(t.square().sum() for t in weights.values())
    torch.testing.assert_close(program.forward(weights, batch.tensors)[0], expected)


@pytest.mark.parametrize("function", [lambda h: h / math.sqrt(h.shape[0]), lambda h: h if h.shape[0] == N else -h])
def test_a_batch_size_that_cannot_be_free_is_kept(function):
    model, forward, batch = traced_hidden(function)
    program = reread(Program.trace(forward, batch))
    assert program.to_json()["static_batch"] == N
    weights = weights_of(model)
    assert torch.equal(program.forward(weights, batch.tensors)[0], live_loss(forward, batch))
    with pytest.raises(TaskError, match="traced for batches of exactly 12 samples, got 5"):
        program.forward(weights, batch.take(slice(0, 5)).tensors)


def test_one_sample_and_many_are_enough():
    torch.manual_seed(0)
    model = mlp()
    for n in (1, 2, 3, 100):
        batch = Batch((torch.randn(n, 6), torch.randint(4, (n,))), {"tuple": [0, 1]})
        forward = make_forward(model, "cross_entropy", None, batch)
        program = Program.trace(forward, batch)
        assert program.to_json()["static_batch"] is None
        assert torch.equal(program.forward(weights_of(model), batch.tensors)[0], live_loss(forward, batch))


def test_the_program_runs_in_the_precision_of_the_weights():
    torch.manual_seed(0)
    model = InPlace().bfloat16()
    model.scale = model.scale.bfloat16()
    batch = Batch((torch.randn(N, 6).bfloat16(), torch.randint(4, (N,))), {"tuple": [0, 1]})
    program = Program.trace(make_forward(model, "cross_entropy", None, batch), batch)
    weights = {name: t.float() for name, t in weights_of(model).items()}
    assert program.forward(weights, batch.tensors)[0].dtype == torch.float32
    assert program.forward(weights_of(model), batch.tensors)[0].dtype == torch.bfloat16


def test_constants_placed_under_transforms_and_inference_can_be_used_later(traced):
    model, _, batch, program = traced("in place")
    program = reread(program)
    weights = {name: t.double() for name, t in weights_of(model).items()}
    with torch.inference_mode():
        program.forward(weights, batch.tensors)
    program = reread(program)
    grad(lambda w: program.forward(w, batch.tensors)[0])(weights)
    program.forward({name: t.requires_grad_() for name, t in weights.items()}, batch.tensors)[0].backward()


def test_what_others_raise_from_within_an_operation_stays_theirs(traced):
    class Watching(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            raise InterruptedError("mine")

    _, _, batch, program = traced("MLP")
    with Watching(), pytest.raises(InterruptedError, match="mine"):
        program.forward(weights_of(traced("MLP")[0]), batch.tensors)


def test_missing_weights_and_tensors_are_named(traced):
    model, _, batch, program = traced("MLP")
    weights = weights_of(model)
    with pytest.raises(TaskError, match=r"the weights lack '2.bias'"):
        program.forward({name: t for name, t in weights.items() if name != "2.bias"}, batch.tensors)
    with pytest.raises(TaskError, match="takes 2 batch tensors, got 1"):
        program.forward(weights, batch.tensors[:1])
    assert program.weights == ["0.weight", "0.bias", "2.weight", "2.bias"]
    read = Program.from_json(program.to_json(), program.constants, where="run/program.json")
    with pytest.raises(TaskError, match=r"^run/program\.json: the recorded program takes 2 batch tensors, got 1"):
        read.forward(weights, batch.tensors[:1])


def test_tied_weights_have_one_name(traced):
    names = [entry["weight"] for entry in traced("language model")[3].to_json()["inputs"] if "weight" in entry]
    assert "tokens.weight" in names
    assert "head.weight" not in names
    assert "positions" in names


def sharing(how):
    """Two layers on one memory."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 4, bias=False))
    whole = model[0].weight.detach()
    model[2] = nn.Linear(4, 4 if how in ("itself", "turned") else 2, bias=False)
    cuts = {"itself": whole, "turned": whole.t(), "rows": whole[1:3], "columns": whole[:, ::2].t()}
    model[2].weight = nn.Parameter(cuts[how])
    return model


@pytest.mark.parametrize("how", ["itself", "turned", "rows", "columns"])
@pytest.mark.parametrize("penalised", [False, True])
def test_what_lies_in_the_memory_of_another_follows_from_it(how, penalised):
    model = sharing(how)
    batch = Batch((torch.randn(N, 4), torch.randint(2, (N,))), {"tuple": [0, 1]})
    held = list(model.parameters())

    def loss(outputs, targets):
        return F.cross_entropy(outputs, targets) + sum(tensor.pow(3).sum() for tensor in held) * penalised

    program = reread(Program.trace(make_forward(model, loss, None, batch), batch))
    assert program.weights == ["0.weight"]
    w = torch.randn(4, 4, requires_grad=True)
    cut = {"itself": w, "turned": w.t(), "rows": w[1:3], "columns": w[:, ::2].t()}[how]
    outputs = torch.tanh(batch.tensors[0] @ w.t()) @ cut.t()
    expected = F.cross_entropy(outputs, batch.tensors[1]) + (w.pow(3).sum() + cut.pow(3).sum()) * penalised
    found = program.forward({"0.weight": w}, batch.tensors)[0]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, w), torch.autograd.grad(expected, w))


def test_weights_that_overlap_otherwise_are_refused():
    model, flat = sharing("itself"), torch.randn(24)
    model[0].weight, model[2].weight = nn.Parameter(flat[:16].view(4, 4)), nn.Parameter(flat[8:].view(4, 4))
    batch = Batch((torch.randn(N, 4), torch.randint(2, (N,))), {"tuple": [0, 1]})
    with pytest.raises(TaskError, match="share some of their memory, and neither is a part of the other"):
        Program.trace(make_forward(model, "cross_entropy", None, batch), batch)


def test_a_view_that_the_loss_took_of_a_weight_follows_it():
    model = mlp()
    batch = batch_of(rows(6)())
    held = model[0].weight.t()
    forward = make_forward(model, lambda o, y: F.cross_entropy(o, y) + held[:2].square().sum(), None, batch)
    program = reread(Program.trace(forward, batch))
    weights = {name: 2 * t for name, t in weights_of(model).items()}
    expected = F.cross_entropy(functional_call(model, weights, batch.tensors[0]), batch.tensors[1])
    expected = expected + weights["0.weight"][:, :2].square().sum()
    torch.testing.assert_close(program.forward(weights, batch.tensors)[0], expected)


def test_tensors_of_the_loss_are_weights_of_the_program():
    class Weighted(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, outputs, targets):
            return F.cross_entropy(self.scale * outputs, targets)

    model, criterion, shift = mlp(), Weighted(), torch.zeros(4, requires_grad=True)
    batch = batch_of(rows(6)())
    for loss, names in (
        (criterion, ["loss.scale"]),
        (lambda o, y: criterion(o + shift, y), ["loss.criterion.scale", "loss.shift"]),
    ):
        forward = make_forward(model, loss, None, batch)
        forward.find_tensors(batch)
        program = reread(Program.trace(forward, batch))
        assert sorted(set(program.weights) - weights_of(model).keys()) == names
        assert not program.constants
        own = {name: torch.tensor(3.0) if name.endswith("scale") else torch.arange(4.0) for name in names}
        outputs = model(batch.tensors[0]) + own.get("loss.shift", 0)
        expected = F.cross_entropy(3 * outputs, batch.tensors[1])
        torch.testing.assert_close(program.forward(weights_of(model) | own, batch.tensors)[0], expected)


class Waves(nn.Module):
    """A filter with complex weights, or with pairs that it sees as such."""

    def __init__(self, pairs):
        super().__init__()
        values = torch.randn(4, dtype=torch.complex64)
        self.weight = nn.Parameter(torch.view_as_real(values).clone() if pairs else values)

    def forward(self, x):
        weight = self.weight if self.weight.is_complex() else torch.view_as_complex(self.weight)
        return torch.fft.irfft(torch.fft.rfft(x) * weight, n=6)[:, :4]


@pytest.mark.parametrize("pairs", [False, True])
def test_complex_weights_can_be_recorded_and_lie_anywhere(pairs):
    torch.manual_seed(0)
    model = Waves(pairs)
    batch = batch_of(rows(6)())
    program = reread(Program.trace(make_forward(model, "cross_entropy", None, batch), batch))
    assert torch.equal(
        program.forward(weights_of(model), batch.tensors)[0], F.cross_entropy(model(batch.tensors[0]), batch.tensors[1])
    )
    if pairs:
        stacked = torch.randn(3, 9)  # where no view as complex numbers is to be had
        losses = vmap(lambda flat: program.forward({"weight": flat[1:].view(4, 2)}, batch.tensors)[0])(stacked)
        for flat, loss in zip(stacked, losses, strict=True):
            outputs = functional_call(model, {"weight": flat[1:].clone().view(4, 2)}, batch.tensors[0])
            torch.testing.assert_close(loss, F.cross_entropy(outputs, batch.tensors[1]))


# Documents that are not what they seem.


def document(*nodes, **changes):
    inputs = [{"weight": "w", "dtype": "float32"}, {"data": 0}]
    whole = {"format": 1, "static_batch": None, "data": 1, "inputs": inputs, "outputs": [len(nodes) + 1, None]}
    return whole | {"nodes": list(nodes)} | changes


def node(target, *args, **kwargs):
    return {"target": target, "args": list(args), "kwargs": kwargs}


W, X = {"ref": 0}, {"ref": 1}


def nested(depth):
    value = 1
    for _ in range(depth):
        value = [value]
    return value


def test_a_small_document_runs():
    program = Program.from_json(document(node("aten.mul.Tensor", W, X), node("aten.sum.default", {"ref": 2})), {}, "p")
    assert program.forward({"w": torch.tensor(3.0)}, [torch.ones(4)])[0] == 12


@pytest.mark.parametrize(
    ("target", "args"),
    [
        ("os.system", ["true"]),
        ("aten.os.system", ["true"]),
        ("aten.__class__.default", []),
        ("aten.__class__.__base__", []),
        ("aten.add.__class__", [W, X]),
        ("aten.add", [W, X]),
        ("aten.add.Tensor\n", [W, X]),
        ("aten.no_such_thing.default", [W]),
        ("prim.device.default", [W]),
        ("torch.ops.aten.add.Tensor", [W, X]),
        ("sym.system", [1]),
        ("sym.__class__", [1]),
        ("builtins.eval", ["1"]),
        ("aten.from_file.default", ["data", True, 4]),
        ("aten.save.default", [W, "data"]),
        ("aten.warn.default", ["text"]),
        ("aten.manual_seed.default", [1]),
        ("aten.set_grad_enabled.default", [False]),
        ("aten.add_.Tensor", [W, X]),
        ("aten.add.out", [W, X]),
        ("aten.relu_.default", [W]),
        ("aten.set_.source_Tensor", [W, X]),
        ("aten.batch_norm.default", [X, None, None, W, W, True, 0.1, 1e-5, False]),
        ("aten.rand.default", [[2]]),
        ("aten.randn_like.default", [X]),
        ("aten.bernoulli.default", [X]),
        ("aten.normal.Tensor_Tensor", [X, X]),
        ("aten.dropout.default", [X, 0.5, True]),
        ("aten.scaled_dot_product_attention.default", [X, X, X, None, 0.5]),
        ("aten._unsafe_index.Tensor", [X, [X]]),
        ("aten._print.default", ["text"]),
        ("aten._assert_async.default", [X]),
        ("aten.equal.default", [X, X]),
        ("aten.zeros.default", [[2**20, 2**20]]),
        ("aten.full.default", [[2**30], 1.0]),
        ("aten.arange.default", [2**35]),
        ("aten.arange.start_step", [0, 1.0, 1e-15]),
        ("aten.arange.start_step", [0, 1, 0]),
        ("aten.eye.default", [2**20]),
        ("aten.histogram.bin_ct", [X, 2**27]),
        ("aten.tensor_split.tensor_indices_or_sections", [X, W]),
        ("aten.expand.default", [X, [2**20, 2**20]]),
        ("aten.repeat.default", [X, [2**20, 2**20]]),
        ("aten.tile.default", [X, [2**20, 2**20]]),
        ("aten.one_hot.default", [X, 2**39]),
        ("aten.constant_pad_nd.default", [X, [2**30, 2**30]]),
        ("aten.add.Tensor", [W, 2**41]),
        ("aten.add.Tensor", [W, X, X, X, X]),
        ("aten.add.Tensor", [W, {"ref": 2}]),
        ("aten.add.Tensor", [W, {"ref": 99}]),
        ("aten.add.Tensor", [W, {"ref": -1}]),
        ("aten.add.Tensor", [W, {"ref": True}]),
        ("aten.add.Tensor", [W, {"ref": 1.0}]),
        ("aten.add.Tensor", [W, {"ref": 1, "more": 1}]),
        ("aten.add.Tensor", [W, {"dtype": "Tensor"}]),
        ("aten.add.Tensor", [W, {"float": "1e9"}]),
        ("aten.add.Tensor", [W, {"device": "cuda:7"}]),
        ("aten.add.Tensor", [W, {}]),
        ("aten.add.Tensor", [W, "../../etc/passwd"]),
        ("aten.add.Tensor", [W, "x" * 1000]),
        ("aten.add.Tensor", [W, [0] * 20_000]),
        ("aten.add.Tensor", [W, nested(10)]),
        ("aten.add.Tensor", [W, nested(100_000)]),
        (None, []),
        (7, []),
        (["aten.add.Tensor"], []),
    ],
)
def test_hostile_calls_are_refused(target, args):
    bad = document({"target": target, "args": args, "kwargs": {}})
    with pytest.raises(RunError, match=r"program\.json: not a program that groktrace wrote: ") as caught:
        Program.from_json(bad, {}, "program.json")
    assert len(str(caught.value)) < 300


GOOD = node("aten.sum.default", X)


@pytest.mark.parametrize(
    "bad",
    [
        None,
        7,
        [],
        {},
        document(GOOD, format=2),
        document(GOOD, format="1"),
        document(GOOD, data=0),
        document(GOOD, data=True),
        document(GOOD, data="2"),
        document(GOOD, static_batch=0),
        document(GOOD, static_batch=1.5),
        document(GOOD, inputs=None),
        document(GOOD, inputs={}),
        document(GOOD, inputs=[{"weight": 1, "dtype": "float32"}]),
        document(GOOD, inputs=[{"weight": "w"}]),
        document(GOOD, inputs=[{"weight": "w", "dtype": "system"}]),
        document(GOOD, inputs=[{"data": 1}, {"data": 0}]),
        document(GOOD, inputs=[{"data": -1}, {"data": 0}]),
        document(GOOD, inputs=[{"constant": "c"}, {"data": 0}]),
        document(GOOD, inputs=[{"constant": ["c"]}, {"data": 0}]),
        document(GOOD, inputs=[[], 1]),
        document(GOOD, nodes=None),
        document(GOOD, nodes=[None]),
        document(GOOD, nodes=[{}]),
        document(GOOD, nodes=[{"target": "aten.sum.default", "args": X, "kwargs": {}}]),
        document(GOOD, nodes=[{"target": "aten.sum.default", "args": [X], "kwargs": []}]),
        document(GOOD, nodes=[{"target": "aten.sum.default", "args": [X], "kwargs": {"out": X}}]),
        document(GOOD, nodes=[GOOD | {"more": 1}]),
        document(GOOD, nodes=[{}] * (2**17 + 1)),
        document(GOOD, outputs=None),
        document(GOOD, outputs=[]),
        document(GOOD, outputs=[2]),
        document(GOOD, outputs=[None, 2]),
        document(GOOD, outputs=[3, None]),
        document(GOOD, outputs=[-1, None]),
        document(GOOD, outputs=[True, None]),
        document(GOOD, outputs=[2, 2, 2]),
    ],
)
def test_malformed_documents_are_refused(bad):
    with pytest.raises(RunError, match=r"program\.json: not a program that groktrace wrote: "):
        Program.from_json(bad, {}, "program.json")


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ([node("sym.mul", [1] * 9, 10**9)], "with something that is no number"),
        ([node("sym.mul", W, 2)], "with something that is no number"),
        ([node("sym.pow", 2, 2**39)], "absurd power"),
        ([node("sym.pow", 2**39, 64)], "absurd size"),
        ([node("sym.floordiv", 1, 0)], "arithmetic on sizes fails"),
        ([node("sym.add", 1)], "arithmetic on sizes fails"),
        ([node("sym.sqrt", -1.0)], "arithmetic on sizes fails"),
        ([node("getitem", X, 0)], "a result that an operation does not have"),
        ([node("aten.split.Tensor", X, 2), node("getitem", {"ref": 2}, 9)], "a result that an operation does not"),
        ([node("sym.mul", 2**20, 2**20), node("aten.zeros.default", [{"ref": 2}])], "for an absurd size"),
        ([node("sym.mul", 2**20, 2**20), node("aten.arange.default", {"ref": 2})], "for an absurd size"),
        ([node("aten.tensor_split.sections", X, 2**27)], "for an absurd number of parts"),
        ([node("aten.zeros.default", [2**27, 0]), node("aten.unbind.int", {"ref": 2})], "absurd number of parts"),
        ([node("aten.zeros.default", [2**27, 0]), node("aten.split.Tensor", {"ref": 2}, 2)], "absurd number of parts"),
        ([node("aten.zeros.default", [0]), node("aten.chunk.default", {"ref": 2}, 2**27)], "absurd number of parts"),
        ([node("aten.sym_size.int", 3, 0)], "fails at aten.sym_size.int"),
        (
            [node("aten.reshape.default", W, [2, 2]), node("aten._weight_norm.default", {"ref": 2}, X)],
            "to sizes that it does not have",
        ),
        (
            [
                node("aten.reshape.default", X, [1, 1, 2, 2]),
                node("aten._upsample_bilinear2d_aa.default", {"ref": 2}, [2, 2], False, 1e-5, 1e-5),
            ],
            "with scales that are not those of its sizes",
        ),
        (
            [
                node("aten.reshape.default", X, [1, 2, 2]),
                node("aten.gru.input", {"ref": 2}, {"ref": 2}, [W, W], False, 1, 0.0, False, False, True),
            ],
            "with states or weights that do not fit its input",
        ),
    ],
)
def test_absurd_arithmetic_is_refused_when_it_runs(nodes, message):
    program = Program.from_json(document(*nodes), {}, "program.json")
    with pytest.raises(TaskError, match=message):
        program.forward({"w": torch.ones(4)}, [torch.ones(4)])


def test_scales_that_are_those_of_the_sizes_pass():
    nodes = [
        node("aten.reshape.default", X, [1, 1, 2, 2]),
        node("aten._upsample_bilinear2d_aa.default", {"ref": 2}, [4, 4], False, 2.0, 2.0),
        node("aten.sum.default", {"ref": 3}),
    ]
    program = Program.from_json(document(*nodes, outputs=[4, None]), {}, "program.json")
    loss, _ = program.forward({"w": torch.ones(4)}, [torch.arange(4.0)])
    image = torch.nn.functional.interpolate(
        torch.arange(4.0).view(1, 1, 2, 2), scale_factor=2, mode="bilinear", antialias=True
    )
    assert loss == image.sum()


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.integers(-3, 40),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["aten.add_.Tensor", "aten.randn_like.default", "sym.mul", "getitem", "aten.from_file.default"]),
    st.sampled_from([[], {}, {"ref": 0}, {"ref": 10**6}, {"dtype": "float64"}, {"float": "nan"}, {"device": "run"}]),
)


def places(value, path=()):
    """Every path within a document."""
    yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*path, key))


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_mutated_documents_are_refused_or_run(traced, data):
    model, _, batch, program = traced(data.draw(st.sampled_from(["quadratic, centred", "language model", "CNN"])))
    changed = copy.deepcopy(program.to_json())
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(list(places(changed))[1:]))
        parent = changed
        for key in path[:-1]:
            parent = parent[key]
        if data.draw(st.booleans()):
            parent[path[-1]] = data.draw(JUNK)
        else:
            del parent[path[-1]]
    try:
        rebuilt = Program.from_json(changed, program.constants, "program.json")
    except RunError:
        return
    with contextlib.suppress(GroktraceError, RuntimeError, ValueError, IndexError):
        rebuilt.forward(weights_of(model), batch.tensors)


def test_complex_numbers_of_the_users_are_kept():
    model = nn.Linear(4, 3)
    batch = Batch((torch.randn(6, 4), torch.randn(6, 3)), {"tuple": [0, 1]})
    loss = lambda outputs, targets: (torch.fft.rfft(outputs - targets) * (0.5 + 2j)).abs().square().mean()  # noqa: E731
    program = Program.trace(make_forward(model, loss, None, batch), batch)
    again = Program.from_json(program.to_json(), program.constants, "here")
    expected = loss(model(batch.tensors[0]), batch.tensors[1])
    torch.testing.assert_close(again.forward(dict(model.named_parameters()), batch.tensors)[0], expected)
    assert '{"complex": [0.5, 2.0]}' in json.dumps(program.to_json())
    document = json.loads(json.dumps(program.to_json()).replace("[0.5, 2.0]", '[0.5, "2"]'))
    with pytest.raises(RunError, match="malformed"):
        Program.from_json(document, program.constants, "here")
