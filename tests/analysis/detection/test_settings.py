import math
from dataclasses import replace

import numpy as np
import pytest

from groktrace import PiecewiseDetector, Trajectory, find_transitions
from groktrace.analysis.detection.changes import find_changes
from groktrace.analysis.detection.segmentation import Data, Fit
from groktrace.analysis.detection.settings import DetectionSettings
from groktrace.errors import SettingsError

STEPS = np.arange(0, 3000, 50)


def fall_by(share, error=1.0, at=1500, **more):
    values = np.where(at > STEPS, 900.0, 900.0 * (1 - share))
    values = values + error * np.random.default_rng(0).standard_normal(60)
    return Trajectory.from_arrays(STEPS, values, np.full(60, error), **more)


@pytest.mark.parametrize(
    ("trajectory", "field", "value"),
    [
        (fall_by(0.08), "min_change", 0.2),
        (fall_by(0.3), "min_points", 61),
        (fall_by(0.3), "drift_margin", 1e9),
    ],
)
def test_thresholds_decide_what_is_found(trajectory, field, value):
    (found,) = find_transitions(trajectory)
    assert found.kind == "simplification"
    assert find_transitions(trajectory, PiecewiseDetector(**{field: value})) == []


def test_the_level_of_significance_decides_what_is_a_change():
    value = np.repeat([900.0, 800.0], 20)
    data = Data(np.arange(40.0), value, np.full(40, 250.0))
    fit = Fit(data, value, data.variance, [0, 20], 0.0)  # 4.5 standard errors
    for level, found in ((0.01, [(19, 20)]), (1e-6, [])):
        settings = DetectionSettings(significance=level)
        assert find_changes(fit, settings) == found


def test_thresholds_decide_what_is_labelled():
    trajectory = fall_by(0.12, train_loss=np.where(STEPS < 100, 1.0, 0.001))
    assert find_transitions(trajectory)[0].label is None
    (fall,) = find_transitions(trajectory, PiecewiseDetector(min_generalisation=0.1))
    assert fall.label == "generalisation"
    following = replace(trajectory, resolution=100.0, weight_decay=True)
    assert find_transitions(following, PiecewiseDetector(min_generalisation=0.1))[0].label is None
    assert find_transitions(following, PiecewiseDetector(min_generalisation_following=0.1))[0].label == "generalisation"


@pytest.mark.parametrize(("error", "label"), [(5.0, "generalisation"), (25.0, "generalisation"), (50.0, None)])
def test_a_fall_must_be_large_enough_with_its_error_taken_off(error, label):
    loss, values = np.where(STEPS < 100, 1.0, 0.001), fall_by(0.16).column("llc")
    trajectory = Trajectory.from_arrays(STEPS, values, np.full(60, error), train_loss=loss)
    (fall,) = find_transitions(trajectory)
    share = -fall.delta_llc / fall.llc_before
    assert share > 0.15
    assert (share - fall.stderr / fall.llc_before > 0.15) == (label is not None)
    assert fall.label == label
    assert ("± " in fall.evidence) == (label is None)


def test_wider_intervals_are_wider():
    trajectory = fall_by(0.2, error=60.0)
    (narrow,), (wide,) = (
        find_transitions(trajectory, PiecewiseDetector(jump_widening=w, ramp_widening=w)) for w in (1, 3)
    )
    assert wide.step_high - wide.step_low > 2 * (narrow.step_high - narrow.step_low)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"min_change": -0.1}, "min_change: expected a number that is not negative, got -0.1"),
        ({"min_change": math.nan}, "min_change: expected a number that is not negative, got nan"),
        ({"edge": "0.1"}, "edge: expected a number that is not negative, got '0.1'"),
        ({"significance": 1.0}, "significance: expected a number from 1e-9 to below 1, got 1.0"),
        ({"draws": 0}, "draws: expected an integer of 1 or more, got 0"),
        ({"min_points": 2}, "min_points: expected an integer of 3 or more, got 2"),
        ({"draws": 10.5}, "draws: expected an integer of 1 or more, got 10.5"),
    ],
)
def test_thresholds_that_cannot_be_are_refused(given, message):
    with pytest.raises(SettingsError, match=message):
        PiecewiseDetector(**given)
