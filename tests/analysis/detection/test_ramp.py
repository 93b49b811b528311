import math

import numpy as np
import pytest

from groktrace.analysis.detection.ramp import fit_ramp
from groktrace.analysis.detection.segmentation import Data


def test_a_ramp_is_found_between_snapshots():
    x = np.arange(40.0)
    value = np.interp(x, [14.3, 21.7], [900.0, 600.0])
    rng = np.random.default_rng(0)
    noisy, variance = value + 2 * rng.standard_normal(40), np.full(40, 4.0)
    ramp = fit_ramp(Data(x, noisy, variance), (14, 22), (0, 39))
    assert ramp.middle == pytest.approx(18.0, abs=0.1)
    assert ramp.low < ramp.middle < ramp.high < ramp.low + 0.3
    assert (ramp.begin, ramp.end) == (14, 22)
    assert (ramp.before, ramp.after) == (pytest.approx(900, abs=2), pytest.approx(600, abs=2))
    assert ramp.error == pytest.approx(2 * np.sqrt(1 / 15 + 1 / 18), rel=0.15)


def test_the_middle_of_a_ramp_is_half_way_up_on_an_uneven_abscissa():
    x = np.log(np.arange(1.0, 61.0))
    a, b = math.log(6.0), math.log(40.0)
    noise = np.random.default_rng(0).normal(0, 0.05, len(x))
    value = 10 - 4 * np.clip((x - a) / (b - a), 0, 1) + noise
    variance = np.full(len(x), 0.05**2)
    found = fit_ramp(Data(x, value, variance), (5, 39), (0, 59))
    # In snapshots it would be at log 23.
    assert found.middle == pytest.approx((a + b) / 2, abs=0.05)
    assert found.low <= (a + b) / 2 <= found.high


def test_intervals_of_ramps_cover_as_often_as_they_say():
    x = np.arange(60.0)
    truth = 10 - 4 * np.clip((x - 24.3) / 9, 0, 1)
    variance, covered = np.full(60, 0.8**2), 0
    for seed in range(200):
        value = truth + np.random.default_rng(seed).normal(0, 0.8, 60)
        found = fit_ramp(Data(x, value, variance), (22, 36), (0, 59))
        covered += found.low <= 28.8 <= found.high
    # Four standard errors of a share of 0.9 in 200, and the widening that the choice of a model asks for.
    assert 0.82 <= covered / 200 <= 0.99
