import pytest

from groktrace.analysis.results.grokking import measure_grokking
from groktrace.analysis.results.trajectory import Trajectory


def run(train, val, steps=(0, 10, 20, 40)):
    zeros = [0.0] * len(steps)
    return measure_grokking(Trajectory.from_arrays(steps, zeros, zeros, train_accuracy=train, val_accuracy=val))


def test_steps_and_severity():
    found = run([0.1, 1.0, 1.0, 1.0], [0.1, 0.1, 0.5, 0.96])
    assert (found.memorised_at, found.generalised_at) == (10, 40)
    # Trapezoids: 10·(0 + 0.9)/2 + 10·(0.9 + 0.5)/2 + 20·(0.5 + 0.04)/2, over 40 steps.
    assert found.severity == pytest.approx((4.5 + 7.0 + 5.4) / 40)


def test_no_severity_without_generalisation():
    found = run([0.1, 1.0, 1.0, 1.0], [0.1, 0.1, 0.1, 0.1])
    assert (found.memorised_at, found.generalised_at, found.severity) == (10, None, 0.0)


def test_unknown_accuracies():
    found = run(None, None)
    assert (found.memorised_at, found.generalised_at, found.severity) == (None, None, None)
