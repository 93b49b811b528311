import json
import math
from dataclasses import replace

import pytest

from groktrace.analysis.detection.piecewise import usable_points
from groktrace.analysis.measurement.reference import Reference
from groktrace.analysis.results.grokking import Grokking
from groktrace.analysis.results.trajectory import Point, Trajectory
from groktrace.reporting.console import as_json, by_accuracy, summary, transitions_table
from groktrace.reporting.numbers import number
from groktrace.reporting.series import Events, Series


def test_json_holds_the_result_and_nothing_that_is_no_json(grokked, odd):
    found = json.loads(json.dumps(as_json(*grokked), allow_nan=False))
    assert found["trajectory"][1]["llc"] == -732
    assert found["transitions"][1]["label"] == "generalisation"
    assert found["grokking"]["generalised_at"] == 600
    assert found["nbeta"] == 30800
    json.dumps(as_json(*odd), allow_nan=False)


def test_table_of_transitions(grokked, odd):
    transitions = grokked[1].transitions
    text = transitions_table(grokked[1])
    lines = text.splitlines()
    assert lines[0].split()[:3] == ["transition", "label", "step"]
    assert lines[1].startswith("complexification  memorisation")
    assert lines[2].startswith("simplification    generalisation")
    assert f"{transitions[1].onset} - {transitions[1].end}" in lines[2]
    assert "validation confirms" in text
    assert "generalised at step 600, 550 steps later" in text
    few = usable_points(odd[0].trajectory) < 5
    assert ("Too few usable snapshots" if few else "No transition found in") in transitions_table(odd[1])


def test_summary_names_settings_and_doubtful_snapshots(grokked, odd):
    text = summary(*grokked)
    assert text.startswith(
        "runs/x: 12 snapshots, n = 317, method leimkuhler_matthews, nβ = 30800, γ = 424, resolution 10"
    )
    (first,) = [line for line in text.splitlines() if line.lstrip().startswith("0 ")]
    assert "-3125" in first
    assert first.endswith("not at a minimum")
    assert summary(*odd)


def test_long_summaries_are_thinned_and_say_so(odd):
    trajectory = odd[0].trajectory
    text = summary(*odd)
    rows = [line for line in text.splitlines() if line.strip()[:1].isdigit()]
    assert len(rows) <= 27  # 25, and lines of text that begin with a digit
    assert ("snapshots not shown" in text) == (len(trajectory.points) > 25)


def test_long_summaries_count_the_doubtful_snapshots_that_they_hide():
    points = tuple(Point(step, 1.0, 0.1, reliable=step % 2 == 0, reasons=("drift: yes",)) for step in range(100))
    trajectory = Trajectory(points)
    text = summary(Series.of(trajectory), Events.of(trajectory))
    shown = text.count("drift")
    assert f"of 100 snapshots not shown, {50 - shown} of them unreliable" in text


def test_many_transitions_do_not_lengthen_the_table(grokked):
    first = grokked[1].transitions[0]
    trajectory = Trajectory(tuple(Point(step, 1.0, 0.1) for step in range(500)))
    transitions = [replace(first, step=i, step_low=i, step_high=i + 1, onset=i, end=i + 3) for i in range(9, 499, 9)]
    assert (
        len(summary(Series.of(trajectory), replace(grokked[1], transitions=transitions)).split("\n(")[0].splitlines())
        <= 2 + 1 + 25
    )


def test_json_has_no_numbers_that_are_not_finite(grokked):
    series, events = grokked
    first, severe = replace(events.transitions[0], stderr=math.nan), replace(events.grokking, severity=math.inf)
    found = as_json(series, replace(events, transitions=(first,), grokking=severe))
    assert json.loads(json.dumps(found, allow_nan=False))["transitions"][0]["stderr"] is None
    assert found["grokking"] == {"memorised_at": 50, "generalised_at": 600, "severity": None, "delay": 550}


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (
            Grokking(50, 600, 0.2),
            "memorised at step 50, generalised at step 600, 550 steps later, grokking severity 0.2.",
        ),
        (Grokking(50, None, 0.0), "memorised at step 50, validation accuracy stays below 0.95."),
        (Grokking(None, 600, 0.0), "generalised at step 600, grokking severity 0."),
        (Grokking(None, None, 0.0), "validation accuracy stays below 0.95."),
    ],
)
def test_what_accuracies_tell_is_said_in_words(found, said):
    assert by_accuracy(found) == f"By accuracy: {said}"
    assert by_accuracy(Grokking(None, None, None)) == ""


@pytest.mark.parametrize(
    ("value", "sign", "text"),
    [
        (None, "", "-"),
        (math.nan, "", "-"),
        (0.0, "", "0"),
        (0.12345, "", "0.123"),
        (-0.25, "+", "-0.25"),
        (99.97, "", "100"),
        (999.7, "", "1000"),
        (12345.6, "+", "+12346"),
        (3e9, "", "3e+09"),
    ],
)
def test_numbers(value, sign, text):
    assert number(value, sign) == text


def test_reference_and_curvature_in_the_summary(grokked):
    series, events = grokked
    trajectory = series.trajectory
    assert "reference" not in summary(*grokked)
    reference = Reference(3634.0, "jacobian", 3000, 7268, 1.27e-6, 1e5)
    first = replace(trajectory.points[0], hessian_trace=19.5, hessian_trace_stderr=0.25, hessian_top=2.0)
    measured = replace(trajectory, points=(first, *trajectory.points[1:]), reference=reference)
    text = summary(Series.of(measured), events)
    assert (
        "reference λ = 3634, half the Jacobian's rank of 7268 at step 3000 (tolerance 1.27e-06, gap 100000)\n" in text
    )
    heading, row = text.splitlines()[3:5]
    assert heading.split()[-4:] == ["tr", "H", "±", "h_max"]
    assert "19.5  0.25      2" in row
