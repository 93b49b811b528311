"""A fall of λ that has just begun, on curves that are known."""

from dataclasses import replace

import numpy as np
import pytest

from groktrace.analysis.detection import EarlyWarning, last_fall
from groktrace.analysis.detection.early_warning import last_slope
from groktrace.analysis.results.trajectory import OtherSamples, Trajectory

STEPS = np.arange(0, 1001, 20)


def trajectory(llc, loss=None, stderr=5.0, upto=1000):
    count = int(np.searchsorted(STEPS, upto, side="right"))
    loss = np.where(STEPS < 100, 1.0, 0.01) if loss is None else loss
    return Trajectory.from_arrays(STEPS[:count], llc[:count], [stderr] * count, train_loss=loss[:count])


def falling(rate, since=300):
    """Constant until a step, then falling by a rate for each e-fold of the steps."""
    return 1000.0 * np.exp(-rate * np.log(np.maximum(STEPS + 20, since) / since))


def test_a_fall_is_told_soon_after_it_begins_and_at_the_rate_at_which_it_falls():
    curve = falling(0.3)
    warned = [step for step in STEPS if (fall := last_fall(trajectory(curve, upto=step))) and fall.is_significant]
    assert 320 < warned[0] <= 440
    fall = last_fall(trajectory(curve))
    assert fall == EarlyWarning(1000, pytest.approx(0.3, rel=1e-6), fall.stderr)
    assert fall.to_dict() == {
        "step": 1000,
        "rate": fall.rate,
        "stderr": fall.stderr,
        "threshold": 0.045,
        "kind": "warning",
    }


@pytest.mark.parametrize("rate", [0.0, 0.04, -0.5])
def test_what_stays_drifts_or_rises_is_not_told(rate):
    falls = [last_fall(trajectory(falling(rate), upto=step)) for step in STEPS]
    assert not any(fall.is_significant for fall in falls if fall is not None)


def test_errors_and_doubts_count():
    known, noisy = (last_fall(trajectory(falling(0.15), stderr=error)) for error in (1.0, 60.0))
    assert known.is_significant
    assert not noisy.is_significant
    assert noisy.stderr > known.stderr
    plain = trajectory(falling(0.15), stderr=8.0)
    doubted = replace(plain, points=tuple(replace(p, reliable=False, reasons=("heated",)) for p in plain.points))
    assert last_fall(doubted).stderr > 1.5 * last_fall(plain).stderr


def test_nothing_is_said_before_the_training_loss_is_low_or_where_too_little_is_known():
    assert last_fall(trajectory(falling(0.3), loss=np.linspace(1.0, 0.2, len(STEPS)))) is None
    assert last_fall(trajectory(falling(0.3), upto=140)) is None  # three snapshots since
    assert last_fall(trajectory(-falling(0.3))) is None  # no basin has that
    unknown = trajectory(falling(0.3))
    last = replace(unknown.points[-1], llc=None)
    assert last_fall(replace(unknown, points=(*unknown.points[:-1], last))) is None
    assert last_fall(Trajectory(unknown.points[:1])) is None
    other = replace(unknown, data=OtherSamples(None, "0" * 8, None))
    assert last_fall(unknown) is not None
    assert last_fall(other) is None
    no_loss = Trajectory.from_arrays(STEPS, falling(0.3), [5.0] * len(STEPS))
    assert last_fall(no_loss) is None


@pytest.mark.parametrize(
    ("last", "told"),
    [([1.0, 1.0], True), ([1.0, 0.6], True), ([1.0, 0.4], False), ([0.4, 0.9], False), ([1.0, None], True)],
)
def test_at_one_nbeta_a_curvature_that_halves_withholds_it(last, told):
    plain = trajectory(falling(0.3))
    tops = [1.0] * (len(STEPS) - 2) + last
    points = [replace(p, diagnostics={"top_curvature": t}) for p, t in zip(plain.points, tops, strict=True)]
    at_one = replace(plain, points=tuple(points))
    assert (last_fall(at_one) is not None) == told
    following = last_fall(replace(at_one, nbeta=None, resolution=100.0))
    assert replace(following, threshold=0.045) == last_fall(plain)


@pytest.mark.parametrize(("rate", "at_one", "following"), [(0.1, True, False), (0.2, True, True)])
def test_where_nbeta_follows_the_curvature_it_has_to_fall_faster(rate, at_one, following):
    plain = trajectory(falling(rate), stderr=1.0)
    assert last_fall(replace(plain, nbeta=1.0)).is_significant == at_one
    assert last_fall(replace(plain, nbeta=None, resolution=100.0)).is_significant == following


def test_only_the_last_part_counts():
    rises = np.where(STEPS < 500, 500.0, 1000.0) * np.exp(-0.2 * np.log(np.maximum(STEPS + 20, 500) / 500))
    assert last_fall(trajectory(rises)).rate == pytest.approx(0.2, rel=0.02)


def test_slope_and_its_error_are_those_of_least_squares():
    generator = np.random.default_rng(0)
    x, variance = np.linspace(0, 1, 30), np.full(30, 0.04)
    slopes = []
    for _ in range(300):
        slope, error = last_slope(x, 2 * x + 0.2 * generator.standard_normal(30), variance, 1.5)
        slopes.append(slope)
    assert np.mean(slopes) == pytest.approx(2, abs=4 * error / np.sqrt(300))
    assert np.std(slopes) == pytest.approx(error, rel=0.15)
