"""What is concluded where the training loss, the sign of λ or the chains speak against it."""

from dataclasses import replace

import numpy as np
import pytest

from groktrace.analysis.detection import PiecewiseDetector, find_transitions
from groktrace.analysis.detection.labels import high_loss, risen_in_words, since_risen
from groktrace.analysis.measurement.llc import OFF_MINIMUM, PERHAPS_OFF
from groktrace.analysis.results.grokking import measure_grokking
from groktrace.analysis.results.trajectory import OtherSamples, Point, Trajectory

STEPS = np.arange(0, 3050, 50)
HUMP = np.interp(STEPS, [0, 200, 1200, 3000], [100.0, 1000.0, 600.0, 600.0])
FALLING = np.interp(STEPS, [0, 150, 3000], [1.0, 0.01, 0.001])
LEFT = "left the basin: the chains' loss has climbed 97 % of the way"
COLD = "not equilibrated (virial ratio 0.9, expected 1); needs a longer burn-in"


def measured(centred, loss=FALLING, reasons=lambda step: (), plain=None):
    noise = 3.0 * np.random.default_rng(0).standard_normal(len(STEPS))
    plain = centred if plain is None else plain
    points = tuple(
        Point(int(step), float(p + e), 3.0, float(c + e), 3.0, not reasons(step), reasons(step), float(lost))
        for step, p, c, e, lost in zip(STEPS, plain, centred, noise, loss, strict=True)
    )
    return Trajectory(points, nbeta=1.0)


def found(trajectory):
    return [(transition.kind, transition.label) for transition in find_transitions(trajectory)]


RISE, FALL = ("complexification", "memorisation"), ("simplification", "generalisation")


def test_a_run_that_groks_off_any_minimum_has_its_transitions():
    off = measured(HUMP, reasons=lambda step: (OFF_MINIMUM,), plain=HUMP - 5000)
    assert found(off) == found(measured(HUMP)) == [RISE, FALL]
    assert {transition.curve for transition in find_transitions(off)} == {"llc_centred"}


@pytest.mark.parametrize(("risen", "verb"), [(700, "confirms"), (100, "contradicts")])
def test_validation_is_judged_from_where_lambda_begins_to_fall(risen, verb):
    run, accuracy = measured(HUMP), np.where(risen > STEPS, 0.1, 0.9)  # any training begins at chance
    points = [replace(point, val_accuracy=float(value)) for point, value in zip(run.points, accuracy, strict=True)]
    fall = find_transitions(replace(run, points=tuple(points)))[-1]
    before = accuracy[np.searchsorted(STEPS, fall.onset)]
    assert f"validation {verb}: accuracy {before:.2f} before, 0.90 at its end" in fall.evidence


def test_what_is_negative_is_no_level():
    deep = np.where(STEPS < 150, -800.0, HUMP)
    assert found(measured(deep)) == [FALL]
    ends = PiecewiseDetector().candidates(measured(np.where(STEPS > 2000, -300.0, HUMP)))
    assert [objection for _, objection in ends] == [None, None, "λ_c is not positive on one side of it"][: len(ends)]
    assert all(
        min(transition.llc_before, transition.llc_after) > 0 for transition in find_transitions(measured(HUMP - 700))
    )
    # Zero to within the errors is one in curves that were measured elsewhere; λ_c of a basin is positive.
    nothing = measured(np.where(STEPS < 150, -1.0, 900.0))
    assert found(nothing) == []
    elsewhere = Trajectory.from_arrays(STEPS, nothing.column("llc"), nothing.column("stderr"))
    assert [kind for kind, _ in found(elsewhere)] == [RISE[0]]


@pytest.mark.parametrize(
    "reason", [LEFT, COLD, "not local: the chains are", "leaving the basin: the loss flattens out"]
)
def test_a_level_that_no_chain_has_measured_in_its_basin_is_none(reason):
    assert found(measured(HUMP, reasons=lambda step: (reason,))) == []
    assert found(measured(HUMP, reasons=lambda step: (reason,) if step > 600 else ())) == [RISE]
    # One snapshot of the last phase that is sound tells its level, with what the others add.
    assert found(measured(HUMP, reasons=lambda step: (reason,) if step > 600 and step != 2000 else ())) == [RISE, FALL]
    assert found(measured(HUMP, reasons=lambda step: ("too few draws (standard error 9 %)",))) == [RISE, FALL]


