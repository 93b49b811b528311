import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from groktrace.errors import SettingsError
from groktrace.theory import (
    memorisation_bracket,
    modular_addition_llc,
    published_modular_addition_llc,
    quadratic_llc,
)

sizes = st.integers(1, 9)


def generic_dimension(d, p, K):
    """Rank of the derivative of Σ v ⊗ wwᵀ at random v, w, through its singular values."""
    generator = torch.Generator().manual_seed(100 * d + 10 * p + K)
    W = torch.randn(K, d, dtype=torch.float64, generator=generator)
    V = torch.randn(K, p, dtype=torch.float64, generator=generator)
    by_v = torch.einsum("pq,ki,kj->kpqij", torch.eye(p, dtype=torch.float64), W, W).flatten(0, 1)
    by_w = torch.einsum("kq,ai,kj->kaqij", V, torch.eye(d, dtype=torch.float64), W).flatten(0, 1)
    jacobian = torch.cat([by_v, by_w + by_w.mT])
    singular = torch.linalg.svdvals(jacobian.flatten(1))
    return int((singular > 1e-9 * singular[0]).sum())


@pytest.mark.parametrize(
    ("d", "p", "K", "llc"),
    [(6, 3, 4, 16), (4, 2, 12, 10), (10, 5, 1, 7), (10, 5, 4, 28), (10, 5, 12, 84), (10, 5, 20, 137.5)],
)
def test_known_values(d, p, K, llc):
    found = quadratic_llc(d, p, K)
    assert (found.llc, found.multiplicity) == (llc, 1)


