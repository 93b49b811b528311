import numpy as np
import pytest

from groktrace import LargestDropDetector, Trajectory, find_transitions

STEPS = np.arange(0, 3000, 50)


def curve(values, error=5.0, **more):
    noisy = values + error * np.random.default_rng(0).standard_normal(len(values))
    return Trajectory.from_arrays(STEPS, noisy, np.full(len(values), error), **more)


def test_the_largest_fall_is_one_transition_dated_at_its_half():
    values = np.interp(STEPS, [0, 300, 1000, 2000], [100.0, 900.0, 900.0, 500.0])
    trajectory = curve(values, n=100, train_loss=np.full(60, 0.1))
    (fall,) = find_transitions(trajectory, LargestDropDetector())
    assert (fall.kind, fall.label, fall.curve) == ("simplification", None, "llc")
    assert 300 <= fall.onset <= 1000
    assert fall.end >= 1950
    assert fall.step_low <= fall.step <= fall.step_high == fall.step_low + 50
    assert fall.step == pytest.approx(1500, abs=75)
    assert fall.delta_llc == fall.llc_after - fall.llc_before == pytest.approx(-400, abs=30)
    assert fall.stderr == pytest.approx(5 * np.sqrt(2))
    assert fall.delta_free_energy == pytest.approx(fall.delta_llc * np.log(100))


def test_rises_noise_and_small_falls_are_none():
    detector = LargestDropDetector()
    assert detector.detect(curve(np.linspace(100, 900, 60))) == []
    assert detector.detect(curve(np.full(60, 900.0), error=60.0)) == []
    small = np.linspace(900, 870, 60)
    assert detector.detect(curve(small, error=0.1)) == []
    assert len(LargestDropDetector(min_change=0.01).detect(curve(small, error=0.1))) == 1


@pytest.mark.parametrize("points", [0, 1, 5])
def test_curves_of_which_nothing_is_known_have_none(points):
    empty = Trajectory.from_arrays(range(points), [np.nan] * points, [np.nan] * points)
    assert LargestDropDetector().detect(empty) == []
