import math

import pytest
import torch

from groktrace.sampling import diagnostics


def autoregressive(draws, chains, memory, seed=0):
    noise = torch.randn(draws + 200, chains, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    out = torch.zeros_like(noise)
    for t in range(1, len(noise)):
        out[t] = memory * out[t - 1] + math.sqrt(1 - memory**2) * noise[t]
    return out[200:]


@pytest.mark.parametrize("memory", [0.0, 0.5, 0.9])
def test_effective_sample_size_of_an_autoregressive_series(memory):
    found = [diagnostics.effective_sample_size(autoregressive(2000, 2, memory, seed)) for seed in range(5)]
    expected = 4000 * (1 - memory) / (1 + memory)
    assert sum(found) / 5 == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize(("draws", "memory", "least"), [(16, 0.0, 0.955), (16, 0.3, 0.92), (32, 0.3, 0.932)])
def test_few_draws_cover_the_mean_too(draws, memory, least):
    covered = 0
    for trace in autoregressive(draws, 6000, memory).split(1, dim=1):
        covered += abs(float(trace.mean())) <= 1.96 * diagnostics.standard_error(trace)
    assert least <= covered / 6000 <= 0.98  # without Student's quantile 0.947, 0.902 and 0.925


@pytest.mark.parametrize(("freedom", "quantile"), [(3, 3.1824), (5, 2.5706), (10, 2.2281), (30, 2.0423), (1e9, 1.96)])
def test_errors_of_few_draws_are_students(freedom, quantile):
    assert diagnostics.student(freedom) == pytest.approx(quantile / 1.95996, rel=0.01)


def test_standard_error_covers_the_mean():
    covered = 0
    for trace in autoregressive(300, 400, 0.8).split(2, dim=1):
        covered += abs(float(trace.mean())) <= 1.96 * diagnostics.standard_error(trace)
    # 95 % of 200, give or take three standard deviations of a binomial.
    assert 180 <= covered <= 200


def test_draws_that_hardly_move_are_worth_few_whatever_they_look_like():
    trace = autoregressive(16, 2, 0.0, 0)
    assert diagnostics.effective_sample_size(trace) > 16
    assert diagnostics.effective_sample_size(trace, slow=4.0) == 8
    assert diagnostics.effective_sample_size(torch.ones(16, 2), slow=4.0) == 8
    assert diagnostics.effective_sample_size(trace, slow=100.0) == 1
    wider = diagnostics.student(7) * float(trace.var(correction=0) / 7) ** 0.5
    assert diagnostics.standard_error(trace, slow=4.0) == pytest.approx(wider)


def test_constant_traces_are_worth_all_their_draws():
    assert diagnostics.effective_sample_size(torch.ones(10, 3)) == 30
    assert diagnostics.standard_error(torch.ones(10, 3)) == 0


def test_rhat_tells_chains_that_disagree_and_chains_that_drift():
    agreeing = autoregressive(500, 4, 0.0)
    assert diagnostics.split_rhat(agreeing) == pytest.approx(1, abs=0.02)
    apart = agreeing + torch.tensor([0.0, 0.0, 3.0, 3.0])
    assert diagnostics.split_rhat(apart) > 1.5
    drifting = agreeing + torch.linspace(0, 5, 500)[:, None]
    assert diagnostics.split_rhat(drifting) > 1.3


def test_drift_is_relative_to_the_mean():
    trace = torch.cat([torch.full((50, 2), 9.0), torch.full((50, 2), 11.0)])
    assert diagnostics.drift(trace) == pytest.approx(0.2)


def test_virial_and_anharmonicity_in_closed_form():
    assert diagnostics.virial_ratio(torch.full((4, 2), 3.0), torch.full((4, 2), 7.0), 10) == pytest.approx(1)
    # For L of degree 2k, w·∇L = 2k·L.
    excess = torch.rand(100, 2, dtype=torch.float64)
    assert diagnostics.anharmonicity(4 * excess, excess) == pytest.approx(2)
