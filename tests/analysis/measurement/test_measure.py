import math

import pytest
import torch
from torch import nn

from groktrace.analysis.measurement.measure import Objective, SnapshotMetrics
from groktrace.analysis.measurement.predictions import correct_predictions
from groktrace.run.task import Task
from groktrace.sampling.settings import SamplingSettings
from groktrace.sampling.weights import WeightLayout

CPU = torch.device("cpu")


def accuracy(outputs, targets):
    return correct_predictions(outputs, targets).float().mean().item()


def test_accuracy_of_class_indices_one_hot_rows_and_sequences():
    outputs = torch.tensor([[0.0, 1.0], [1.0, 0.0], [3.0, 2.0], [0.0, 5.0]])
    assert accuracy(outputs, torch.tensor([1, 0, 1, 1])) == 0.75
    assert accuracy(outputs, torch.nn.functional.one_hot(torch.tensor([1, 0, 1, 1]), 2).float()) == 0.75
    sequences = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0))
    tokens = sequences.argmax(-1)
    tokens[0, 0] = (tokens[0, 0] + 1) % 5
    assert accuracy(sequences, tokens) == pytest.approx(20 / 21)
    assert accuracy(sequences.movedim(-1, 1), tokens) == pytest.approx(20 / 21)
    tokens[0, 0] = -100  # padding is not counted
    assert accuracy(sequences, tokens) == 1.0


def test_no_accuracy_without_classes():
    assert correct_predictions(torch.randn(5, 1), torch.randn(5, 1)) is None
    assert correct_predictions(torch.randn(5, 3), torch.randn(5, 3)) is None
    assert correct_predictions(torch.randn(5), torch.zeros(5, dtype=torch.long)) is None


def centred(outputs, targets):
    residuals = targets - outputs
    return 0.5 * (residuals - residuals.mean(0)).square().sum() / len(residuals)


def measured(loss, bias):
    model = nn.Linear(3, 3)
    with torch.no_grad():
        model.weight.copy_(torch.eye(3))
        model.bias.copy_(torch.tensor(bias))
    x = torch.eye(3).repeat(4, 1)
    task = Task.from_model(model, loss=loss, train=(x, x), val=(x[:6], x[:6]))
    layout = WeightLayout(("weight", "bias"), ((3, 3), (3,)))
    weights = {name: p.detach() for name, p in model.named_parameters()}
    return Objective.of(task, layout, SamplingSettings(), weights, CPU).metrics([weights, weights], [0, 7])


def test_predictions_are_read_without_the_offset_that_the_loss_cannot_see():
    first, second = measured(centred, [0.0, 9.0, 0.0])
    assert (first.step, second.step) == (0, 7)
    assert first.train_loss == pytest.approx(0, abs=1e-10)
    assert (first.train_accuracy, first.val_accuracy) == (1.0, 1.0)


def test_an_offset_that_the_loss_sees_counts():
    first, _ = measured("mse", [0.0, 9.0, 0.0])
    assert first.train_loss == pytest.approx(27)
    assert first.train_accuracy == pytest.approx(1 / 3)


def test_norm_and_curvature():
    first, _ = measured("mse", [0.0, 0.0, 0.0])
    assert first.norm_squared == pytest.approx(3)
    # Per output ⅔·mean of (x, 1)(x, 1)ᵀ: top eigenvalue of [[⅓I, ⅓1], [⅓1ᵀ, 1]] is 4/3.
    assert first.top_curvature == pytest.approx(2 / 3 * 4 / 3, rel=0.03)


def test_metrics_survive_being_written_down():
    whole = SnapshotMetrics(5, 0.1, None, None, 0.5, 3.0, 2.0)
    assert SnapshotMetrics.from_dict(whole.to_dict()) == whole
    broken = SnapshotMetrics.from_dict(SnapshotMetrics(5, math.nan, None, math.inf, None, 3.0, math.nan).to_dict())
    assert math.isnan(broken.train_loss)
    assert math.isnan(broken.top_curvature)
    assert broken.val_loss is None


@pytest.mark.parametrize("name", ["train_loss", "val_accuracy", "norm_squared", "train_loss_stderr"])
@pytest.mark.parametrize("number", [True, "1", 10**400, [1]])
def test_what_is_no_number_is_refused(name, number):
    kept = SnapshotMetrics(5, 0.1, None, None, 0.5, 3.0, 2.0).to_dict()
    with pytest.raises(ValueError, match=name):
        SnapshotMetrics.from_dict({**kept, name: number})


@pytest.mark.parametrize("step", [-1, 10**12, 2**63, 1.0, True, None, "1"])
def test_what_is_no_step_of_a_snapshot_is_refused(step):
    kept = SnapshotMetrics(10**12 - 1, 0.1, None, None, 0.5, 3.0, 2.0).to_dict()
    assert SnapshotMetrics.from_dict(kept).step == 10**12 - 1
    with pytest.raises(ValueError, match="step"):
        SnapshotMetrics.from_dict({**kept, "step": step})


@pytest.mark.parametrize("name", ["train_loss", "val_loss", "norm_squared", "top_curvature"])
def test_metrics_that_are_not_whole_are_refused(name):
    kept = SnapshotMetrics(5, 0.1, None, None, 0.5, 3.0, 2.0).to_dict()
    del kept[name]
    with pytest.raises(ValueError, match=f"'{name}' is missing"):
        SnapshotMetrics.from_dict(kept)


def test_where_the_loss_shifts_the_targets_itself_its_own_comparison_counts():
    tokens = torch.randint(5, (6, 8), generator=torch.Generator().manual_seed(0))
    model = nn.Embedding.from_pretrained(torch.eye(5), freeze=False)  # says each token again
    weights = {"weight": model.weight.detach()}

    def shifted(outputs, targets):
        return nn.functional.cross_entropy(outputs[:, :-1].flatten(0, 1), targets[:, 1:].flatten())

    def by_hand(outputs, targets):
        return -outputs[:, :-1].log_softmax(-1).gather(-1, targets[:, 1:, None]).mean()

    # Compared where they stand, all would be right.
    same = float((tokens[:, :-1] == tokens[:, 1:]).float().mean())
    for loss, expected in ((shifted, pytest.approx(same)), (by_hand, None)):
        task = Task.from_model(model, loss=loss, train=(tokens, tokens))
        objective = Objective.of(task, WeightLayout(("weight",), ((5, 5),)), SamplingSettings(), weights, CPU)
        (found,) = objective.metrics([weights], [0])
        assert found.train_accuracy == expected
        assert found.train_loss > 1
