import pytest
from hypothesis import given
from hypothesis import strategies as st

from groktrace.errors import SettingsError
from groktrace.theory import normal_crossing_llc


@pytest.mark.parametrize(
    ("exponents", "llc", "multiplicity"),
    [([1], 0.5, 1), ([1, 1], 0.5, 2), ([1, 2, 3, 3], 1 / 6, 2), ((4, 1), 0.125, 1)],
)
def test_known_values(exponents, llc, multiplicity):
    found = normal_crossing_llc(exponents)
    assert (found.llc, found.multiplicity) == (llc, multiplicity)


@given(st.lists(st.integers(1, 20), min_size=1), st.integers(1, 20))
def test_a_further_factor_only_lowers_it(exponents, further):
    found = normal_crossing_llc(exponents)
    assert normal_crossing_llc([*exponents, further]).llc <= found.llc <= len(exponents) / 2
    assert normal_crossing_llc(exponents[::-1]) == found


@pytest.mark.parametrize(
    ("exponents", "message"),
    [
        ([], r"exponents: expected one or more whole numbers, got \[\]"),
        (3, "exponents: expected one or more whole numbers, got 3"),
        ([1, 0], r"exponents\[1\]: expected a whole number of at least 1, got 0"),
        ([0.5], r"exponents\[0\]: expected a whole number of at least 1, got 0\.5"),
    ],
)
def test_bad_exponents_are_named(exponents, message):
    with pytest.raises(SettingsError, match=message):
        normal_crossing_llc(exponents)
