import numpy as np

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
