import re
from dataclasses import replace

import numpy as np
import pytest

from groktrace.analysis.detection import find_transitions
from groktrace.analysis.measurement.llc import OFF_MINIMUM, PERHAPS_OFF
from groktrace.analysis.results.trajectory import Point, Trajectory
from groktrace.reporting.remarks import none_found, remarks, single_chain, untrusted

STEPS = np.arange(0, 3050, 50)


def measured(values, error=3.0, seed=0, **more):
    values = values + error * np.random.default_rng(seed).standard_normal(len(values))
    points = [
        Point(50 * i, float(v) - 2, error, float(v), error, **{name: column[i] for name, column in more.items()})
        for i, v in enumerate(values)
    ]
    return Trajectory(tuple(points))


@pytest.mark.parametrize(
    ("values", "error", "said"),
    [
        (np.full(61, 900.0), 3.0, "λ_c stays at 900, within its errors of 0.3"),
        (np.full(61, 900.0), 200.0, ", within its errors of 2"),
        (np.full(61, 100.0), 250.0, ", within its errors of 2"),
        (np.linspace(1000, 600, 61), 0.1, "λ_c falls by 40 % from 1000 to 600 over steps 0-3000, too steadily to part"),
        (
            np.linspace(200, 600, 61),
            90.0,
            ", too steadily to part one phase from another, though the points scatter by 1",
        ),
        (np.full(4, 900.0), 3.0, "Too few usable snapshots to look for transitions: 4 of 4, and it takes 5."),
    ],
)
def test_where_there_is_no_transition_the_curve_is_told(values, error, said):
    trajectory = measured(values, error)
    assert find_transitions(trajectory) == []
    text = none_found(trajectory)
    assert said in text
    assert text.startswith("Too few" if len(values) < 5 else "No transition found in 61 snapshots: λ_c ")
    assert text.endswith(".")


def test_a_change_that_does_not_count_is_named_with_the_reason():
    text = none_found(measured(np.where(STEPS < 1500, -300.0, 500.0), 0.1))
    assert "λ_c rises from -300 to 500 over steps 1450-1500. The rise about step 14" in text
    assert text.endswith("does not count: λ_c is not positive on one side of it.")


def test_of_too_few_usable_snapshots_the_others_are_explained():
    points = tuple(
        Point(step, -5.0, 1.0, reliable=step > 7, reasons=(OFF_MINIMUM,) * (step <= 7)) for step in range(10)
    )
    text = none_found(Trajectory(points))
    assert text.startswith(
        "Too few usable snapshots to look for transitions: 2 of 10, and it takes 5; 8 are unreliable"
    )
    assert text.endswith("(not at a minimum).")


def test_targets_that_move_are_told_once():
    loss = (0.01 + (STEPS / 300) ** 2).tolist()
    off = {"reliable": [False] * 61, "reasons": [(OFF_MINIMUM,)] * 61}
    (sentence,) = remarks(measured(np.linspace(900, 300, 61), train_loss=loss, **off))
    assert sentence.startswith("The training loss rises from 0.01 at step 0 to 100 at step 3000: targets that move")
    assert remarks(measured(np.full(61, 900.0), train_loss=loss[::-1], **off)) == []


def alone(reasons, **more):
    reasons = [reasons if step < 5 else () for step in range(61)]
    points = tuple(Point(50 * i, 50.0, 1.0, None, None, not why, why, diagnostics={}) for i, why in enumerate(reasons))
    return Trajectory(points, **{"method": "baoab", "nbeta": 1.0, **more})


def test_what_a_single_chain_loses_is_told_where_it_matters():
    assert single_chain(alone(())) == ""
    for reason in (OFF_MINIMUM, PERHAPS_OFF):
        text = single_chain(alone((reason,)))
        assert text.startswith("A single chain gives no λ_c: 5 of 61 snapshots are not, or perhaps not, at a minimum")
        assert text.endswith("Analyse with 2 chains or more.")
    assert "where nβ follows the curvature" in single_chain(alone((), nbeta=None, resolution=100.0))
    # Curves measured elsewhere have no chains to speak of; two have λ_c.
    assert single_chain(alone((OFF_MINIMUM,), method=None)) == ""
    assert single_chain(replace(measured(np.full(9, 5.0)), method="baoab", resolution=100.0)) == ""


def test_samples_that_are_too_few_for_lambda_of_all_are_told():
    def of(shares, reasons=()):
        points = tuple(
            Point(50 * i, 50.0, 1.0, 50.0, 1.0, not reasons, reasons, diagnostics={"unseen": share})
            for i, share in enumerate(shares)
        )
        return remarks(Trajectory(points, n=60_000))

    assert of([0.01, 0.03, None]) == []
    told = [
        "λ is that of some of the n = 60,000 training samples. On all it would be larger, by about 12 % where that is "
        "most (step 50)."
    ]
    assert of([0.05, 0.12, 0.04]) == of([0.05, 0.12, 0.04], (OFF_MINIMUM,)) == told
    assert of([0.05, 0.12, 0.04], ("left the basin: the loss",)) == []


def test_a_loss_that_is_no_mean_over_samples_is_told():
    def of(effect):
        points = tuple(Point(step, 50.0, 1.0, 50.0, 1.0, diagnostics={"batch_effect": effect}) for step in range(3))
        return remarks(Trajectory(points))

    assert of(0.04) == of(None) == []
    (sentence,) = of(0.25)
    assert sentence.startswith("The loss is no mean over samples: that of 256 or fewer together is off")
    assert " by 25 %, at the first snapshot. Losses and λ are those of all stored samples together" in sentence


def test_every_snapshot_that_is_not_to_be_trusted_is_named_one_line_a_reason():
    cold = [f"not equilibrated (virial ratio 0.{i}, expected 1); needs a longer burn-in" for i in range(9)]
    reasons = {0: (OFF_MINIMUM,), 50: (OFF_MINIMUM,), 100: (OFF_MINIMUM, cold[1]), 200: (cold[2],), 350: (OFF_MINIMUM,)}
    points = tuple(
        Point(step, 1.0, 0.1, 1.0, 0.1, step not in reasons, reasons.get(step, ())) for step in range(0, 500, 50)
    )
    assert untrusted(Trajectory(points)) == [
        f"4 of 10 snapshots, steps 0-100, 350: {OFF_MINIMUM}",
        f"2 of 10 snapshots, steps 100, 200: {cold[1]} (at step 100)",
        "5 of 10 snapshots in all",
    ]
    assert untrusted(Trajectory((Point(7, 1.0, 0.1, reliable=False),))) == ["1 of 1 snapshots, step 7: no reason given"]
    assert untrusted(Trajectory((Point(7, 1.0, 0.1),))) == []


@pytest.mark.parametrize("seed", [3, 16, 18, 20, 22])
def test_no_level_is_told_beyond_all_points(seed):
    """A straight piece through points of very different errors may lead beyond those at its ends."""
    generator = np.random.default_rng(seed)
    count = int(generator.integers(6, 14))
    error = np.exp(generator.uniform(0, 4, count))
    values = np.linspace(60, 10, count) + error * generator.standard_normal(count)
    text = none_found(Trajectory.from_arrays(np.arange(count) * 10, values, error))
    told = [float(number) for number in re.search(r"from (-?[\d.]+) to (-?[\d.]+) over", text).groups()]
    assert max(told) <= values.max() + 0.01 * abs(values.max())
    assert min(told) >= values.min() - 0.01 * abs(values.min())
