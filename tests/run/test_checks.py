import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import groktrace
from groktrace.errors import TaskError
from groktrace.run.checks import LossProbe, check_mean, check_repeatable, sample_axis_note, spectral_norm_note
from groktrace.run.collect import collect
from groktrace.run.task import Task, evaluation_mode, make_forward

WORDS = 11


def data(n=40, inputs=6, outputs=3):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, inputs, generator=generator), torch.randn(n, outputs, generator=generator)


def network(inputs=6, outputs=3):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Linear(inputs, outputs)


def probe(model, train, loss=None, batch_loss=None):
    batch, _ = collect(train, "train", 1000, 0)
    return LossProbe(make_forward(model, loss, batch_loss, batch).eval(), batch)


def penalty(model):
    return sum(parameter.square().sum() for parameter in model.parameters())


def contrast(model, batch):
    a, b = (functional.normalize(model(x), dim=1) for x in (batch[0], batch[0] + 0.1 * batch[0].flip(1)))
    return functional.cross_entropy(a @ b.T / 0.1, torch.arange(len(a)))


def decorrelation(model, batch):
    outputs = model(batch[0]) - model(batch[0]).mean(0)
    covariance = outputs.T @ outputs / (len(outputs) - 1)
    return covariance.square().sum() - covariance.diagonal().square().sum()


