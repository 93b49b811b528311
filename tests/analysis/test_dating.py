import numpy as np

from groktrace.analysis.dating import _own_change
from groktrace.analysis.trajectory import Trajectory
from groktrace.analysis.transitions import find_transitions


def test_what_is_open_of_where_a_slow_fall_ends_is_open_in_its_date():
    """A fall that slows down for long: where it is seen to be over moves its half level, and with that its date."""
    steps, covered = 10 * np.arange(100), []
    for pace in (25, 40):
        truth = np.where(steps < 200, 1400.0, 900.0 + 500.0 * np.exp(-(steps - 200) / 10 / pace))
        dates = []
        for seed in range(30):
            values = truth + 20.0 * np.random.default_rng(seed).standard_normal(100)
            found = find_transitions(Trajectory.from_arrays(steps, values, np.full(100, 20.0)))
            dates += [found[0]] if len(found) == 1 else []
        typical = np.median([each.step for each in dates])
        covered += [each.step_low <= typical <= each.step_high for each in dates]
    # With the levels held where the best fit has them it is 72 %.
    assert np.mean(covered) > 0.78
    assert len(covered) > 50


def test_a_change_that_a_draw_has_in_two_parts_is_dated_as_one():
    x = np.arange(50.0)
    curve = np.interp(x, [10, 16, 24, 30], [1000.0, 700.0, 700.0, 400.0])
    begins = np.isin(x, [0, 11, 17, 25, 31])

    def levels(value, change):
        found = _own_change(x, value, np.ones(50), begins, change)
        return None if found is None else tuple(value[list(found)].tolist())

    assert levels(curve, (10, 30)) == (1000.0, 400.0)
    assert levels(1400.0 - curve, (10, 30)) == (400.0, 1000.0)
    assert levels(curve, (8, 20)) == (1000.0, 700.0)  # the part that lies within
    assert levels(np.full(50, 700.0), (10, 30)) is None
