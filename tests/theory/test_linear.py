import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from groktrace.errors import SettingsError
from groktrace.theory import deep_linear_llc, lazy_feature_llc, linearised_llc, reduced_rank_llc

sizes = st.integers(1, 12)


@st.composite
def deep_networks(draw, least=2):
    widths = draw(st.lists(sizes, min_size=least, max_size=6))
    return widths, draw(st.integers(0, min(widths)))


def weights(widths):
    return sum(one * other for one, other in itertools.pairwise(widths))


def test_linear_in_the_weights():
    assert (linearised_llc(7).llc, linearised_llc(0).llc) == (3.5, 0)
    assert lazy_feature_llc(3, 5, 100).llc == lazy_feature_llc(3, 100, 5).llc == 7.5


@pytest.mark.parametrize(
    ("m", "h", "n", "rank", "llc"),
    [(5, 3, 5, 1, 8), (5, 3, 5, 2, 9.5), (8, 4, 6, 2, 16), (10, 6, 10, 3, 35), (10, 2, 3, 1, 7), (2, 9, 3, 0, 3)],
)
def test_reduced_rank(m, h, n, rank, llc):
    assert reduced_rank_llc(m, h, n, rank).llc == llc


def test_reduced_rank_multiplicity_where_sizes_balance():
    assert reduced_rank_llc(5, 3, 5, 2).multiplicity == 2
    assert reduced_rank_llc(5, 3, 5, 1).multiplicity == 1
    # One output side far wider: always 1, though the sum is odd.
    assert reduced_rank_llc(10, 2, 3, 0).multiplicity == 1


@pytest.mark.parametrize(
    ("widths", "rank", "llc"),
    [([5, 5, 5, 5], 2, 11), ([10, 4, 8, 6], 3, 21), ([6, 6, 6, 6, 6], 2, 15), ([8, 3, 9, 5, 7], 2, 14.5)],
)
def test_deep_linear(widths, rank, llc):
    assert deep_linear_llc(widths, rank).llc == llc


def test_deep_linear_multiplicity():
    # Δ = 1, 1, 1: ℓ = 2, S = 3, a = 1.
    assert deep_linear_llc([1, 1, 1], 0).multiplicity == 2
    # The product of N scalar weights is a normal crossing: λ = 1/2, multiplicity N.
    for layers in range(1, 6):
        found = deep_linear_llc([1] * (layers + 1), 0)
        assert found.llc == 0.5
    assert deep_linear_llc(np.array([5, 5, 5, 5]), np.int64(2)).llc == 11


def test_two_layers_are_reduced_rank_regression_at_every_size():
    for m, h, n in itertools.product(range(1, 8), repeat=3):
        for rank in range(min(m, h, n) + 1):
            deep, flat = deep_linear_llc([n, h, m], rank), reduced_rank_llc(m, h, n, rank)
            assert (deep.llc, deep.multiplicity) == (flat.llc, flat.multiplicity), (m, h, n, rank)


@given(sizes, sizes, sizes, st.data())
def test_two_layers_are_reduced_rank_regression(m, h, n, data):
    rank = data.draw(st.integers(0, min(m, h, n)))
    deep, flat = deep_linear_llc([n, h, m], rank), reduced_rank_llc(m, h, n, rank)
    assert (deep.llc, deep.multiplicity) == (flat.llc, flat.multiplicity)
    assert flat.llc == reduced_rank_llc(n, h, m, rank).llc


@given(sizes, sizes)
def test_one_layer_is_regression(inputs, outputs):
    for rank in range(min(inputs, outputs) + 1):
        found = deep_linear_llc([inputs, outputs], rank)
        assert (found.llc, found.multiplicity) == (inputs * outputs / 2, 1)


@given(deep_networks(least=3), st.data())
def test_the_order_of_the_layers_hardly_matters(network, data):
    widths, rank = network
    found = deep_linear_llc(widths, rank)
    permuted = [widths[0], *data.draw(st.permutations(widths[1:-1])), widths[-1]]
    assert deep_linear_llc(permuted, rank).to_dict() == found.to_dict()
    assert deep_linear_llc(widths[::-1], rank).llc == found.llc
    # Only the rank's own term knows which layers are the outer ones.
    shuffled = data.draw(st.permutations(widths))
    apart = rank * (shuffled[0] + shuffled[-1] - widths[0] - widths[-1]) / 2
    assert deep_linear_llc(shuffled, rank).llc == pytest.approx(found.llc + apart)


@given(deep_networks())
def test_bounds(network):
    widths, rank = network
    found = deep_linear_llc(widths, rank)
    assert found.llc <= weights(widths) / 2
    assert found.llc <= widths[0] * widths[-1] / 2
    # Maps of the true rank are a manifold of this dimension, which no network that realises them falls below.
    assert found.llc >= rank * (widths[0] + widths[-1] - rank) / 2
    assert found.multiplicity >= 1


@given(deep_networks(), st.data())
def test_monotone(network, data):
    widths, rank = network
    llc = deep_linear_llc(widths, rank).llc
    layer = data.draw(st.integers(0, len(widths) - 1))
    wider = [width + (index == layer) for index, width in enumerate(widths)]
    assert llc <= deep_linear_llc(wider, rank).llc
    if rank < min(widths):
        assert llc <= deep_linear_llc(widths, rank + 1).llc
    # A further layer, wide enough to hinder nothing, only adds ways to write the same map.
    assert deep_linear_llc([*widths[:1], max(widths), *widths[1:]], rank).llc <= llc


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: linearised_llc(-1), "fisher_rank: expected a whole number of at least 0, got -1"),
        (lambda: lazy_feature_llc(0, 5, 5), "output_dim: expected a whole number of at least 1, got 0"),
        (lambda: lazy_feature_llc(3, 2.5, 5), r"feature_rank: expected a whole number of at least 0, got 2\.5"),
        (lambda: lazy_feature_llc(3, 2, 0), "width: expected a whole number of at least 1, got 0"),
        (lambda: reduced_rank_llc(0, 3, 5, 0), "m: expected a whole number of at least 1, got 0"),
        (lambda: reduced_rank_llc(5, 3.0, 5, 0), r"h: expected a whole number of at least 1, got 3\.0"),
        (
            lambda: reduced_rank_llc(5, 3, 5, 4),
            r"rank: expected a whole number from 0 to 3 \(the least of m, h and n\), got 4",
        ),
        (lambda: deep_linear_llc([5], 2), r"widths: expected two or more layer sizes, inputs first, got \[5\]"),
        (lambda: deep_linear_llc(5, 2), "widths: expected two or more layer sizes, inputs first, got 5"),
        (lambda: deep_linear_llc([5, 0, 5], 0), r"widths\[1\]: expected a whole number of at least 1, got 0"),
        (
            lambda: deep_linear_llc([5, 4, 5], 5),
            r"rank: expected a whole number from 0 to 4 \(the narrowest layer\), got 5",
        ),
        (lambda: deep_linear_llc([5, 4, 5], -1), "rank: expected a whole number from 0 to 4"),
    ],
)
def test_bad_sizes_are_named(call, message):
    with pytest.raises(SettingsError, match=message):
        call()