def test_a_loss_is_low_beside_where_it_came_from():
    falls = np.array([4.0, 1.0, 0.3, 0.2, 0.1])
    assert high_loss(falls).tolist() == [True, True, False, False, False]
    assert high_loss(falls[::-1]).tolist() == [False, True, True, True, True]
    # A spike that is still to come lifts nothing before it.
    assert high_loss(np.array([1.0, 0.3, 0.0, 50.0, 4.0, 0.05])).tolist() == [True, True, False, True, False, False]
    assert high_loss(np.array([np.nan, 1.0, np.inf, 0.0])).tolist() == [False, True, True, False]
    assert high_loss(np.full(4, 0.7)).tolist() == [False] * 4
    assert not high_loss(np.full(3, np.nan)).any()


RISING = {
    "from the first step": 0.03 + (STEPS / 300) ** 2,
    "after it has fallen": np.interp(STEPS, [0, 150, 300, 3000], [4.0, 0.1, 0.1, 9.0]),
    "to a fifth of where it was": np.interp(STEPS, [0, 150, 300, 900], [4.0, 0.1, 0.1, 0.9]),
    "with jumps": np.where(STEPS < 300, 0.05, 1.5 + np.sin(STEPS / 40)),
}


@pytest.mark.parametrize("loss", RISING.values(), ids=RISING)
def test_where_targets_move_there_is_no_transition(loss):
    trajectory = measured(HUMP, loss, lambda step: (OFF_MINIMUM,) if step else ())
    assert FALL not in found(trajectory)
    assert found(trajectory) in ([], [RISE], [(RISE[0], None)])
    sentence = risen_in_words(trajectory)
    assert sentence.startswith(f"The training loss rises from {loss.min():.3g} at step {STEPS[np.argmin(loss)]} to ")
    assert "targets that move, or training that diverges" in sentence


@pytest.mark.parametrize("loss", RISING.values(), ids=RISING)
def test_a_loss_that_has_risen_gives_no_label_at_minima_either(loss):
    trajectory = measured(HUMP, loss)
    assert risen_in_words(trajectory) == ""
    assert FALL not in found(trajectory)


@pytest.mark.parametrize(
    "loss",
    [
        FALLING,
        np.where(STEPS == 1500, 2.0, FALLING),  # a spike
        np.where(STEPS > 1500, 30 * FALLING, FALLING),  # still low
        np.where(STEPS > 2950, 0.9, FALLING),  # it may come down again
        np.full(61, 0.5),
        np.full(61, np.nan),
    ],
)
def test_other_losses_do_not_rise(loss):
    assert since_risen(measured(HUMP, loss, lambda step: (OFF_MINIMUM,))) is None


def test_of_a_risen_loss_the_evidence_says_so():
    loss = np.interp(STEPS, [0, 150, 300, 3000], [4.0, 0.1, 0.1, 9.0])
    fall = find_transitions(measured(np.interp(STEPS, [0, 200, 2000, 2500], [100, 1000, 1000, 600]), loss))[-1]
    assert fall.label is None
    assert fall.evidence.startswith("no label: λ falls while the training loss, 5.")
    assert fall.evidence.endswith(", has risen from 0.1")


TWICE = np.interp(STEPS, [0, 150, 1200, 1500, 1800, 3000], [100, 1000, 1000, 300, 900, 900])


@pytest.mark.parametrize("below_zero", [0.0, 3.0])
def test_a_loss_that_falls_back_from_a_spike_memorises_nothing_anew(below_zero):
    fitted = np.interp(STEPS, [0, 150, 1200, 1400, 1800, 3000], [1.0, 0.01, 0.009, 0.6, 0.009, 0.001])
    rises = [t for t in find_transitions(measured(TWICE, fitted - below_zero)) if t.kind == "complexification"]
    assert [rise.label for rise in rises] == ["memorisation", None]
    assert f"; before, it has risen from {0.009 - below_zero:.3g}" in rises[1].evidence


def test_a_rise_is_memorisation_below_zero_too():
    loss = np.interp(STEPS, [0, 150, 3000], [0.3, -2.0, -2.6])
    assert found(measured(HUMP, loss))[0] == RISE
    loss = np.interp(STEPS, [0, 150, 3000], [-2.0, -2.1, -2.6])
    assert found(measured(HUMP, loss))[0] == (RISE[0], None)


def test_which_curve_decides():
    whole = measured(HUMP, plain=HUMP + 50)
    assert (whole.curve.name, whole.curve.symbol) == ("llc_centred", "λ_c")
    some = replace(whole, points=(replace(whole.points[0], llc_centred=None), *whole.points[1:]))
    assert (some.curve.name, some.curve.symbol) == ("llc", "λ̂")
    lost = replace(whole, points=(replace(whole.points[0], llc=None, llc_centred=None), *whole.points[1:]))
    assert lost.curve.name == "llc_centred"
    assert np.isnan(lost.curve.value[0])
    assert Trajectory(()).curve.name == "llc"