def halves(model, batch):
    """The first half of the batch are views of the second, as in NT-Xent."""
    z = functional.normalize(model(batch[0]), dim=1)
    near = z @ z.T / 0.5 - 1e9 * torch.eye(len(z), dtype=z.dtype)
    return functional.cross_entropy(near, (torch.arange(len(z)) + len(z) // 2) % len(z))


def centred(outputs, targets):
    residuals = outputs - targets
    return (residuals - residuals.mean(0)).square().sum() / len(residuals)


SUMS = [
    {"loss": nn.MSELoss(reduction="sum")},
    {"loss": lambda o, t: functional.cross_entropy(o, t.argmax(1), reduction="sum")},
    {"loss": lambda o, t: (o - t).square().sum() / 32},
    {"loss": lambda o, t: torch.linalg.vector_norm(o - t)},
    {"loss": lambda o, t: functional.mse_loss(o, t) / len(t)},
    {"batch_loss": lambda m, b: (m(b[0]) - b[1]).square().sum() + 100 * penalty(m)},
]
MEANS = [
    {"loss": nn.MSELoss()},
    {"loss": lambda o, t: 0.5 * (o - t).square().sum() / len(t)},
    {"loss": lambda o, t: functional.cross_entropy(o, t.argmax(1), weight=torch.ones(3, dtype=o.dtype))},
    {"loss": lambda o, t: functional.cross_entropy(o.float(), t.argmax(1))},
    {"loss": centred},
    {"batch_loss": lambda m, b: (m(b[0]) - b[1]).square().mean() + 100 * penalty(m)},
    {"batch_loss": contrast},
    {"batch_loss": decorrelation},
    {"batch_loss": halves},
]


@pytest.mark.parametrize("losses", SUMS)
@pytest.mark.parametrize("n", [1, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_that_grow_with_the_batch_are_refused(losses, n, dtype):
    if dtype == torch.bfloat16 and "batch_loss" in losses:
        pytest.skip("beside so large a penalty, bfloat16 does not hold the sum")
    x, y = (tensor.to(dtype) for tensor in data(n))
    with pytest.raises(TaskError, match=r"loss: expected a mean over .* divide a sum by the batch's length"):
        Task.from_model(network().to(dtype), train=(x, y), **losses)


@pytest.mark.parametrize("losses", MEANS)
@pytest.mark.parametrize("n", [1, 40])
def test_means_and_losses_of_whole_batches_pass_without_a_word(losses, n):
    assert Task.from_model(network(), train=data(n), **losses).n == n


@pytest.mark.parametrize("scale", [0.0, 1e-6, 1e-3])
def test_a_fit_may_be_as_good_as_it_likes(scale):
    model, (x, y) = network(), data()
    targets = model(x).detach() + scale * y
    Task.from_model(model, train=(x, targets), loss="mse")
    if scale > 0:
        with pytest.raises(TaskError, match="expected a mean"):
            Task.from_model(model, train=(x, targets), loss=nn.MSELoss(reduction="sum"))


def test_confident_classes_pass():
    x, _ = data()
    model = network()
    with torch.no_grad():
        model.weight.mul_(100)
    Task.from_model(model, train=(x, model(x).argmax(1)), loss="cross_entropy")


def test_large_networks_are_tried_in_their_own_precision(monkeypatch):
    monkeypatch.setattr("groktrace.run.checks.MAX_DOUBLED", 3)
    seen = set()

    def loss(outputs, targets):
        seen.add(outputs.dtype)
        return functional.mse_loss(outputs, targets)

    check = probe(network(), data(), loss)
    check_mean(check)
    assert sample_axis_note(check, "train") is None
    assert seen == {torch.float32}
    for losses in SUMS:
        if "batch_loss" not in losses:
            with pytest.raises(TaskError, match="expected a mean"):
                check_mean(probe(network(), data(), **losses))


def test_batches_that_the_model_does_not_take_say_nothing():
    def one_size(outputs, targets):
        assert len(outputs) == 2
        return (outputs - targets).square().sum()

    check = probe(network(), data(), one_size)
    check_mean(check)
    assert sample_axis_note(check, "train") is None


own_generator = torch.Generator().manual_seed(0)


@pytest.mark.parametrize(
    "batch_loss",
    [
        lambda m, b: (m(b[0] + torch.randn(b[0].shape)) - b[1]).square().mean(),
        lambda m, b: (m(b[0] + torch.randn(b[0].shape, generator=own_generator)) - b[1]).square().mean(),
        lambda m, b: (m(b[0]) * random.random() - b[1]).square().mean(),
        lambda m, b: (m(b[0]) * np.random.rand() - b[1]).square().mean(),
        lambda m, b: (m(b[0] if torch.rand(()) < 0.5 else -b[0]) - b[1]).square().mean(),
        lambda m, b: (m(functional.dropout(b[0])) - b[1]).square().mean(),
    ],
)
def test_losses_that_draw_are_refused(batch_loss):
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist(), own_generator.get_state()
    with pytest.raises(
        TaskError, match=r"expected a function of the weights, got one that draws .* training=self.train"
    ):
        Task.from_model(network(), train=data(), batch_loss=batch_loss)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]
    assert torch.equal(own_generator.get_state(), states[3])


def test_losses_that_count_their_calls_are_refused():
    calls = []

    def annealed(outputs, targets):
        calls.append(None)
        return functional.mse_loss(outputs, targets) * len(calls)

    with pytest.raises(TaskError, match="or keeps count"):
        check_repeatable(probe(network(), data(), annealed))


@pytest.mark.parametrize(
    "batch_loss",
    [
        lambda m, b: (m(functional.dropout(b[0], p=0.0)) - b[1]).square().mean(),
        lambda m, b: (m(functional.dropout(b[0], training=m.training)) - b[1]).square().mean(),
        lambda m, b: (m(b[0]) - b[1]).square().mean() + 0 * torch.rand(()),
        lambda m, b: (
            (m(b[0] + torch.randn(b[0].shape, generator=torch.Generator().manual_seed(0))) - b[1]).square().mean()
        ),
    ],
)
def test_draws_that_do_not_matter_or_are_always_the_same_pass(batch_loss):
    Task.from_model(network(), train=data(), batch_loss=batch_loss)


def test_a_model_that_counts_is_left_as_it_was():
    class Counting(nn.Linear):
        def __init__(self):
            super().__init__(6, 3)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return super().forward(x)

    model = Counting()
    Task.from_model(model, train=data(), loss="mse")
    assert model.calls == 0


class Reader(nn.Module):
    """Reads words one after the other, or all at once."""

    def __init__(self, kind, batch_first):
        super().__init__()
        self.kind, self.axis = kind, 1 if batch_first else 0
        self.embedding, self.head = nn.Embedding(WORDS, 8), nn.Linear(8, WORDS)
        if kind in ("LSTM", "GRU"):
            self.body = getattr(nn, kind)(8, 8, batch_first=batch_first)
        elif kind != "words":
            self.body = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=batch_first)

    def forward(self, words):
        x = self.embedding(words)
        if self.kind in ("LSTM", "GRU"):
            x = self.body(x)[0]
        elif self.kind == "causal":
            x = self.body(x, src_mask=nn.Transformer.generate_square_subsequent_mask(words.shape[self.axis]).to(x))
        elif self.kind == "attention":
            x = self.body(x)
        return self.head(x)


def per_word(outputs, targets):
    return functional.cross_entropy(outputs.flatten(0, -2), targets.flatten())


@pytest.fixture
def sentences():
    torch.manual_seed(0)
    words = torch.randint(0, WORDS, (30, 8))
    return words[:, :-1], words[:, 1:]


@pytest.mark.parametrize("number", [30, 3])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "causal", "attention"])
@pytest.mark.parametrize("large", [False, True])
def test_data_whose_first_axis_is_time_are_told(sentences, kind, number, large, monkeypatch):
    if large:
        monkeypatch.setattr("groktrace.run.checks.MAX_DOUBLED", 0)
    x, y = (words[:number] for words in sentences)
    first, second = Reader(kind, batch_first=True), Reader(kind, batch_first=False)
    assert sample_axis_note(probe(first, (x, y), per_word), "train") is None
    note = sample_axis_note(probe(second, (x.T, y.T), per_word), "val")
    assert note is not None
    assert note.startswith(f"val: the first axis of every tensor is that of the samples, here {x.shape[1]}, but")
    assert f"here {number}. Are the data time-first?" in note
    assert "x.transpose(0, 1)" in note


