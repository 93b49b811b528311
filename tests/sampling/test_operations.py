"""What cannot be written down of a function."""

import pytest
import torch

from groktrace.sampling.operations import CannotPlanError, OperationTrace, TracedGraph


def record(function, *arguments):
    with torch.no_grad(), OperationTrace(arguments) as recorder:
        results = function(*arguments)
    return TracedGraph(recorder, results)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: (x + torch.randn_like(x),),
        lambda x: (x[x > 0],),
        lambda x: (x * x.sum().item(),),
        lambda x: (x.clone().add_(1),),
    ],
    ids=["random", "unknown size", "value", "in place"],
)
def test_what_cannot_be_repeated_is_refused(function):
    with pytest.raises(CannotPlanError):
        record(function, torch.ones(3))
