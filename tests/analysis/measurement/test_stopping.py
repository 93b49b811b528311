"""How many draws are needed, by draws that are known beforehand."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from groktrace.analysis.measurement.stopping import needed_centred, needed_of_large_sets
from groktrace.sampling.kernels.baoab import BAOAB
from groktrace.sampling.kernels.sgld import SGLD
from groktrace.sampling.traces import Traces


def test_where_nbeta_follows_draws_grow_until_the_centred_estimate_is_precise():
    def traces(mean, spread, draws=4000):
        noise = torch.randn(draws, 1, generator=torch.Generator().manual_seed(0)).double()
        paired = mean + spread * (noise - noise.mean()) / noise.std()
        excess = torch.zeros(draws, 2).double()  # says nothing, off a minimum
        return Traces(excess, excess, excess, paired, 0.1, 0)

    error = 4000**0.5  # of the mean, times this
    assert needed_centred(traces(100.0, 1.5 * error), 0.02) < 1
    assert 1 < needed_centred(traces(100.0, 2.7 * error), 0.02) <= 2.7**2
    assert needed_centred(traces(100.0, 12.0 * error), 0.02) == 1  # sixteen times as many would not do
    assert needed_centred(traces(-100.0, 2.7 * error), 0.02) == 1
    # Few draws do not tell.
    assert needed_centred(traces(100.0, 60.0, 16), 0.02) > 16
    assert needed_centred(traces(100.0, 90.0, 32), 0.02) == 1


@pytest.mark.parametrize(("burn_in", "slow", "most"), [(8, 1.0, 2.0), (8, 2.0, 4.5), (24, 1.0, 1.0), (60, 1.0, -1.25)])
def test_off_a_minimum_snapshots_of_large_sets_get_few_steps_in_all(burn_in, slow, most):
    excess = torch.full((16, 2), -50.0).double()  # the loss falls, as on a slope
    slope = Traces(excess, excess, excess, 100 + excess, 0.1, burn_in, slow=slow)
    quick = partial(SGLD().relaxation, localization=100.0)
    assert needed_of_large_sets(slope, lambda traces: 9.0, quick) == most
    assert needed_of_large_sets(slope, lambda traces: 0.5, quick) == 0.5
    basin = replace(slope, delta_loss=-excess, virial=-2 * excess)
    assert needed_of_large_sets(basin, lambda traces: 9.0, quick) == 9


def test_draws_of_large_sets_take_a_relaxation_time_at_least_but_not_off_a_minimum():
    excess = torch.full((16, 2), 50.0).double()
    basin = Traces(excess, 2 * excess, excess, excess, 0.01, 8)
    for halvings in (0, 2):
        steps = BAOAB().relaxation(0.01, 1.0, halvings)
        found = replace(basin, halvings=halvings)
        slow = partial(BAOAB().relaxation, localization=1.0)
        assert needed_of_large_sets(found, lambda traces: 0.5, slow) == pytest.approx(steps / 16)
    assert needed_of_large_sets(basin, lambda traces: 9.0, slow) == 9
    slope = replace(basin, delta_loss=-excess, virial=-excess, centred_draws=100 + excess)
    assert needed_of_large_sets(slope, lambda traces: 0.5, slow) == 2
