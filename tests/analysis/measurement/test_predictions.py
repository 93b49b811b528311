"""Accuracies of models whose outputs do not lie beside their targets."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional

import groktrace
from groktrace.analysis.measurement.predictions import batch_effect, count_targets, loss_and_hits, measure_losses
from groktrace.run.task import Task

CPU = torch.device("cpu")
TOKENS = torch.randint(6, (30, 5), generator=torch.Generator().manual_seed(0))


class Sequence(nn.Module):
    """Logits for each position, from the sum of what came so far."""

    def __init__(self, form="plain"):
        super().__init__()
        torch.manual_seed(1)
        self.embed, self.head, self.aside = nn.Embedding(6, 8), nn.Linear(8, 6), nn.Linear(8, 6)
        self.form = form

    def forward(self, x):
        hidden = self.embed(x).cumsum(1)
        logits = self.head(hidden)
        return {
            "plain": logits,
            "tuple": (logits, hidden),
            "dict": {"out": logits},
            "heads": (logits, self.aside(hidden)),
        }[self.form]


def last(outputs, targets):
    return functional.cross_entropy(outputs[:, -1], targets)


def of_tuple(outputs, targets):
    return functional.cross_entropy(outputs[0].movedim(-1, 1), targets)


def of_dict(outputs, targets):
    return functional.nll_loss(outputs["out"].log_softmax(-1).flatten(0, 1), targets.flatten())


def ignoring(outputs, targets):
    targets = torch.where(targets == 2, -1, targets)
    return functional.cross_entropy(outputs.flatten(0, 1), targets.flatten(), ignore_index=-1)


def masked(outputs, targets):
    losses = functional.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="none")
    mask = (targets.flatten() < 3).float()
    return (losses * mask).sum() / mask.sum()


def of_probabilities(outputs, targets):
    spread = 0.7 * functional.one_hot(targets, 6) + 0.05
    return functional.cross_entropy(outputs.flatten(0, 1), spread.flatten(0, 1), label_smoothing=0.1)


def shifted(outputs, targets):
    return functional.cross_entropy(outputs[:, :-1].flatten(0, 1), targets[:, 1:].flatten())


def with_a_look_aside(outputs, targets):
    with torch.no_grad():
        functional.cross_entropy(outputs[:, 0], targets[:, 0])  # of a metric, say
    return shifted(outputs, targets) + 0 * functional.cross_entropy(outputs[:, 0], targets[:, 0])


def rest(hits, keep=None):
    return float((hits if keep is None else hits[keep]).float().mean())


CASES = {
    "last token": (last, "plain", TOKENS[:, -1], lambda said: rest(said[:, -1] == TOKENS[:, -1])),
    "tuple": (of_tuple, "tuple", TOKENS, lambda said: rest(said == TOKENS)),
    "dict, log-probabilities": (of_dict, "dict", TOKENS, lambda said: rest(said == TOKENS)),
    "ignored": (ignoring, "plain", TOKENS + 0, lambda said: rest(said == TOKENS, TOKENS != 2)),
    "mask": (masked, "plain", TOKENS + 0, lambda said: rest(said == TOKENS, TOKENS < 3)),
    "probabilities": (of_probabilities, "plain", TOKENS + 0, lambda said: rest(said == TOKENS)),
    "next token": (shifted, "plain", TOKENS, lambda said: rest(said[:, :-1] == TOKENS[:, 1:])),
    "metric beside": (with_a_look_aside, "plain", TOKENS, lambda said: rest(said[:, :-1] == TOKENS[:, 1:])),
}


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_accuracy_is_read_at_the_cross_entropy(name, recorded, tmp_path):
    loss, form, targets, truth = CASES[name]
    model = Sequence(form)
    expected = truth(
        {"plain": lambda o: o, "tuple": lambda o: o[0], "dict": lambda o: o["out"]}[form](model(TOKENS)).argmax(-1)
    )
    assert 0 < expected < 1
    if recorded:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with groktrace.watch(model, optimizer, train=(TOKENS, targets), loss=loss, out=tmp_path / "run"):
            pass
        run = groktrace.open_run(tmp_path / "run")
        task, weights = run.task, run.snapshots[0].load()
    else:
        task = Task.from_model(model, train=(TOKENS, targets), loss=loss)
        weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        plain = float(task.forward(weights, task.train.tensors)[0])
    for together in (None, 7):
        found = measure_losses(task, weights, CPU, together)
        train_loss, accuracy = found["train_loss"], found["train_accuracy"]
        assert accuracy == pytest.approx(expected)
        if together is None:
            assert train_loss == plain


@pytest.mark.parametrize("recorded", [True, False])
def test_a_model_with_a_loss_of_its_own(recorded, tmp_path):
    model = Sequence()

    def own(model, batch):
        return shifted(model(batch["x"]), batch["x"]) + 1e-3 * model.head.weight.square().sum()

    expected = rest(model(TOKENS)[:, :-1].argmax(-1) == TOKENS[:, 1:])
    task = Task.from_model(model, train={"x": TOKENS}, val={"x": TOKENS[:1]}, batch_loss=own)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    if recorded:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        out = tmp_path / "run"
        with groktrace.watch(model, optimizer, train={"x": TOKENS}, val={"x": TOKENS[:1]}, batch_loss=own, out=out):
            pass
        task = groktrace.open_run(out).task
    found = measure_losses(task, weights, CPU)
    train, val = found["train_accuracy"], found["val_accuracy"]
    assert train == pytest.approx(expected)
    assert val == pytest.approx(rest(model(TOKENS[:1])[:, :-1].argmax(-1) == TOKENS[:1, 1:]))


def test_of_heads_that_differ_it_is_not_known_which_is_meant():
    def both(outputs, targets):
        return sum(functional.cross_entropy(output[:, -1], targets) for output in outputs)

    def twice(outputs, targets):
        return sum(functional.cross_entropy(outputs[0][:, -1], targets) for _ in range(2))

    model = Sequence("heads")
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    truth = rest(model(TOKENS)[0][:, -1].argmax(-1) == TOKENS[:, -1])
    for loss, expected in ((both, None), (twice, pytest.approx(truth))):
        task = Task.from_model(model, train=(TOKENS, TOKENS[:, -1]), loss=loss)
        assert measure_losses(task, weights, CPU)["train_accuracy"] == expected


def test_what_is_no_cross_entropy_gives_no_hits():
    model = nn.Linear(4, 3)
    x = torch.randn(5, 4)
    task = Task.from_model(model, train=(x, torch.randn(5, 3)), loss="mse")
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    loss, outputs, hits = loss_and_hits(task.forward, weights, task.train.tensors)
    assert loss == functional.mse_loss(model(x), task.train.tensors[1]).item()
    assert torch.equal(outputs, model(x))
    assert not outputs.requires_grad
    assert hits is None


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_where_small_outputs_mean_the_class_the_smallest_is_the_prediction(sign):
    """As of squared distances to prototypes, in a loss that calls no cross-entropy."""

    def loss(outputs, targets):
        return -functional.log_softmax(sign * outputs, 1)[torch.arange(len(targets)), targets].mean()

    torch.manual_seed(0)
    model, x = nn.Linear(4, 3), torch.randn(60, 4)
    y = (sign * model(x).detach()).argmax(1)
    y[:15] = (y[:15] + 1) % 3
    task = Task.from_model(model, train=(x, y), loss=loss)
    assert measure_losses(task, dict(model.state_dict()), CPU)["train_accuracy"] == 0.75


def test_outputs_that_overshoot_their_targets_are_still_the_largest():
    """Of squares to one-hot rows the gradient at a fitted target has either sign."""

    def loss(outputs, targets):
        return functional.mse_loss(outputs, functional.one_hot(targets, 3).float())

    torch.manual_seed(0)
    model, x = nn.Linear(4, 3), torch.eye(4)[torch.arange(40) % 4]
    y = torch.arange(40) % 4 % 3
    with torch.no_grad():
        model.weight.copy_(functional.one_hot(torch.arange(4) % 3, 3).float().T + 0.05 * torch.randn(3, 4))
        model.bias.zero_()
    task = Task.from_model(model, train=(x, y), loss=loss)
    assert measure_losses(task, dict(model.state_dict()), CPU)["train_accuracy"] == 1.0


def test_targets_are_the_predictions_that_the_loss_compares():
    model, line = Sequence(), nn.Linear(4, 3)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    of_line = {name: parameter.detach() for name, parameter in line.named_parameters()}
    x, length = torch.randn(20, 4), TOKENS.shape[1]

    def all_but_first(outputs, targets):
        return functional.cross_entropy(outputs[:, :-1].flatten(0, 1), targets[:, 1:].flatten())

    for loss, targets, expected in ((last, TOKENS[:, -1], 1), (all_but_first, TOKENS, length - 1)):
        task = Task.from_model(model, train=(TOKENS, targets), loss=loss)
        assert count_targets(task, weights, CPU) == expected
        assert count_targets(task, weights, CPU, together=2) == expected
    assert count_targets(Task.from_model(line, train=(x, torch.randn(20, 3)), loss="mse"), of_line, CPU) == 3
    assert (
        count_targets(Task.from_model(line, train=(x, torch.arange(20) % 3), loss="cross_entropy"), of_line, CPU) == 1
    )


def test_a_loss_of_samples_beside_each_other_is_told_from_a_mean_over_samples():
    model, x = nn.Linear(4, 4), torch.randn(300, 4)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def contrastive(outputs, targets):
        return functional.cross_entropy(outputs @ targets.T, torch.arange(len(outputs)))

    def weighted(outputs, targets):
        return functional.cross_entropy(outputs, targets.argmax(1), weight=torch.tensor([1.0, 2.0, 3.0, 4.0]))

    effects = {}
    for loss in (contrastive, weighted, functional.mse_loss):
        task = Task.from_model(model, train=(x, x.sort(0).values), loss=loss)
        effects[loss.__name__] = batch_effect(task, weights, CPU)
    assert effects.pop("contrastive") > 0.1
    assert effects == {"weighted": pytest.approx(0, abs=0.03), "mse_loss": pytest.approx(0, abs=1e-5)}
    one_size = replace(task, forward=lambda named, tensors: task.forward(named, [t.view(300, 4) for t in tensors]))
    assert batch_effect(one_size, weights, CPU) == 0
    assert batch_effect(Task.from_model(model, train=(x[:7], x[:7]), loss=contrastive), weights, CPU) == 0
    # Of outputs that are all zero the loss is log N: of 256 samples and of 64.
    none = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    task = Task.from_model(model, train=(x, x.sort(0).values), loss=contrastive)
    assert batch_effect(task, none, CPU) == pytest.approx(0.25, rel=1e-5)


def test_a_compiled_model_is_read_too():
    model = Sequence()
    weights = {f"_orig_mod.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    task = Task.from_model(torch.compile(model, backend="eager"), train=(TOKENS, TOKENS[:, -1]), loss=last)
    expected = rest(model(TOKENS)[:, -1].argmax(-1) == TOKENS[:, -1])
    assert measure_losses(task, weights, CPU)["train_accuracy"] == pytest.approx(expected)
