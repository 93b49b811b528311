import itertools

import numpy as np
import pytest

from groktrace.analysis.detection.segmentation import Data, draw_curves, segment


def partitions(count):
    """All bounds of pieces of two points or more."""
    for inner in range(count // 2):
        for cuts in itertools.combinations(range(2, count - 1), inner):
            bounds = (0, *cuts, count)
            if all(b - a >= 2 for a, b in itertools.pairwise(bounds)):
                yield bounds


def brute_cost(x, value, variance, bounds):
    """χ² and log T for each place, level and, where it lowers the cost, slope (twice); by polyfit."""
    total, price = 0.0, np.log(len(x))
    for a, b in itertools.pairwise(bounds):
        root = 1 / np.sqrt(variance[a:b])
        costs = []
        for degree in (0, 1):
            fit = np.polyval(np.polyfit(x[a:b], value[a:b], degree, w=root), x[a:b])
            costs.append((((value[a:b] - fit) * root) ** 2).sum() + (2 + 2 * degree) * price)
        total += min(costs)
    return total


@pytest.fixture
def curve():
    rng = np.random.default_rng(4)
    x = np.cumsum(rng.uniform(0.5, 2.0, 11))
    variance = rng.uniform(0.5, 2.0, 11)
    value = np.where(x < x[5], 1.0, 5.5 + 0.8 * x) + np.sqrt(variance) * rng.standard_normal(11)
    return x, value, variance


def test_the_partition_is_the_exact_optimum(curve):
    fit = segment(Data(*curve))
    costs = {bounds: brute_cost(*curve, bounds) for bounds in partitions(11)}
    best = min(costs, key=costs.get)
    assert (*fit.starts, 11) == best
    assert fit.cost == pytest.approx(costs[best])


def test_the_fit_is_each_piece_s_line_with_its_variance():
    x, value = np.arange(12.0), np.r_[np.zeros(6), 10.0 + 3 * np.arange(6)]
    fit = segment(Data(x, value, np.full(12, 0.5)))
    assert fit.pieces() == [(0, 5), (6, 11)]
    np.testing.assert_allclose(fit.value, value, atol=1e-9)
    # A level: σ²/m. A line at its end: σ²·(1/m + (x − x̄)²/Σ(x − x̄)²).
    assert fit.variance[0] == pytest.approx(0.5 / 6)
    assert fit.variance[11] == pytest.approx(0.5 * (1 / 6 + 2.5**2 / 17.5))


def test_draws_follow_the_posterior_over_partitions(curve):
    x, value, variance = curve
    draws = 4000
    curves, begins = draw_curves(Data(x, value, variance), draws, np.random.default_rng(0))
    costs = {bounds: brute_cost(*curve, bounds) for bounds in partitions(11)}
    total = sum(np.exp(-cost / 2) for cost in costs.values())
    for bounds, cost in costs.items():
        expected = np.exp(-cost / 2) / total
        wanted = np.zeros(11, dtype=bool)
        wanted[list(bounds[:-1])] = True
        seen = np.mean((begins == wanted).all(axis=1))
        assert seen == pytest.approx(expected, abs=5 * np.sqrt(expected / draws) + 1e-3)
    # The mean of the first value over draws in which its piece is flat up to the fifth point.
    flat = begins[:, 5] & ~begins[:, 1:5].any(axis=1) & (curves[:, 0] == curves[:, 4])
    mean = np.average(value[:5], weights=1 / variance[:5])
    error = np.sqrt(1 / np.sum(1 / variance[:5]))
    assert curves[flat, 0].mean() == pytest.approx(mean, abs=5 * error / np.sqrt(flat.sum()))
    assert curves[flat, 0].std() == pytest.approx(error, rel=0.1)


def test_short_pieces_far_from_zero_keep_their_digits():
    """Moments about the means: plain sums of squares would lose the short pieces in rounding."""
    x = np.geomspace(1.0, 1e7, 400)
    value = np.where(np.arange(400) < 7, 1e6, 1e6 + 1.0)
    fit = segment(Data(x, value, np.full(400, 1e-4)))
    assert fit.starts == [0, 7]
    np.testing.assert_allclose(fit.value, value, atol=1e-6)


def uneven(seed):
    """A hundred points that jump now and then, with errors that differ widely; what each piece costs, [start, end]."""
    rng = np.random.default_rng(seed)
    x = np.cumsum(rng.uniform(0.01, 3.0, 100))
    value = np.cumsum(rng.normal(0, 300, 100) * (rng.random(100) < 0.15)) + rng.standard_normal(100)
    variance = rng.choice([1.0, 0.01, 1e4], 100)
    costs = np.full((101, 101), np.inf)
    for start, end in itertools.combinations(range(101), 2):
        if end - start >= 2:
            costs[start, end] = brute_cost(x, value, variance, (start, end))
    return (x, value, variance), costs


@pytest.mark.parametrize("seed", [0, 152, 159])
def test_starts_that_are_left_out_would_not_have_been_chosen(seed):
    """Against every start tried: on two of the curves a start is hopeless only for a while."""
    curve, costs = uneven(seed)
    best = np.r_[0.0, np.full(100, np.inf)]
    for end in range(2, 101):
        best[end] = np.min(best[:end] + costs[:end, end])
    assert segment(Data(*curve)).cost == pytest.approx(best[-1], rel=1e-8)


def test_pieces_of_draws_begin_where_the_sum_over_all_partitions_says():
    """Against the sums from the front and from the back, none of which leaves anything out."""
    curve, costs = uneven(152)
    front, back = np.r_[0.0, np.full(100, -np.inf)], np.r_[np.full(100, -np.inf), 0.0]
    for t in range(2, 101):
        front[t] = np.logaddexp.reduce(front[:t] - costs[:t, t] / 2)
        back[100 - t] = np.logaddexp.reduce(back[101 - t :] - costs[100 - t, 101 - t :] / 2)
    expected = np.exp(front + back - front[-1])[:-1]
    # Some are neither sure nor hopeless: without them any sum would do.
    assert np.sum((expected > 0.1) & (expected < 0.9)) >= 5
    draws = 4000
    _, begins = draw_curves(Data(*curve), draws, np.random.default_rng(0))
    error = np.sqrt(expected * (1 - expected) / draws)
    assert np.all(np.abs(begins.mean(axis=0) - expected) < 4.5 * error + 1e-3)