def test_a_task_of_time_first_data_warns(sentences):
    x, y = sentences
    with pytest.warns(RuntimeWarning, match="groktrace: train: the first axis .* time-first"):
        Task.from_model(Reader("GRU", batch_first=False), train=(x.T, y.T), loss=per_word)
    Task.from_model(Reader("GRU", batch_first=False), train=(x, y), batch_loss=lambda m, b: per_word(m(b[0].T), b[1].T))


def test_words_that_know_nothing_of_each_other_may_be_counted_either_way(sentences):
    x, y = sentences
    for given in ((x, y), (x.T, y.T)):
        assert sample_axis_note(probe(Reader("words", True), given, per_word), "train") is None


def test_small_wide_data_are_not_time_first():
    x = torch.rand(35, 784)
    blur = nn.Sequential(nn.Unflatten(1, (1, -1)), nn.Conv1d(1, 1, 5, padding=2), nn.Flatten(1))
    for model in (nn.Linear(784, 784), blur):
        for loss in (nn.MSELoss(), centred):
            assert sample_axis_note(probe(model, (x, x), loss), "train") is None


def test_a_series_in_one_piece_is_told():
    class Series(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.GRU(3, 8, batch_first=True), nn.Linear(8, 2)

        def forward(self, x):
            return self.head(self.body(x)[0])

    entries = [(torch.randn(9, 3), torch.randn(9, 2)) for _ in range(5)]
    note = sample_axis_note(probe(Series(), entries, nn.MSELoss()), "train")
    assert note is not None
    assert "the loss changes with their order" in note
    assert "torch.stack" in note
    stacked = tuple(torch.stack(column) for column in zip(*entries, strict=True))
    assert sample_axis_note(probe(Series(), stacked, nn.MSELoss()), "train") is None


def test_data_of_a_fixed_length_whose_first_axis_is_time_are_refused(sentences):
    x, y = sentences
    model = nn.Sequential(nn.Embedding(WORDS, 2), nn.Flatten(1), nn.Linear(14, WORDS))

    def last(net, batch):
        return functional.cross_entropy(net(batch[0].T), batch[1][-1])

    with pytest.raises(TaskError, match=r"they take the second as such; give the data as x.transpose\(0, 1\)"):
        Task.from_model(model, train=(x.T, y.T), batch_loss=last)


def test_flags_of_the_model_stay(sentences):
    model = Reader("causal", True)
    batch, _ = collect(sentences, "train", 100, 0)
    forward = make_forward(model, per_word, None, batch)
    with evaluation_mode(forward):
        assert sample_axis_note(LossProbe(forward, batch), "train") is None
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("norm", [nn.utils.parametrizations.spectral_norm, nn.utils.spectral_norm])
def test_spectral_norms_are_told_of(norm):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), norm(nn.Linear(4, 1)))
    with pytest.warns(RuntimeWarning, match="groktrace: model: 2 has a spectral_norm, whose vectors u and v stay"):
        Task.from_model(model, loss="mse", train=(torch.randn(8, 3), torch.randn(8, 1)))
    alone = norm(nn.Linear(4, 1))
    assert spectral_norm_note(alone).startswith(f"model: {type(alone).__name__} has a spectral_norm")
    plain = nn.Sequential(nn.Linear(3, 4), nn.utils.parametrizations.weight_norm(nn.Linear(4, 1)))
    assert spectral_norm_note(plain) is None


def slope_loss(model, batch):
    """Of a network whose slope is minus its output."""
    x = batch[0].requires_grad_()
    u = model(x)
    (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    return (slope + u).square().mean()


def slope_loss_as_advised(model, batch):
    with torch.enable_grad():
        return slope_loss(model, [batch[0].clone()])


def test_derivatives_with_respect_to_inputs_are_advised_of():
    x = (torch.linspace(0, 1, 20)[:, None],)
    with pytest.raises(TaskError, match=r"compute these under `with torch.enable_grad\(\):` and on x.clone\(\)"):
        Task.from_model(network(1, 1), train=x, batch_loss=slope_loss)
    torch.manual_seed(0)
    found = groktrace.estimate_llc(
        nn.Linear(1, 1), None, x, batch_loss=slope_loss_as_advised, nbeta=100.0, localization=1.0
    )
    assert found.llc is not None
