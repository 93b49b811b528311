"""Minibatches that take turns: every sample once a pass, and no dependence on what is stacked with them."""

import pytest
import torch

from groktrace.sampling.batches import Minibatches
from groktrace.sampling.langevin import generator_for

CPU = torch.device("cpu")


def begin(rows=3, samples=12, size=4, parts=True):
    generators = [generator_for(0, row, 0, "batch", CPU) for row in range(rows)]
    return Minibatches.begin(samples, size, generators, CPU, parts)


def drawn(batches, count):
    found = []
    for _ in range(count):
        batches.draw()
        found.append(batches.index.clone())
    return torch.stack(found)


def test_each_pass_holds_every_sample_once_in_another_order():
    found = drawn(begin(), 12)
    orders = set()
    for row in range(3):
        for start in range(0, 12, 3):
            one = found[start : start + 3, row]
            assert one.flatten().sort().values.tolist() == list(range(12))
            orders.add(tuple(one[:, 0].tolist()))
    assert len(orders) > 2


def test_without_turns_batches_are_drawn_anew_without_repeats():
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


def test_the_noise_of_turns_is_that_of_a_finite_population():
    """Half the mean square of what one batch's mean differs from the next one's, times spread, is its variance."""
    values = torch.randn(12, generator=torch.Generator().manual_seed(3)).double()
    batches = begin()
    means = values.view(3, 4).mean(1)
    halves = [0.5 * float(a - b) ** 2 for i, a in enumerate(means) for j, b in enumerate(means) if i != j]
    assert batches.spread * sum(halves) / len(halves) == pytest.approx(float(means.var(correction=0)))
    assert begin(parts=False).spread == 1
