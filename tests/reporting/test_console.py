import io
import json
import math
import os
import threading
from dataclasses import replace

import pytest

from groktrace.analysis.detection.piecewise import usable_points
from groktrace.analysis.grokking import measure_grokking
from groktrace.analysis.reference import Reference
from groktrace.analysis.trajectory import Point, Trajectory
from groktrace.reporting import console
from groktrace.reporting.console import Progress, as_json, number, summary, transitions_table


def test_json_holds_the_result_and_nothing_that_is_no_json(grokked, odd):
    found = json.loads(json.dumps(as_json(*grokked), allow_nan=False))
    assert found["trajectory"][1]["llc"] == -732
    assert found["transitions"][1]["label"] == "generalisation"
    assert found["grokking"]["generalised_at"] == 600
    assert found["nbeta"] == 30800
    json.dumps(as_json(*odd), allow_nan=False)


def test_table_of_transitions(grokked, odd):
    trajectory, transitions, grokking = grokked
    text = transitions_table(trajectory, transitions, grokking)
    lines = text.splitlines()
    assert lines[0].split()[:3] == ["transition", "label", "step"]
    assert lines[1].startswith("complexification  memorisation")
    assert lines[2].startswith("simplification    generalisation")
    assert f"{transitions[1].onset} - {transitions[1].end}" in lines[2]
    assert "validation confirms" in text
    assert "generalised at step 600, 550 steps later" in text
    few = usable_points(odd[0]) < 5
    assert ("Too few usable snapshots" if few else "No transition found in") in transitions_table(*odd)


def test_summary_names_settings_and_doubtful_snapshots(grokked, odd):
    text = summary(*grokked)
    assert text.startswith("runs/x: 12 snapshots, n = 317, method averaged, nβ = 30800, γ = 424, resolution 10")
    (first,) = [line for line in text.splitlines() if line.lstrip().startswith("0 ")]
    assert "-3125" in first
    assert first.endswith("not at a minimum")
    assert summary(*odd)


def test_long_summaries_are_thinned_and_say_so(odd):
    trajectory = odd[0]
    text = summary(*odd)
    rows = [line for line in text.splitlines() if line.strip()[:1].isdigit()]
    assert len(rows) <= 27  # 25, and lines of text that begin with a digit
    assert ("snapshots not shown" in text) == (len(trajectory.points) > 25)


def test_long_summaries_count_the_doubtful_snapshots_that_they_hide():
    points = tuple(Point(step, 1.0, 0.1, reliable=step % 2 == 0, reasons=("drift: yes",)) for step in range(100))
    trajectory = Trajectory(points)
    text = summary(trajectory, [], measure_grokking(trajectory))
    shown = text.count("drift")
    assert f"of 100 snapshots not shown, {50 - shown} of them unreliable" in text


def test_many_transitions_do_not_lengthen_the_table(grokked):
    _, (first, *_), grokking = grokked
    trajectory = Trajectory(tuple(Point(step, 1.0, 0.1) for step in range(500)))
    transitions = [replace(first, step=i, step_low=i, step_high=i + 1, onset=i, end=i + 3) for i in range(9, 499, 9)]
    assert len(summary(trajectory, transitions, grokking).split("\n(")[0].splitlines()) <= 2 + 1 + 25


def test_json_has_no_numbers_that_are_not_finite(grokked):
    trajectory, (first, *_), grokking = grokked
    found = as_json(trajectory, [replace(first, stderr=math.nan)], replace(grokking, severity=math.inf))
    assert json.loads(json.dumps(found, allow_nan=False))["transitions"][0]["stderr"] is None
    assert found["grokking"] == {"memorised_at": 50, "generalised_at": 600, "severity": None, "delay": 550}


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


class Terminal(io.StringIO):
    def isatty(self):
        return True

    def fileno(self):
        return 7


@pytest.fixture
def columns(monkeypatch):
    """Sets the width of terminals."""

    def put(width):
        monkeypatch.setattr(os, "get_terminal_size", lambda fd: os.terminal_size((width, 24)))

    return put


def test_a_bar_on_a_terminal(columns):
    columns(60)
    now = [0.0]
    stream = Terminal()
    with Progress(4, "sampling", stream, lambda: now[0]) as progress:
        for _ in range(4):
            now[0] += 10
            progress.advance()
    frames = stream.getvalue().split("\r")
    assert all(len(frame.rstrip("\n")) == 59 for frame in frames[1:])
    assert frames[2].startswith("[###")
    assert "sampling 25 % 1/4 10 s, about 30 s left" in frames[2]
    assert "sampling 100 % 4/4 40 s" in frames[-1]
    assert stream.getvalue().endswith("\n")


def test_narrow_terminals_get_no_wrapped_lines(columns):
    columns(20)
    stream = Terminal()
    with Progress(4, "sampling", stream) as progress:
        progress.advance(4)
    assert all(len(frame.rstrip("\n")) <= 19 for frame in stream.getvalue().split("\r"))


def test_terminals_of_unknown_width_are_taken_for_80_columns(monkeypatch):
    def fail(fd):
        raise OSError

    monkeypatch.setattr(os, "get_terminal_size", fail)
    stream = Terminal()
    with Progress(0, "sampling", stream):
        pass
    assert {len(frame.rstrip("\n")) for frame in stream.getvalue().split("\r")[1:]} == {79}


def test_elsewhere_one_line_in_thirty_seconds():
    now = [0.0]
    stream = io.StringIO()
    with Progress(100, "sampling", stream, lambda: now[0]) as progress:
        for _ in range(100):
            now[0] += 1
            progress.advance()
    lines = stream.getvalue().splitlines()
    assert lines[0] == "sampling: 30 of 100 (30 %), 30 s, about 1 min 10 s left"
    assert len(lines) == 4
    assert lines[-1] == "sampling: 100 done in 1 min 40 s"


def test_work_that_stalls_still_gives_signs_of_life(monkeypatch):
    monkeypatch.setattr(console, "TICK_SECONDS", 0.001)
    now = [0.0]
    written = threading.Event()

    class Stream(io.StringIO):
        def flush(self):
            written.set()

    stream = Stream()
    with Progress(2, "sampling", stream, lambda: now[0]):
        now[0] = 31.0
        assert written.wait(10)
    assert stream.getvalue().splitlines() == ["sampling: 0 of 2 (0 %), 31 s", "sampling: 0 of 2 done in 31 s"]
    assert not any(thread.name == "groktrace-progress" for thread in threading.enumerate())


def test_interrupted_work_is_not_called_done():
    stream = io.StringIO()
    try:
        with Progress(3, "sampling", stream) as progress:
            progress.advance()
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert stream.getvalue() == ""


def test_reference_and_curvature_in_the_summary(grokked):
    trajectory, *rest = grokked
    assert "reference" not in summary(*grokked)
    reference = Reference(3634.0, "jacobian", 3000, 7268, 1.27e-6, 1e5)
    first = replace(trajectory.points[0], hessian_trace=19.5, hessian_trace_stderr=0.25, hessian_top=2.0)
    text = summary(replace(trajectory, points=(first, *trajectory.points[1:]), reference=reference), *rest)
    assert (
        "reference λ = 3634, half the Jacobian's rank of 7268 at step 3000 (tolerance 1.27e-06, gap 100000)\n" in text
    )
    heading, row = text.splitlines()[3:5]
    assert heading.split()[-4:] == ["tr", "H", "±", "h_max"]
    assert "19.5  0.25      2" in row
