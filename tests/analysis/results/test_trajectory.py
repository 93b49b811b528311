import json
import math
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from groktrace.analysis.detection import LargestDropDetector
from groktrace.analysis.results.trajectory import Point, Trajectory
from groktrace.errors import GroktraceError, RunError, SettingsError, printable

numbers = st.none() | st.floats(allow_nan=False, allow_infinity=False)
errors = st.none() | st.floats(0, allow_nan=False, allow_infinity=False)
texts = st.text().map(printable)
points = st.builds(
    Point,
    step=st.integers(0, 10**9),
    llc=numbers,
    stderr=errors,
    llc_centred=numbers,
    stderr_centred=errors,
    reliable=st.booleans(),
    reasons=st.lists(texts).map(tuple),
    train_loss=numbers,
    val_accuracy=numbers,
    metrics=st.dictionaries(texts, st.floats(allow_nan=False, allow_infinity=False)),
    diagnostics=st.dictionaries(texts, numbers),
)


@given(st.lists(points, unique_by=lambda point: point.step).map(lambda some: sorted(some, key=lambda p: p.step)))
def test_saving_and_loading_changes_nothing(tmp_path_factory, some):
    path = tmp_path_factory.mktemp("t") / "trajectory.json"
    trajectory = Trajectory(
        tuple(some), n=317, nbeta=1.5, method="leimkuhler_matthews", run="r", unreadable=("a: bad",)
    )
    trajectory.save(path)
    assert Trajectory.load(path) == trajectory
    trajectory.save(f"{path}2")
    assert Trajectory.load(f"{path}2") == trajectory


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@given(st.sampled_from(["points", "step", "llc", "reliable", "reasons", "metrics", "unreadable"]), json_values)
def test_damaged_files_are_refused_or_harmless(tmp_path_factory, key, value):
    path = tmp_path_factory.mktemp("t") / "trajectory.json"
    document = Trajectory((Point(1, 2.0, 0.1), Point(2, 3.0, 0.1))).to_dict()
    (document if key in document else document["points"][0])[key] = value
    path.write_text(json.dumps(document))
    try:
        Trajectory.load(path)
    except RunError as refusal:
        message = str(refusal)
    else:
        return
    assert str(path) in message


def test_what_is_not_finite_is_saved_as_unknown(tmp_path):
    Trajectory((Point(0, math.nan, math.inf),)).save(tmp_path / "t.json")
    (point,) = Trajectory.load(tmp_path / "t.json").points
    assert (point.llc, point.stderr) == (None, None)


def test_columns_hold_nan_where_nothing_is_known():
    trajectory = Trajectory.from_arrays([0, 5], [1.0, math.nan], [0.1, 0.1], val_loss=[2.0, 3.0])
    assert trajectory.column("llc")[0] == 1.0
    assert math.isnan(trajectory.column("llc")[1])
    assert math.isnan(trajectory.column("train_loss")[0])
    assert trajectory.column("val_loss").tolist() == [2.0, 3.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0, 1], [1.0], [0.1, 0.1]), "llc: expected 2 values, one a step, got 1"),
        (([1, 1], [1.0, 2.0], [0.1, 0.1]), "steps: expected them to ascend"),
        (([0, 1], [1.0, 2.0], [0.1, -0.1]), "stderr: expected no negative values"),
    ],
)
def test_curves_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(SettingsError, match=message):
        Trajectory.from_arrays(*arguments)


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("stderr", -1.0),
        ("step", 2**63),
        ("metrics", {"lr": "high"}),
        ("diagnostics", {"rhat": []}),
        ("reasons", "text"),
        ("n", "many"),
        ("nbeta", True),
        ("method", 7),
        ("unreadable", "text"),
    ],
)
def test_values_of_the_wrong_kind_are_refused(tmp_path, where, value):
    document = Trajectory((Point(1, 2.0, 0.1),)).to_dict()
    (document if where in document else document["points"][0])[where] = value
    (tmp_path / "t.json").write_text(json.dumps(document))
    with pytest.raises(RunError, match=r"t\.json: damaged \(.*\); remove it and analyse again"):
        Trajectory.load(tmp_path / "t.json")


def test_text_of_strangers_moves_no_cursor(tmp_path):
    document = Trajectory((Point(1, 2.0, 0.1, reasons=("a\x1b[2J",)),), unreadable=("\ud800",)).to_dict()
    (tmp_path / "t.json").write_text(json.dumps(document))
    loaded = Trajectory.load(tmp_path / "t.json")
    assert (*loaded.points[0].reasons, *loaded.unreadable) == ("a\ufffd[2J", "\ufffd")


@pytest.fixture
def curve():
    values = [900.0] * 30 + [600.0] * 30
    return Trajectory.from_arrays(range(0, 600, 10), values, [5.0] * 60, val_accuracy=[0.0] * 30 + [1.0] * 30)


def test_a_trajectory_is_a_sequence_of_points(curve):
    assert len(curve) == 60
    assert [point.step for point in curve] == list(range(0, 600, 10))
    assert list(Trajectory(())) == []


def test_a_trajectory_draws_itself(curve, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    figure = curve.plot(tmp_path / "figure.svg")
    assert (tmp_path / "figure.svg").read_bytes().startswith(b"<?xml")
    assert any("simplification at step 295" in text.get_text() for text in figure.axes[0].texts)
    nothing = curve.plot(detector=LargestDropDetector(min_change=0.9))
    assert not any("at step" in text.get_text() for text in nothing.axes[0].texts)
    with pytest.raises(SettingsError, match=r"expected a file ending in \.png, \.pdf, \.svg, got '.*figure\.txt'"):
        curve.plot(tmp_path / "figure.txt")


def test_a_trajectory_becomes_a_data_frame(curve):
    pytest.importorskip("pandas", reason="pandas is not installed")
    frame = curve.to_dataframe()
    assert len(frame) == 60
    assert frame.set_index("step").loc[300, ["llc", "stderr", "val_accuracy"]].tolist() == [600.0, 5.0, 1.0]
    assert frame["train_loss"].isna().all()
    assert frame["reliable"].dtype == bool


def test_a_data_frame_needs_pandas(curve, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(GroktraceError, match="to_dataframe needs pandas: pip install pandas, or use to_csv"):
        curve.to_dataframe()


def test_a_trajectory_becomes_comma_separated_values(curve, tmp_path):
    curve.to_csv(tmp_path / "run.csv")
    heading, *lines = (tmp_path / "run.csv").read_text().splitlines()
    assert heading.startswith("step,curve,curve_stderr,llc,stderr,")
    assert len(lines) == 60
    assert lines[59].startswith("590,600.0,5.0,600.0,5.0,")
