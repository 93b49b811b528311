import math
from dataclasses import replace

import numpy as np
import pytest

from groktrace.analysis.detection import find_transitions
from groktrace.analysis.detection.piecewise import _roughness
from groktrace.analysis.measurement.llc import OFF_MINIMUM
from groktrace.analysis.results.trajectory import Point, Trajectory

STEPS = np.arange(0, 3050, 50)


def curve(values, error=5.0, seed=0, steps=STEPS, **more):
    values = np.asarray(values, dtype=float)
    noisy = values + error * np.random.default_rng(seed).standard_normal(len(values))
    return Trajectory.from_arrays(steps, noisy, np.full(len(values), error), **more)


def hump(rise=1000.0, fall=400.0, low=100.0, peak_at=200, fall_to=1200):
    """Rises linearly to the peak, falls linearly, stays."""
    return np.interp(STEPS, [0, peak_at, fall_to, 3000], [low, low + rise, low + rise - fall, low + rise - fall])


def test_a_hump_is_one_rise_and_one_fall():
    rise, fall = find_transitions(curve(hump()))
    assert (rise.kind, fall.kind) == ("complexification", "simplification")
    assert rise.step == pytest.approx(100, abs=25)
    assert fall.step == pytest.approx(700, abs=50)
    assert fall.step_low <= 700 <= fall.step_high
    assert fall.step_high - fall.step_low <= 200
    assert 150 <= fall.onset <= 300
    assert 1050 <= fall.end <= 1250
    assert fall.delta_llc == pytest.approx(-400, abs=5 * fall.stderr)
    assert 1 < fall.stderr < 15
    assert fall.llc_after == pytest.approx(700, abs=10)
    assert "np." not in repr(fall)  # plain numbers, which a print shows as such


def test_a_step_is_dated_between_its_two_snapshots():
    (fall,) = find_transitions(curve(np.where(STEPS < 1510, 900.0, 700.0)))
    assert 1450 <= fall.step_low <= fall.step <= fall.step_high <= 1600
    assert (fall.onset, fall.end) == (1500, 1550)


@pytest.mark.parametrize("seed", range(20))
def test_nothing_is_found_in_a_flat_series(seed):
    assert find_transitions(curve(np.full(61, 900.0), error=30.0, seed=seed)) == []


@pytest.mark.parametrize("sign", [1, -1])
def test_a_change_is_found_after_a_larger_one_that_is_too_uncertain_to_count(sign):
    # Early in training λ may be anything, with errors as large; the curve may be of what is turned over, too.
    values = np.where(STEPS < 150, -1500.0, np.where(STEPS < 1510, 240.0, 90.0))
    errors = np.where(STEPS < 150, 1200.0, 2.0)
    noise = np.random.default_rng(0).standard_normal(61) * errors
    level = 0 if sign > 0 else 300
    (change,) = find_transitions(Trajectory.from_arrays(STEPS, level + sign * (values + noise), errors))
    assert (change.onset, change.end) == (1500, 1550)
    assert change.delta_llc == pytest.approx(-150 * sign, abs=3)


def test_small_changes_are_not_transitions_however_certain():
    assert find_transitions(curve(np.linspace(900, 880, 61), error=0.5)) == []


def test_jitter_of_the_training_beyond_the_sampling_error_is_allowed_for():
    jitter = 60 * np.random.default_rng(1).standard_normal(61)
    assert find_transitions(curve(900 + jitter, error=1.0)) == []


def test_log_spaced_steps():
    steps = np.unique(np.geomspace(1, 100_000, 80).astype(int))
    values = np.interp(np.log(steps), np.log([1, 100, 10_000, 30_000, 100_000]), [100, 1000, 1000, 500, 500])
    rise, fall = find_transitions(curve(values, steps=steps))
    assert rise.step < 100 < fall.onset
    assert fall.step == pytest.approx(17_300, rel=0.15)


