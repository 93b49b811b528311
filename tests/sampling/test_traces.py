"""When chains count as gone."""

import math

import torch

from groktrace.sampling.traces import Traces


def test_chains_that_are_far_out_have_diverged_however_finite():
    def traces(pull, spread):
        values = torch.ones(20, 2)
        return Traces(values, pull * values, spread * values, values[:, :1], 0.1, 0)

    assert not traces(30.0, 30.0).diverged(60)
    assert not traces(-5000.0, 5060.0).diverged(60)  # far from a minimum, in equilibrium
    assert traces(1e27, 1e20).diverged(60)
    assert traces(30.0, 1e4).diverged(60)
    assert traces(math.nan, 30.0).diverged(60)
    one = traces(30.0, 30.0)
    one.spread[:, 1] = 1e4
    assert one.diverged(60)
