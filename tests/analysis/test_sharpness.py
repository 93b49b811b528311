import math

import pytest
import torch

from groktrace.analysis.estimate import weight_layout
from groktrace.analysis.evaluation import training_loss
from groktrace.analysis.sharpness import Sharpness, measure_sharpness
from groktrace.run.task import Task


def test_trace_and_top_agree_with_the_exact_hessian_of_each_snapshot(teacher):
    model, train = teacher(5, 4, 3, n=60)
    task = Task.from_model(model, loss="mse", train=train)
    here = {name: weight.detach() for name, weight in model.named_parameters()}
    snapshots = [here, {name: 1.3 * weight for name, weight in here.items()}]
    layout = weight_layout({name: (tuple(weight.shape), weight.dtype, True) for name, weight in here.items()})
    loss = training_loss(task, layout, here, torch.device("cpu"))
    found = measure_sharpness(loss, snapshots, [0, 10], seed=0)
    assert [each.step for each in found] == [0, 10]
    for each, weights in zip(found, snapshots, strict=True):
        flat = layout.flatten(weights).double()
        tensors = [tensor.double() for tensor in train]
        exact = torch.autograd.functional.hessian(lambda w, t=tensors: task.forward(layout.unflatten(w), t)[0], flat)
        assert abs(each.hessian_trace - float(exact.trace())) < 3 * each.hessian_trace_stderr
        assert each.hessian_trace_stderr < 0.1 * each.hessian_trace
        assert each.hessian_top == pytest.approx(float(torch.linalg.eigvalsh(exact).abs().max()), rel=0.01)


def test_what_is_not_finite_is_unknown(teacher):
    model, train = teacher(5, 4, 3, n=60)
    task = Task.from_model(model, loss="mse", train=train)
    here = {name: weight.detach() for name, weight in model.named_parameters()}
    layout = weight_layout({name: (tuple(weight.shape), weight.dtype, True) for name, weight in here.items()})
    loss = training_loss(task, layout, here, torch.device("cpu"))
    broken = {name: torch.full_like(weight, math.nan) for name, weight in here.items()}
    whole, found = measure_sharpness(loss, [here, broken], [0, 10], seed=0)
    assert found == Sharpness(10, None, None, None)
    assert whole.hessian_trace > 0
    assert Sharpness.from_dict(found.to_dict()) == found


@pytest.mark.parametrize(
    "change", [{"step": 1.5}, {"hessian_top": "3"}, {"hessian_trace": True}, {"hessian_trace_stderr": -1.0}]
)
def test_damaged_records_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        Sharpness.from_dict({**Sharpness(1, 2.0, 3.0, 4.0).to_dict(), **change})