def test_too_few_points_say_nothing():
    assert find_transitions(curve([1.0, 500.0, 900.0, 100.0], steps=[0, 1, 2, 3])) == []
    assert find_transitions(curve([500.0] * 5, steps=range(5))) == []
    assert find_transitions(Trajectory(())) == []


def labels(trajectory):
    return [transition.label for transition in find_transitions(trajectory)]


def test_labels_follow_the_training_loss():
    falling_loss = np.interp(STEPS, [0, 200, 3000], [1.0, 0.01, 0.0])
    assert labels(curve(hump(), train_loss=falling_loss)) == ["memorisation", "generalisation"]
    assert labels(curve(hump())) == [None, None]
    # λ falls while the loss is still high: no evidence of generalisation.
    late = np.interp(STEPS, [0, 200, 1200, 3000], [1.0, 0.5, 0.45, 0.0])
    assert labels(curve(hump(), train_loss=late))[1] is None
    # A fall of a tenth, as control networks show that merely lose weight norm.
    assert labels(curve(hump(fall=110.0), train_loss=falling_loss)) == ["memorisation", None]


@pytest.mark.parametrize(
    ("after", "words"),
    [
        (0.6, "the training loss falls from 1 to 0.6 only"),
        (1.0, "the training loss does not fall with it"),
    ],
)
def test_a_rise_without_a_label_says_what_the_loss_does(after, words):
    loss = np.where(STEPS < 1510, 1.0, after)
    (rise,) = find_transitions(curve(np.where(STEPS < 1510, 700.0, 900.0), train_loss=loss))
    assert rise.label is None
    assert words in rise.evidence


def test_validation_confirms_or_contradicts():
    loss = np.interp(STEPS, [0, 200, 3000], [1.0, 0.01, 0.0])
    learns = np.interp(STEPS, [0, 200, 800, 3000], [0.1, 0.1, 1.0, 1.0])
    confirmed = find_transitions(curve(hump(), train_loss=loss, val_accuracy=learns))[1]
    before = learns[np.searchsorted(STEPS, confirmed.onset)]
    assert confirmed.evidence.endswith(f"validation confirms: accuracy {before:.2f} before, 1.00 at its end")
    contradicted = find_transitions(curve(hump(), train_loss=loss, val_accuracy=np.full(61, 0.1)))[1]
    assert "validation contradicts" in contradicted.evidence


def test_the_centred_estimate_is_used_where_every_point_has_it():
    centred = hump()
    plain = np.where(STEPS < 150, -3000.0, centred)
    points = tuple(
        Point(int(step), float(p), 5.0, float(c), 5.0, step >= 150, ())
        for step, p, c in zip(STEPS, plain, centred, strict=True)
    )
    rise, _ = find_transitions(Trajectory(points))
    assert rise.llc_before == pytest.approx(100, abs=60)


def test_unreliable_points_are_passed_over_where_there_is_no_centred_estimate():
    values = np.where(STEPS < 150, 100.0, 800.0)
    assert find_transitions(curve(values, reliable=STEPS >= 150)) == []
    assert len(find_transitions(curve(values))) == 1
    values = np.where(STEPS < 150, -3000.0, 800.0)
    # Off a minimum λ̂ measures a slope, also where something else speaks against it as well.
    reasons = (OFF_MINIMUM, "too few draws (standard error 9 %)")
    points = tuple(
        Point(int(step), float(v), 5.0, None, None, step >= 150, () if step >= 150 else reasons)
        for step, v in zip(STEPS, values, strict=True)
    )
    assert find_transitions(Trajectory(points)) == []


@pytest.mark.parametrize("seed", range(10))
def test_a_steady_drift_is_no_transition(seed):
    assert find_transitions(curve(np.linspace(1000, 600, 61), error=20.0, seed=seed)) == []
    steps = np.unique(np.geomspace(1, 100_000, 60).astype(int))
    logarithmic = 1000 - 30 * np.log1p(steps)
    assert find_transitions(curve(logarithmic, error=10.0, seed=seed, steps=steps)) == []


