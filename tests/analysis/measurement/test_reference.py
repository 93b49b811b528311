import math

import pytest
import torch
from torch import nn

from groktrace import theory
from groktrace.analysis.measurement.reference import Reference, check_reference, jacobian_reference
from groktrace.analysis.running.setup import weight_layout
from groktrace.errors import SettingsError
from groktrace.run.task import Task

CPU = torch.device("cpu")


def centred(outputs, targets):
    residuals = targets - outputs
    return 0.5 * (residuals - residuals.mean(0)).square().sum() / len(residuals)


def rank_of(model, train, loss, patterns=None):
    task = Task.from_model(model, loss=loss, train=train)
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    layout = weight_layout({name: (tuple(w.shape), w.dtype, True) for name, w in weights.items()}, patterns)
    return jacobian_reference(task, layout, weights, 7, CPU)


def test_half_the_rank_is_the_closed_form_at_a_generic_teacher(teacher):
    model, train = teacher(5, 3, 4, n=80)
    found = rank_of(model, train, "mse")
    assert found.llc == theory.quadratic_llc(5, 3, 4).llc
    assert (found.source, found.step, found.rank) == ("jacobian", 7, int(2 * found.llc))
    assert 1e-8 < found.tolerance < 1e-5
    assert found.gap is None or found.gap > 1e3


def test_a_loss_that_ignores_a_constant_gets_the_centred_rank(teacher):
    model, train = teacher(4, 3, 20, n=10)
    assert rank_of(model, train, "mse").rank == 3 * 10
    assert rank_of(model, train, centred).rank == 3 * 9


def test_only_the_sampled_weights_count(teacher):
    model, train = teacher(5, 4, 3, n=80)
    assert rank_of(model, train, "mse", ["V"]).rank == 4 * 3


def test_a_network_that_shows_no_outputs_is_refused():
    model = nn.Linear(3, 2)
    train = (torch.randn(8, 3), torch.randn(8, 2))
    task = Task.from_model(model, batch_loss=lambda m, batch: (m(batch[0]) - batch[1]).square().mean(), train=train)
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    layout = weight_layout({name: (tuple(w.shape), w.dtype, True) for name, w in weights.items()})
    with pytest.raises(SettingsError, match=r"reference: no Jacobian rank of this run, give a number.*batch_loss"):
        jacobian_reference(task, layout, weights, 0, CPU)


@pytest.mark.parametrize("value", [None, "jacobian", 3, 0.5])
def test_references_that_may_be_asked_for(value):
    check_reference(value)


@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf, True, "rank", [3]])
def test_other_references_are_refused(value):
    with pytest.raises(SettingsError, match="reference: expected a positive number or 'jacobian', got"):
        check_reference(value)


def test_references_survive_their_own_json():
    for reference in (Reference(3.0, "value"), Reference(4.5, "jacobian", 100, 9, 1e-6, 1e4)):
        assert Reference.from_dict(reference.to_dict()) == reference


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"llc": None}, "llc: expected float, got None"),
        ({"source": "guess"}, r"source: expected Literal\['value', 'jacobian'\], got 'guess'"),
        ({"rank": "9"}, "rank: expected int, got '9'"),
        ({"more": 1}, "'more' is unknown among llc, source, step"),
    ],
)
def test_damaged_references_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Reference.from_dict({**Reference(3.0, "value").to_dict(), **change})
