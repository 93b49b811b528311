"""What of a fit counts as one change, on curves laid out by hand."""

from dataclasses import replace

import numpy as np
import pytest

from groktrace.analysis.detection.changes import find_changes
from groktrace.analysis.detection.segmentation import Data, Fit

LEVEL, FALL, PHASE = np.full(10, 1000.0), 50.0 * np.arange(1, 7), 8


def fitted(value, variance, starts, error=1.0):
    """A fit that goes through all points, of one error each."""
    data = Data(np.arange(len(value), dtype=float), value, np.full(len(value), error**2))
    return Fit(data, value, variance, starts, 0.0)


def two_falls():
    """Two falls of 50 a snapshot, with a phase of eight snapshots between that the fit has as level."""
    first = 1000.0 - FALL
    second = first[-1] - FALL
    value = np.concatenate([LEVEL, first, np.full(PHASE, first[-1]), second, np.full(10, second[-1])])
    bounds = np.cumsum([len(LEVEL), len(FALL), PHASE, len(FALL)])
    return fitted(value, np.full(len(value), 1.0), [0, *bounds.tolist()]), slice(bounds[1], bounds[2])


@pytest.mark.parametrize("rising", [False, True])
@pytest.mark.parametrize(
    ("slope", "error", "changes"),
    [
        (0.0, 5.0, 2),
        (-10.0, 5.0, 2),  # as slow as a phase may drift
        (0.0, 200.0, 1),  # level by chance, for all that is known
        (-40.0, 5.0, 1),  # nearly as fast as the falls
        (+40.0, 5.0, 2),  # the other way
    ],
)
def test_a_phase_between_two_changes_has_to_be_seen(slope, error, changes, rising):
    fit, phase = two_falls()
    value = fit.value.copy()
    value[phase] += slope * (np.arange(PHASE) - (PHASE - 1) / 2)
    if rising:
        fit, value = fitted(2000 - fit.value, fit.variance, fit.starts), 2000 - value
    data = Data(fit.data.x, value, np.full(len(value), error**2))
    assert len(find_changes(replace(fit, data=data))) == changes


def test_a_fall_that_ends_in_a_jump_too_small_to_count_counts_as_a_whole():
    """Pieces need not meet: beside such a jump the fall itself is as slow as a phase."""
    value = np.concatenate([np.full(20, 900.0), np.linspace(1200.0, 910.0, 16), np.full(24, 818.0)])
    fit = fitted(value, np.full(60, 360.0), [0, 20, 36], 40.0)  # the jump of 92 is 3.4 errors, 3.8 count
    assert find_changes(fit) == [(19, 20), (20, 36)]


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_what_precedes_the_first_change_may_be_farther_off_than_it_if_it_is_too_uncertain_to_count(sign):
    value = sign * np.repeat([-1500.0, 240.0, 90.0], [5, 20, 20])
    variance = np.repeat([1e6, 1.0, 1.0], [5, 20, 20])
    level = max(0.0, -float(value.min()))  # the largest level sets the least change
    data = Data(np.arange(45.0), value + level, variance)
    assert find_changes(Fit(data, value + level, variance, [0, 5, 25], 0.0)) == [(24, 25)]