def test_a_jump_on_a_drift_is_found_without_the_drift():
    (fall,) = find_transitions(curve(np.linspace(1000, 900, 61) - np.where(STEPS > 1510, 200.0, 0.0)))
    assert fall.step_low <= 1525 <= fall.step_high
    assert (fall.onset, fall.end) == (1500, 1550)
    assert fall.delta_llc == pytest.approx(-200, abs=10)


def relaxing(count, seed, plateau=0.0):
    """A fall that slows down as it goes, at unevenly spaced steps; with a phase within it, in quarters of the run."""
    rng = np.random.default_rng(seed)
    steps = 10 * np.sort(rng.choice(4 * count, count, replace=False))
    elapsed = np.maximum(steps - 10 * count / 2, 0) / (10 * count)
    begun = 0.6  # the phase begins
    elapsed = np.where(elapsed < begun, elapsed, np.maximum(elapsed - plateau, begun))
    return curve(770 + 430 * np.exp(-elapsed / 0.8), error=7.0, seed=seed, steps=steps)


def test_a_fall_that_slows_down_is_one_change():
    """A few points that happen to lie level within it are no phase."""
    falls = [len(find_transitions(relaxing(100, seed))) for seed in range(20)]
    assert falls.count(1) >= 19
    # A phase that is clearly there does part two changes.
    falls = [len(find_transitions(relaxing(100, seed, plateau=0.5))) for seed in range(20)]
    assert falls.count(2) >= 19


def test_uneven_spacing_is_no_jitter():
    """Points on a slope lie off the mean of their neighbours, but not off the line between them."""
    rng = np.random.default_rng(0)
    steps = np.cumsum(rng.choice([10, 60], 80))
    values = np.interp(steps, [800, 2000], [1000.0, 600.0])
    assert _roughness(steps.astype(float), values, np.full(80, 5.0)) < 1.0
    noisy = values + 20.0 * rng.standard_normal(80)
    assert _roughness(steps.astype(float), noisy, np.full(80, 5.0)) == pytest.approx(math.sqrt(20**2 - 5**2), rel=0.3)


def test_intervals_cover_as_often_as_they_say():
    covered = []
    for seed in range(150):
        rng = np.random.default_rng(seed)
        begin, width = rng.uniform(800, 1500), rng.uniform(150, 500)
        values = np.interp(STEPS, [begin, begin + width], [900.0, 600.0])
        fall = min(
            find_transitions(curve(values, error=30.0, seed=seed + 1000)), key=lambda transition: transition.delta_llc
        )
        covered.append(fall.step_low <= begin + width / 2 <= fall.step_high)
    # 90 %, within three standard errors of the mean of 150 below; ramps as wide as these are covered more often.
    assert 0.82 <= np.mean(covered) < 1.0


def test_free_energy_weighs_loss_against_complexity():
    trajectory = curve(np.where(STEPS < 1510, 900.0, 700.0), train_loss=np.where(STEPS < 1510, 0.3, 0.1), n=100)
    (fall,) = find_transitions(trajectory)
    assert fall.delta_free_energy == pytest.approx(100 * -0.2 + fall.delta_llc * np.log(100))
    assert find_transitions(replace(trajectory, n=None))[0].delta_free_energy is None


