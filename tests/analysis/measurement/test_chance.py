import math

import pytest
import torch
from torch import nn

from groktrace.analysis.measurement.chance import chance_losses, level_of_chance
from groktrace.run.task import Task

CPU = torch.device("cpu")


def test_chance_is_the_loss_of_a_network_without_weights():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(1000, 4, generator=generator), torch.randint(5, (1000,), generator=generator)
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 5))
    task = Task.from_model(model, train=(x, y), loss="cross_entropy")
    weights = {name: p.detach() for name, p in model.named_parameters()}
    blind, own = chance_losses(task, weights, CPU)
    assert blind == pytest.approx(math.log(5))
    assert own == pytest.approx(task.forward(weights, task.train.tensors)[0].item(), rel=0.1)
    few = chance_losses(task, weights, CPU, together=7)
    assert few[0] == pytest.approx(math.log(5))
    assert chance_losses(task, weights, CPU, untrained=False) == (blind,)


def test_where_no_weights_make_no_sense_the_first_snapshot_stands_for_chance():
    def of_directions(outputs, targets):
        return (outputs / outputs.norm() - targets).square().mean()

    x = torch.randn(20, 4)
    model = nn.Linear(4, 4, bias=False)
    task = Task.from_model(model, train=(x, x), loss=of_directions)
    (own,) = chance_losses(task, {"weight": model.weight.detach()}, CPU)
    assert own == pytest.approx(of_directions(model(x), x).item())


def test_a_network_climbs_to_the_first_that_is_worse():
    assert level_of_chance((2.0, 4.0), 1.0) == 2.0
    assert level_of_chance((2.0, 4.0), 3.0) == 4.0  # all zeros would do better
    assert level_of_chance((2.0,), 2.0) == math.inf
