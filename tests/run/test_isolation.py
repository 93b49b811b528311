import random

import numpy as np
import pytest
import torch
from torch import nn

from groktrace.run.isolation import seeded_rng, without_side_effects


def draw():
    return torch.rand(()).item(), random.random(), np.random.rand()


def test_what_is_drawn_follows_the_seed_and_moves_nothing():
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    drawn = []
    for seed in (1, 1, 2):
        with seeded_rng(seed):
            drawn.append(draw())
    assert drawn[0] == drawn[1]
    assert all(a != b for a, b in zip(drawn[1], drawn[2], strict=True))
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert (states[2] == np.random.get_state()[1]).all()


def test_generators_of_the_users_own_are_put_back():
    own, other = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)
    before = own.get_state(), other.get_state()
    with without_side_effects(nn.Linear(1, 1)):
        torch.randn(3, generator=own)
        torch.empty(3).normal_(generator=other)
        torch.randperm(3, generator=own)
    assert torch.equal(own.get_state(), before[0])
    assert torch.equal(other.get_state(), before[1])


def test_side_effects_are_undone_on_errors():
    model = nn.BatchNorm1d(1)

    def fail():
        with without_side_effects(model):
            model.running_mean.fill_(torch.rand(1).item())
            raise ZeroDivisionError

    state = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError):
        fail()
    assert model.running_mean == 0
    assert torch.equal(state, torch.get_rng_state())