def test_where_the_curvature_collapses_a_fall_is_not_called_generalisation():
    loss = np.interp(STEPS, [0, 200, 3000], [1.0, 0.01, 0.0])
    trajectory = curve(hump(), train_loss=loss)
    for last, label in ((0.8, "generalisation"), (0.01, None)):
        curvature = np.interp(STEPS, [0, 200, 1200], [1.0, 1.0, last])
        points = [
            replace(point, diagnostics={"top_curvature": float(top)})
            for point, top in zip(trajectory.points, curvature, strict=True)
        ]
        fall = find_transitions(replace(trajectory, points=tuple(points)))[1]
        assert fall.label == label
        assert ("as it does under cross-entropy" in fall.evidence) == (label is None)
    # At one resolution the fall is not the curvature's, but without weight decay that of the margins.
    for decays, label in ((True, "generalisation"), (None, "generalisation"), (False, None)):
        for known in (points, trajectory.points):
            following = replace(trajectory, points=tuple(known), resolution=100.0, weight_decay=decays)
            fall = find_transitions(following)[1]
            assert fall.label == label
            assert ("margins grow without end" in fall.evidence) == (label is None)
    noisy = replace(following, weight_decay=True, points=tuple(replace(point, stderr=140.0) for point in points))
    fall = find_transitions(noisy)[1]
    assert 3 < -fall.delta_llc / fall.stderr < 6
    assert (fall.label, "standard errors; where" in fall.evidence) == (None, True)
    risen = np.interp(STEPS, [0, 200, 1200], [1.0, 1.0, 10.0])
    points = [
        replace(point, diagnostics={"top_curvature": float(top)}) for point, top in zip(points, risen, strict=True)
    ]
    fall = find_transitions(replace(trajectory, points=tuple(points), resolution=100.0, weight_decay=True))[1]
    assert (fall.label, "the largest curvature grows" in fall.evidence) == (None, True)


@pytest.mark.parametrize(("fall", "one", "following"), [(150, False, False), (200, True, False), (250, True, True)])
def test_falls_must_be_larger_where_nbeta_follows_the_curvature(fall, one, following):
    loss = np.interp(STEPS, [0, 200, 3000], [1.0, 0.01, 0.0])
    trajectory = curve(hump(fall=fall), train_loss=loss)  # from 1100
    for resolution, labelled in ((None, one), (100.0, following)):
        change = find_transitions(replace(trajectory, resolution=resolution))[1]
        assert change.label == ("generalisation" if labelled else None)
        assert ("falls by only" in change.evidence) == (not labelled)


def test_levels_far_below_zero_hide_no_change():
    values = hump(low=100.0, rise=1000.0, fall=200.0)
    values[0] = -20_000.0  # λ_c far off any minimum
    fall = find_transitions(curve(values))[-1]
    assert (fall.kind, round(fall.llc_after, -2)) == ("simplification", 900)


def test_of_a_fall_that_begins_while_the_loss_is_high_the_rest_counts():
    values = np.interp(STEPS, [0, 200, 600, 1400, 3000], [100.0, 1000.0, 1000.0, 500.0, 500.0])
    for low_from, label in ((800, "generalisation"), (1350, None)):
        loss = np.where(low_from > STEPS, 1.0, 0.0)
        fall = find_transitions(curve(values, train_loss=loss))[-1]
        assert fall.kind == "simplification"
        assert fall.label == label


