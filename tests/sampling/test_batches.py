"""Minibatches: parts that are drawn independently, no dependence on what is stacked with them, sizes from noise."""

import math

import pytest
import torch

from groktrace.sampling.batches import Minibatches, NoiseProfile, spread_ranks
from groktrace.sampling.noise import generator_for

CPU = torch.device("cpu")


def begin(rows=3, samples=12, size=4, parts=True):
    generators = [generator_for(0, row, 0, "batch", CPU) for row in range(rows)]
    if parts:
        return Minibatches.of_parts(torch.arange(samples).view(-1, size), samples, generators)
    return Minibatches.begin(samples, size, generators, CPU)


def drawn(batches, count):
    found = []
    for _ in range(count):
        batches.draw()
        found.append(batches.index.clone())
    return torch.stack(found)


def test_parts_are_drawn_independently_of_those_before():
    found = drawn(begin(), 3000)[:, :, 0] // 4
    assert set(map(tuple, drawn(begin(), 60)[:, 0].tolist())) == {(0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10, 11)}
    for row in range(3):
        pairs = (3 * found[1:, row] + found[:-1, row]).bincount(minlength=9) / 2999
        assert (pairs - 1 / 9).abs().max() < 5 * math.sqrt(1 / 9 / 2999)


def test_without_parts_batches_are_drawn_anew_without_repeats():
    found = drawn(begin(parts=False), 40)
    assert all(len(set(row.tolist())) == 4 for step in found for row in step)
    assert len({tuple(sorted(row.tolist())) for row in found[:, 0]}) > 10


@pytest.mark.parametrize("parts", [True, False])
def test_rows_are_independent_and_can_be_put_back(parts):
    whole = drawn(begin(parts=parts), 9)
    batches = begin(parts=parts)
    drawn(batches, 4)
    rows = torch.tensor([1])
    saved = batches.saved(rows)
    drawn(batches, 2)
    batches.restore(rows, saved)
    again = drawn(batches, 3)
    assert torch.equal(again[:, 1], whole[4:7, 1])
    assert torch.equal(again[:, 0], whole[6:9, 0])
    some = begin(parts=parts).select(torch.tensor([2, 0]))
    assert torch.equal(drawn(some, 9), whole[:, [2, 0]])


@pytest.mark.parametrize(("heating", "curvature_variance"), [(3.0, 0.1), (0.01, 9.0), (0.01, 0.1)])
def test_batches_are_the_smallest_multiple_of_16_whose_noise_is_wanted(heating, curvature_variance):
    samples, wanted = 2000, 0.02
    size = NoiseProfile(heating, curvature_variance).batch(samples, wanted)

    def suits(batch):
        left = 1 / batch - 1 / samples  # drawn without replacement
        return heating * left <= wanted and curvature_variance * left <= 0.3**2

    assert size % 16 == 0
    assert suits(size)
    assert size == 16 or not suits(size - 16)


def test_all_samples_are_used_where_few_have_most_of_the_curvature():
    assert NoiseProfile(0.01, 500.0).batch(2000, 0.02) is None
    assert NoiseProfile(math.inf, 0.1).batch(2000, 0.02) is None
    assert NoiseProfile(0.1, math.nan).batch(2000, 0.02) is None
    assert NoiseProfile(math.nan, 0.1).batch(2000, 0.02) is None


def test_all_samples_are_used_where_there_would_be_less_than_four_batches():
    assert NoiseProfile(10.0, 0.1).batch(4 * 384, 0.02) == 384
    assert NoiseProfile(10.0, 0.1).batch(4 * 384 - 16, 0.02) is None


def test_ranks_are_spread_over_what_is_not_wanted_anyway():
    assert spread_ranks(torch.arange(20), 4, 8).tolist() == [0, 1, 2, 3, 6, 10, 14, 18]