@pytest.mark.parametrize("d", range(1, 7))
@pytest.mark.parametrize("p", range(1, 9))
def test_every_small_architecture_reaches_the_dimension_given(d, p):
    for K in range(1, d * (d + 1) // 2 + 2):
        assert 2 * quadratic_llc(d, p, K).llc == generic_dimension(d, p, K), (d, p, K)


@pytest.mark.parametrize(
    ("d", "p", "K", "dimension"),
    [
        (5, 1, 3, 12),  # symmetric matrices of rank 3
        (3, 7, 5, 40),  # 7 × 6 matrices of rank 5
        (4, 3, 5, 29),
        (6, 3, 8, 62),
        (8, 3, 11, 107),
        (4, 5, 6, 47),
    ],
)
def test_defective_architectures_are_told(d, p, K, dimension):
    found = quadratic_llc(d, p, K)
    assert 2 * found.llc == dimension < min(K * (d + p - 1), p * d * (d + 1) // 2)
    assert "defective" in found.conditions
    assert f"dim = {dimension}" in found.formula


def test_few_samples_bound_it():
    assert quadratic_llc(10, 5, 4, n_train=100).llc == 28
    assert quadratic_llc(10, 5, 20, n_train=30).llc == 5 * 29 / 2
    assert quadratic_llc(10, 5, 20, n_train=30, centred=False).llc == 5 * 30 / 2
    # Fewer neurons than outputs: matrices of rank 2 with 5 rows and 9 columns.
    assert quadratic_llc(10, 5, 2, n_train=10).llc == 24 / 2
    assert quadratic_llc(10, 5, 2, n_train=1).llc == 0


def test_dead_atoms_leave_a_lower_reference():
    found = quadratic_llc(6, 3, 100, effective_width=4)
    assert (found.llc, found.multiplicity) == (16, None)
    assert "4 of 100 atoms" in found.conditions
    assert "K_eff(d + p − 1)" in found.formula
    assert quadratic_llc(6, 3, 4, effective_width=4).llc == 16


@given(sizes, sizes, st.integers(1, 60), st.integers(1, 60))
def test_bounds_and_monotonicity(d, p, K, n):
    llc = quadratic_llc(d, p, K).llc
    assert 0 < llc <= K * (d + p) / 2
    assert llc <= p * d * (d + 1) / 4
    assert llc <= quadratic_llc(d, p, K + 1).llc
    assert llc <= quadratic_llc(d, p + 1, K).llc
    assert llc <= quadratic_llc(d + 1, p, K).llc
    assert quadratic_llc(d, p, K, n).llc <= quadratic_llc(d, p, K, n + 1).llc <= llc
    assert quadratic_llc(d, p, K, n).llc <= quadratic_llc(d, p, K, n, centred=False).llc
    assert quadratic_llc(d, p, K, 1000).llc == llc


@pytest.mark.parametrize(
    ("p", "K", "n", "twice"),
    [
        (5, 1, None, 13),
        (5, 2, None, 26),
        (5, 4, None, 52),
        (5, 8, None, 104),
        (5, 12, None, 120),
        (5, 20, None, 120),
        (7, 1, None, 19),
        (7, 4, None, 76),
        (7, 12, None, 228),
        (7, 20, None, 336),
        (7, 4, 24, 76),
        (7, 12, 24, 161),
        (23, 128, 317, 7268),
        (53, 1024, None, 148824),
        (53, 1024, 1123, 59466),
        (53, 100, 1123, 15700),
    ],
)
def test_modular_addition(p, K, n, twice):
    found = modular_addition_llc(p, K, n)
    assert (2 * found.llc, found.multiplicity) == (twice, 1)
    assert f"½·min({K * (3 * p - 2)}, {p * ((n or p * p) - 1)})" in found.formula


def test_modular_addition_as_published():
    assert published_modular_addition_llc(53, 1024).llc == 1024 * 158 / 2
    assert published_modular_addition_llc(5, 20).llc == 275 / 2


@given(st.one_of(st.just(3), st.integers(2, 60)), st.one_of(st.just(8), st.integers(1, 3000)), st.data())
def test_modular_addition_stays_below_the_published_value(p, K, data):
    n = data.draw(st.integers(1, p * p))
    found = modular_addition_llc(p, K, n).llc
    assert found <= modular_addition_llc(p, K).llc <= published_modular_addition_llc(p, K).llc
    # Of the defective architectures of Abo & Brambilla 2009, which the published form leaves out, one has d = 2p.
    left_out = 0.5 if (p, K) == (3, 8) else 0.0
    assert published_modular_addition_llc(p, K).llc - quadratic_llc(2 * p, p, K).llc == left_out
    assert 0 <= found <= 3 * p * K / 2
    assert found <= modular_addition_llc(p, K + 1, n).llc
    if p <= K:
        assert 2 * found == min(K * (3 * p - 2), p * (n - 1))


def test_memorisation_lies_in_a_bracket():
    found = memorisation_bracket(23, 128)
    assert (found.lower, found.upper) == (23 * 45 / 2, 23 * 128 / 2)
    assert found.to_dict().keys() == {"lower", "upper", "formula", "conditions", "source"}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quadratic_llc(0, 3, 4), "input_dim: expected a whole number of at least 1, got 0"),
        (lambda: quadratic_llc(6, -1, 4), "output_dim: expected a whole number of at least 1, got -1"),
        (lambda: quadratic_llc(6, 3, 0), "width: expected a whole number of at least 1, got 0"),
        (lambda: quadratic_llc(6, 3, 4.0), "width: expected a whole number of at least 1, got 4.0"),
        (lambda: quadratic_llc(6, 3, True), "width: expected a whole number of at least 1, got True"),
        (lambda: quadratic_llc(6, 3, 4, 0), "n_train: expected a whole number of at least 1, got 0"),
        (
            lambda: quadratic_llc(6, 3, 4, effective_width=5),
            r"effective_width: expected a whole number from 1 to 4 \(the width\), got 5",
        ),
        (lambda: modular_addition_llc(5.5, 4), "p: expected a whole number of at least 2, got 5.5"),
        (lambda: modular_addition_llc("5", 4), "p: expected a whole number of at least 2, got '5'"),
        (lambda: modular_addition_llc(1, 4), "p: expected a whole number of at least 2, got 1"),
        (lambda: modular_addition_llc(5, 0), "width: expected a whole number of at least 1, got 0"),
        (
            lambda: modular_addition_llc(5, 4, 26),
            r"n_train: expected a whole number from 1 to 25 \(all pairs\), got 26",
        ),
        (lambda: published_modular_addition_llc(5, -3), "width: expected a whole number of at least 1, got -3"),
        (
            lambda: memorisation_bracket(5, 9),
            r"width: expected a whole number from 10 to 24 \(2p − 1 < K < p²\), got 9",
        ),
        (lambda: memorisation_bracket(2, 9), "p: expected a whole number of at least 3, got 2"),
    ],
)
def test_bad_sizes_are_named(call, message):
    with pytest.raises(SettingsError, match=message):
        call()
