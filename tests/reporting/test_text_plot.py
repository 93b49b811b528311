import numpy as np

from groktrace.analysis.results.trajectory import Trajectory
from groktrace.reporting.series import Events, Series
from groktrace.reporting.text_plot import small_curve


def column(step, last=3000):
    """Where a step lies on 64 characters, of snapshots from 0 and 50 on that are spaced like logarithms."""

    def at(step):
        return step / 50 if step < 50 else 1 + np.log10(step / 50)

    return round(at(step) / at(last) * 63)


def test_the_curve_rises_and_falls_where_lambda_does(grokked):
    transitions = grokked[1].transitions
    lines = small_curve(*grokked).splitlines()
    assert lines[0].startswith("1340 |")
    assert lines[7].startswith(" 139 |")
    top = [i for i, character in enumerate(lines[0].split("|", 1)[1]) if character in "'."]
    assert column(150) in top  # the peak's
    assert max(top) < column(600)
    assert lines[8].split() == ["0", "100", "1000", "3000"]
    assert abs(lines[8].index("1000") + 2 - 6 - column(1000)) <= 1
    assert lines[9].split() == ["1", "2"]
    assert abs(lines[9].index("2") - 6 - column(transitions[1].step)) <= 1


def test_evenly_spaced_snapshots_have_a_linear_axis():
    steps = np.arange(0, 1050, 50)
    trajectory = Trajectory.from_arrays(steps, np.where(steps < 400, 900.0, 600.0), np.full(len(steps), 1.0))
    events = Events.of(trajectory)
    lines = small_curve(Series.of(trajectory), events).splitlines()
    assert lines[8].split() == ["0", "1000"]
    assert len(lines[8]) == len("900 |") + 64
    assert abs(lines[9].index("1") - 5 - round(events.transitions[0].step / 1000 * 63)) <= 1


def test_a_curve_of_odd_trajectories(odd):
    known = sum(point.llc is not None for point in odd[0].trajectory.points)
    assert (small_curve(*odd) == "") == (known < 3)
