import math

import pytest
import torch

from groktrace.analysis.measurement.hessian import HessianMetrics, measure_hessian
from groktrace.analysis.measurement.measure import Objective
from groktrace.analysis.running.setup import weight_layout
from groktrace.run.task import Task
from groktrace.sampling.settings import SamplingSettings


def test_trace_and_top_agree_with_the_exact_hessian_of_each_snapshot(teacher):
    model, train = teacher(5, 4, 3, n=60)
    task = Task.from_model(model, loss="mse", train=train)
    here = {name: weight.detach() for name, weight in model.named_parameters()}
    snapshots = [here, {name: 1.3 * weight for name, weight in here.items()}]
    layout = weight_layout({name: (tuple(weight.shape), weight.dtype, True) for name, weight in here.items()})
    objective = Objective.of(task, layout, SamplingSettings(), here, torch.device("cpu"))
    found = measure_hessian(objective, snapshots, [0, 10])
    assert [hessian.step for hessian in found] == [0, 10]
    for hessian, weights in zip(found, snapshots, strict=True):
        flat = layout.flatten(weights).double()
        tensors = [tensor.double() for tensor in train]
        exact = torch.autograd.functional.hessian(lambda w, t=tensors: task.forward(layout.unflatten(w), t)[0], flat)
        assert abs(hessian.hessian_trace - float(exact.trace())) < 3 * hessian.hessian_trace_stderr
        assert hessian.hessian_trace_stderr < 0.1 * hessian.hessian_trace
        assert hessian.hessian_top == pytest.approx(float(torch.linalg.eigvalsh(exact).abs().max()), rel=0.01)


def test_what_is_not_finite_is_unknown(teacher):
    model, train = teacher(5, 4, 3, n=60)
    task = Task.from_model(model, loss="mse", train=train)
    here = {name: weight.detach() for name, weight in model.named_parameters()}
    layout = weight_layout({name: (tuple(weight.shape), weight.dtype, True) for name, weight in here.items()})
    objective = Objective.of(task, layout, SamplingSettings(), here, torch.device("cpu"))
    broken = {name: torch.full_like(weight, math.nan) for name, weight in here.items()}
    whole, found = measure_hessian(objective, [here, broken], [0, 10])
    assert found == HessianMetrics(10, None, None, None)
    assert whole.hessian_trace > 0
    assert HessianMetrics.from_dict(found.to_dict()) == found


@pytest.mark.parametrize(
    "change", [{"step": 1.5}, {"hessian_top": "3"}, {"hessian_trace": True}, {"hessian_trace_stderr": -1.0}]
)
def test_damaged_records_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        HessianMetrics.from_dict({**HessianMetrics(1, 2.0, 3.0, 4.0).to_dict(), **change})
