import numpy as np
import pytest

from groktrace.analysis.detection import find_transitions
from groktrace.analysis.detection.dating import _own_change, _widened
from groktrace.analysis.detection.segmentation import Data, Fit
from groktrace.analysis.results.trajectory import Trajectory


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
        typical = np.median([date.step for date in dates])
        covered += [date.step_low <= typical <= date.step_high for date in dates]
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


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("mirrored", [False, True])
def test_a_last_jump_of_a_straight_fall_is_dated_with_the_fall(seed, mirrored):
    """Pieces need not meet: the jump is the steepest, but no change of its own."""
    x, error = np.arange(120.0), 40.0
    noise = error * np.random.default_rng(seed).standard_normal(120)
    fitted = np.concatenate([np.full(35, 1000.0), np.linspace(1260.0, 993.0, 16), np.full(69, 907.0)])
    changes, straight = [(34, 35), (50, 51)], np.interp(x, [34, 35, 52], [1000.0, 1270.0, 907.0])
    wide, starts = [(34, 35), (35, 51)], [0, 35, 51]
    if mirrored:
        fitted, straight, starts = fitted[::-1], straight[::-1], [0, 69, 85]
        changes, wide = ([(119 - b, 119 - a) for a, b in reversed(pairs)] for pairs in (changes, wide))
    data = Data(x, straight + noise, np.full(120, error**2))
    assert _widened(Fit(data, fitted, np.full(120, 300.0), starts, 0.0), changes) == wide
    # Where the curve does jump, the phase beside it stays out.
    jumps = fitted - 200.0 * (fitted == 907.0)
    data = Data(x, jumps + noise, np.full(120, error**2))
    assert _widened(Fit(data, jumps, np.full(120, 300.0), starts, 0.0), changes) == changes


@pytest.mark.parametrize("seed", [79, 91, 117, 143, 156, 167, 171, 233, 250, 317, 324])
def test_changes_at_points_that_are_hardly_known_are_not_read_off_beyond_all_points(seed):
    """A joined ramp may lead from where nothing was measured, or by less than its own error; pieces do not."""
    generator = np.random.default_rng(seed)
    count, base = int(generator.integers(6, 30)), generator.uniform(0.2, 2)
    steps = np.unique(np.round(np.geomspace(1, 1500, count))).astype(int)
    error, unknown = np.full(len(steps), base), int(generator.integers(1, 4))
    error[:unknown] = base * np.exp(generator.uniform(0, 4, unknown))
    truth = 4 + 22 * np.exp(-np.arange(len(steps)) / generator.uniform(0.3, 3))
    if generator.random() < 0.4:
        truth[:unknown] = truth[unknown] - generator.uniform(0, 20)
    values = truth + error * generator.standard_normal(len(steps))
    found = find_transitions(Trajectory.from_arrays(steps, values, error))
    assert found
    for change in found:
        assert abs(change.delta_llc) > 2 * change.stderr
        for level in (change.llc_before, change.llc_after):
            assert (values - 2 * error).min() <= level <= (values + 2 * error).max()


def test_a_fall_and_the_rise_that_undoes_it_are_not_one_change():
    """An LSTM's λ_c on geometric steps: one ramp from step 20 to the end describes an early peak nearly as well."""
    steps = np.array([0, 1, 2, 3, 6, 11, 18, 31, 51, 84, 138, 227, 372, 610, 1000])
    values = [-25.9, -9.4, -3.7, 9.7, 29.2, 14.5, 16.0, 17.5, 23.2, 29.4, 33.7, 43.2, 60.2, 82.2, 109.9]
    error = [2.1, 1.7, 1.3, 2.1, 0.9, 1.7, 0.8, 0.7, 0.5, 0.5, 0.6, 0.8, 1.1, 1.2, 2.0]
    fall, rise = find_transitions(Trajectory.from_arrays(steps, np.array(values), np.array(error)))
    assert (fall.onset, fall.end) == (6, 11)
    assert fall.llc_before == pytest.approx(29.2, abs=3)
    assert fall.llc_after == pytest.approx(16.0, abs=3)
    assert rise.onset >= fall.end
    assert rise.llc_after == pytest.approx(109.9, abs=4)
