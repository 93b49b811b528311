"""What of a fit counts as one change, on curves laid out by hand."""

import numpy as np
import pytest

from groktrace.analysis.changes import find_changes
from groktrace.analysis.segmentation import Fit

LEVEL, FALL, PHASE = np.full(10, 1000.0), 50.0 * np.arange(1, 7), 8


def two_falls():
    """Two falls of 50 a snapshot, with a phase of eight snapshots between that the fit has as level."""
    first = 1000.0 - FALL
    second = first[-1] - FALL
    value = np.concatenate([LEVEL, first, np.full(PHASE, first[-1]), second, np.full(10, second[-1])])
    bounds = np.cumsum([len(LEVEL), len(FALL), PHASE, len(FALL)])
    return Fit(value, np.full(len(value), 1.0), [0, *bounds.tolist()], 0.0), slice(bounds[1], bounds[2])


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
        fit, value = Fit(2000 - fit.value, fit.variance, fit.starts, 0.0), 2000 - value
    x = np.arange(len(value), dtype=float)
    assert len(find_changes(x, value, np.full(len(value), error**2), fit)) == changes