def jumps(*levels):
    """Rises to the first level, then jumps at evenly spaced steps."""
    return np.where(STEPS < 200, np.interp(STEPS, [0, 200], [100, 1000]), np.repeat(levels, 61 // len(levels) + 1)[:61])


def test_falls_in_a_row_count_together():
    loss = np.interp(STEPS, [0, 150, 3000], [1.0, 0.01, 0.001])
    cases = (
        ((1000, 900, 800), [None, "generalisation"], "20 % in all"),
        ((1000, 930, 870), [None, None], "only 13 %"),
        ((1000, 900, 800, 720), [None, "generalisation", None], "only 10 %"),  # from where the label was given
        ((1000, 900, 1000, 900), [None, None, None], "only 10 %"),  # from where it rose to
    )
    for levels, expected, words in cases:
        first, *falls = find_transitions(curve(jumps(*levels), train_loss=loss))
        assert first.label == "memorisation"
        assert [fall.label for fall in falls] == expected
        assert words in falls[-1].evidence


@pytest.mark.parametrize(
    ("places", "levels", "label", "words"),
    [
        ([1000, 1001, 3000], [1000, 900, 750], "generalisation", "25 % in all"),
        ([1000, 1001, 3000], [1000, 900, 900], None, "only 10 %"),
        ([200, 2000, 2001], [1000, 930, 830], "generalisation", "17 % in all"),
        ([200, 2000, 2001], [930, 930, 830], None, "only 11 %"),
    ],
)
def test_what_the_phases_beside_a_fall_lose_counts(places, levels, label, words):
    values = np.where(STEPS < 200, jumps(levels[0]), np.interp(STEPS, places, levels))
    *_, fall = find_transitions(
        curve(values, error=2.0, train_loss=np.interp(STEPS, [0, 150, 3000], [1.0, 0.01, 0.001]))
    )
    assert (fall.kind, fall.label) == ("simplification", label)
    assert words in fall.evidence


def test_a_loss_that_is_not_known_between_takes_no_label_away():
    loss = np.interp(STEPS, [0, 150, 3000], [1.0, 0.01, 0.001])
    loss[10] = np.nan
    _, fall = find_transitions(curve(hump(), train_loss=loss))
    assert (fall.label, "by 36 %" in fall.evidence) == ("generalisation", True)


def test_unreliable_points_weigh_less():
    values = np.where(STEPS < 1510, 900.0, 800.0)
    points = tuple(
        Point(int(step), v, 5.0, v, 5.0, bad is False, ("heated by minibatch noise",) if bad else ())
        for step, v, bad in zip(STEPS, values + 40.0 * (STEPS > 2500), STEPS > 2500, strict=True)
    )
    (fall, *_) = find_transitions(Trajectory(points))
    assert fall.llc_after == pytest.approx(800, abs=12)


@pytest.mark.parametrize("width", [0, 600])
def test_error_bars_of_changes_are_their_scatter(width):
    values = np.interp(STEPS, [0, 1500 - width / 2 - 25, 1500 + width / 2 + 25, 3000], [500.0, 500.0, 800.0, 800.0])
    found = [find_transitions(curve(values, error=10.0, seed=seed)) for seed in range(150)]
    errors = np.array(
        [(transitions[0].delta_llc - 300) / transitions[0].stderr for transitions in found if len(transitions) == 1]
    )
    assert len(errors) >= 140
    # Of normal errors 95 % and 68 %; with error bars twice or half as large, 99.99 % and 95 %, or 67 % and 38 %.
    assert 0.88 <= np.mean(abs(errors) < 1.96) <= 0.99
    assert 0.56 <= np.mean(abs(errors) < 1) <= 0.80


def test_doubtful_points_count_less():
    steps, values = np.arange(0, 400, 50), np.repeat([800.0, 850.0], 4)
    sure = Trajectory(tuple(Point(int(s), v, 7.0, v, 7.0, True, ()) for s, v in zip(steps, values, strict=True)))
    assert len(find_transitions(sure)) == 1
    doubts = ("too few draws (standard error 9 %)",)
    doubtful = replace(sure, points=tuple(replace(point, reliable=False, reasons=doubts) for point in sure.points))
    assert find_transitions(doubtful) == []


@pytest.mark.parametrize("seed", range(5))
def test_a_change_begins_when_the_one_before_it_has_ended(seed):
    # The rise takes one snapshot, and the fall sets in at once, straight in the logarithm of the step.
    values = np.where(STEPS == 0, 0.0, 300 - 28 * np.log1p(np.minimum(STEPS, 2000) / 50))
    rise, fall = find_transitions(curve(values, error=2.0, seed=seed, train_loss=np.where(STEPS == 0, 0.5, 1e-4)))
    assert rise.end <= fall.onset < fall.end
    assert (rise.label, fall.label) == ("memorisation", "generalisation")


def test_a_dip_of_one_snapshot_gets_no_label():
    values = hump(fall=0.0)
    values[35] = 500.0
    loss = np.interp(STEPS, [0, 150, 3000], [1.0, 0.01, 0.001])
    _, fall, rise = find_transitions(curve(values, train_loss=loss))
    assert (fall.label, fall.evidence) == (None, "no label: λ falls by 54 %, but it lasts for one snapshot")
    assert rise.kind == "complexification"
    values[36:40] = 500.0
    assert [transition.label for transition in find_transitions(curve(values, train_loss=loss))][1] == "generalisation"