def test_a_slope_that_a_single_chain_may_have_measured_is_no_change():
    """λ̂ rises to the basin's as the slope goes away; with a single chain there is no λ_c to tell so."""
    values = np.where(STEPS < 300, 20.0 + STEPS, 900.0)
    for reason, expected in ((PERHAPS_OFF, []), (OFF_MINIMUM, []), ("too few draws (standard error 9 %)", [RISE[0]])):
        trajectory = measured(values, reasons=lambda step, why=reason: (why,) if step < 300 else ())
        single = [replace(point, llc_centred=None, stderr_centred=None) for point in trajectory.points]
        assert [kind for kind, _ in found(replace(trajectory, points=tuple(single)))] == expected


def test_no_label_rests_on_a_loss_that_is_not_trained_on():
    points = [
        replace(point, train_accuracy=1.0, val_accuracy=float(point.step > 1000)) for point in measured(HUMP).points
    ]
    own = Trajectory(tuple(points), nbeta=1.0)
    other = replace(own, data=OtherSamples("other.safetensors", "12ab", True))
    assert found(own) == [RISE, FALL]
    assert found(other) == [(RISE[0], None), (FALL[0], None)]
    evidence = {transition.evidence for transition in find_transitions(other)}
    assert evidence == {"no label: not measured on the run's training samples"}
    assert (measure_grokking(own).memorised_at, measure_grokking(other).memorised_at) == (0, None)
    assert measure_grokking(other).generalised_at == measure_grokking(own).generalised_at == 1050
    rising = replace(other, points=measured(HUMP, loss=FALLING[::-1]).points)
    assert [kind for kind, _ in found(rising)] == [RISE[0], FALL[0]]  # such a loss may rise
    assert since_risen(rising) is None


@pytest.mark.parametrize(
    ("curvature", "loss", "label"),
    [
        (0.55, FALLING, None),  # as under cross-entropy, where all curvature shrinks with the loss
        (0.55, np.interp(STEPS, [0, 150], [1.0, 0.01]), "generalisation"),  # not with the loss, which stays
        (0.55, np.interp(STEPS, [0, 150, 1200], [1.0, 0.01, 1e-5]), "generalisation"),  # hardly with it
        (0.7, FALLING, "generalisation"),  # λ falls by more than that can make it
        (0.45, np.interp(STEPS, [0, 150], [1.0, 0.01]), None),  # it halves, whatever the loss does
    ],
)
def test_a_fall_is_no_evidence_where_curvature_that_shrinks_with_the_loss_does_as_much(curvature, loss, label):
    tops = np.interp(STEPS, [200, 1200], [2.0, 2.0 * curvature])
    plain = measured(HUMP, loss)  # falls by 40 % from step 200 to 1200
    points = [
        replace(point, diagnostics={"top_curvature": float(top)}) for point, top in zip(plain.points, tops, strict=True)
    ]
    fall = find_transitions(replace(plain, points=tuple(points)))[-1]
    assert (fall.kind, fall.label) == ("simplification", label)
    if label is None:
        assert "the largest curvature falls too" in fall.evidence
    following = replace(plain, points=tuple(points), nbeta=None, resolution=100.0)
    assert find_transitions(following)[-1].label == "generalisation"


def test_a_fall_is_held_against_the_curvature_from_its_peak_on_and_not_from_where_the_fall_is_dated():
    plain = measured(HUMP, FALLING)
    early = np.interp(STEPS, [200, 400, 1200], [1.3, 2.0, 1.1])  # 0.85 of the first, 0.55 of the largest
    points = [
        replace(point, diagnostics={"top_curvature": float(top)})
        for point, top in zip(plain.points, early, strict=True)
    ]
    fall = find_transitions(replace(plain, points=tuple(points)))[-1]
    assert fall.label is None
    assert "the largest curvature falls too" in fall.evidence


def test_a_curvature_that_springs_up_for_a_snapshot_has_shrunk_all_the_same():
    steps = STEPS[STEPS <= 1000]
    tops = np.where(steps == 1000, 2.0, np.interp(steps, [200, 950], [2.0, 0.5]))
    plain = measured(HUMP)
    points = [
        replace(point, diagnostics={"top_curvature": float(top)})
        for point, top in zip(plain.points, tops, strict=False)
    ]
    fall = find_transitions(Trajectory(tuple(points), nbeta=1.0))[-1]
    assert (fall.kind, fall.label) == ("simplification", None)
    assert "4-fold" in fall.evidence
