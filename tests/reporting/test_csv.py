import csv
import io
import math
from dataclasses import replace

from groktrace import CsvReporter, Point, Trajectory
from groktrace.reporting.csv import as_csv
from groktrace.reporting.series import Series


def test_a_line_a_snapshot_with_all_digits(grokked, tmp_path):
    series, events = grokked
    CsvReporter().report(series, events, tmp_path)
    text = (tmp_path / "trajectory.csv").read_text(encoding="utf-8")
    assert text == as_csv(series)
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [int(row["step"]) for row in rows] == series.steps.tolist()
    assert [float(row["train_loss"]) for row in rows] == [point.train_loss for point in series.trajectory]
    assert rows[0]["reliable"] == "False"
    assert rows[0]["reasons"].startswith("not at a minimum: the loss")
    assert {row["sampler/distance"] for row in rows} == {""}


def test_odd_trajectories_have_a_heading_and_a_line_each(odd):
    rows = list(csv.reader(io.StringIO(as_csv(odd[0]))))
    assert rows[0][:4] == ["step", "curve", "curve_stderr", "llc"]
    assert len(rows) == 1 + len(odd[0].trajectory)


def test_texts_of_strangers_break_no_line():
    point = Point(0, math.inf, None, reliable=False, reasons=('a, "b"\nc', "d"), metrics={"x,y": 1.0})
    heading, row = csv.reader(io.StringIO(as_csv(Series.of(Trajectory((point,))))))
    cells = dict(zip(heading, row, strict=True))
    assert cells["reasons"] == 'a, "b"\nc; d'
    assert cells["logged/x,y"] == "1.0"
    assert cells["llc"] == "inf"
    assert as_csv(Series.of(Trajectory((replace(point, metrics={}),)))).count("logged") == 0
