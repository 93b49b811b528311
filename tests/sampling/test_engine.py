"""Restarts of chains, by chains whose traces are known beforehand."""

from dataclasses import dataclass, replace

import pytest
import torch

from groktrace.sampling.engine import Target, sample_with_restarts
from groktrace.sampling.settings import ResolvedSettings
from groktrace.sampling.traces import Traces

DIMENSION = 40
FULL, HALF = 1e-3, 5e-4
SETTINGS = ResolvedSettings(method="baoab", chains=2, batch_size=32, draws=16)


@dataclass
class Prepared:
    """Chains that draw what they are given."""

    found: Traces
    lengths = ((8, 16),)
    made = 24

    def begin(self) -> list[Traces]:
        """All draws."""
        return [self.found]

    def extend(self, counts):
        """Never asked for."""
        raise AssertionError(counts)

    def has_left(self, traces: Traces) -> bool:
        """As a stack of chains tells it."""
        return traces.diverged(DIMENSION)


def drawn(step_size: float, *, heating: float, spike: bool, left: bool = False) -> Traces:
    """Traces of equilibrium, if not of chains that one draw kicked up, or that left."""
    generator = torch.Generator().manual_seed(0)
    virial, restraint = (DIMENSION / 2 + torch.randn(2, 16, 2, generator=generator)).unbind()
    if spike:
        virial[5, 0] = 30 * DIMENSION
    if left:
        virial[-1, 0] = torch.inf
    return Traces(virial / 2, virial, restraint, restraint[:, :1], step_size, 8, heating=heating)


@pytest.mark.parametrize(
    ("heating", "left", "attempts"),
    [
        (0.001, False, [(FULL, True), (HALF, True)]),  # by the step: halved, still in minibatches
        (0.5, False, [(FULL, True), (FULL, False)]),  # by the minibatches: all samples
        (0.001, True, [(FULL, True), (FULL, False)]),  # what is measured of chains that left says nothing
    ],
)
def test_heated_chains_change_what_heats_them(heating, left, attempts):
    target = Target(SETTINGS, 1.0, 1.0, DIMENSION, True)
    made = []

    def begin(attempt):
        made.append((attempt.step_sizes[0], attempt.in_batches, attempt.fitting[0]))
        spoilt = len(made) == 1
        return Prepared(
            drawn(attempt.step_sizes[0], heating=heating if spoilt else 0.0, spike=spoilt, left=spoilt and left)
        )

    sample_with_restarts(begin, [FULL], target, lambda traces: 1.0, fallback=8.0)
    assert [attempt[:2] for attempt in made] == attempts
    assert made[1][2] == made[1][0]  # a step halved for the energy that it feeds suits a larger curvature


@pytest.mark.parametrize(("dearer", "attempt"), [(1.5, (FULL, False)), (50.0, (None, True))])
def test_noise_that_calls_for_a_much_smaller_step_is_left_out_where_that_is_cheaper(dearer, attempt):
    target = Target(SETTINGS, 1.0, 1.0, DIMENSION, True)
    made = []

    def begin(attempt):
        made.append((attempt.step_sizes[0], attempt.in_batches, attempt.fitting[0]))
        return Prepared(drawn(attempt.step_sizes[0], heating=0.4 if len(made) == 1 else 0.0, spike=False))

    sample_with_restarts(begin, [FULL], target, lambda traces: 1.0, fallback=dearer)
    (_, second), (size, in_batches) = made, attempt
    assert second[1] is in_batches
    assert second[0] == size if size else second[0] < FULL / 10
    assert second[2] == FULL  # one reduced for noise does not


def test_chains_still_heated_at_half_the_step_are_given_all_samples():
    target = Target(SETTINGS, 1.0, 1.0, DIMENSION, True)
    made = []

    def begin(attempt):
        made.append((attempt.step_sizes[0], attempt.in_batches))
        return Prepared(drawn(attempt.step_sizes[0], heating=0.0, spike=len(made) < 3))

    sample_with_restarts(begin, [FULL], target, lambda traces: 1.0, fallback=8.0)
    assert made == [(FULL, True), (HALF, True), (HALF, False)]


@dataclass
class Growing(Prepared):
    """The same, and as many more as are asked for."""

    def extend(self, counts):
        """More of the same."""
        ((s, count),) = counts.items()
        some = [values[:1].expand(count, -1) for values in (self.found.virial, self.found.centred_draws)]
        return {s: Traces(some[0] / 2, some[0], self.found.restraint[:1].expand(count, -1), some[1], FULL, 8)}


def test_draws_of_large_sets_may_grow_to_a_relaxation_time_where_four_times_the_first_are_fewer():
    found = drawn(FULL, heating=0.0, spike=False)
    relaxation = SETTINGS.kernel.relaxation(FULL, 1.0)
    assert relaxation > 4 * 16
    target = Target(replace(SETTINGS, draws=None), 1.0, 1.0, DIMENSION, True)
    (traces,) = target.draw(Growing(found), lambda traces: 1.01 * relaxation / len(traces.delta_loss))
    assert relaxation <= len(traces.delta_loss) < 2 * relaxation
