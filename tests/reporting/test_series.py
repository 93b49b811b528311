import math
from typing import get_type_hints

import numpy as np
import pytest

from groktrace import LargestDropDetector, Point, Trajectory
from groktrace.reporting.series import Events, Series


def test_each_quantity_has_a_name_a_tag_and_a_column_of_its_own(grokked):
    series, _ = grokked
    assert len({quantity.name for quantity in series}) == len({quantity.tag for quantity in series}) == len(series)
    columns = series.columns()
    assert {quantity.name for quantity in series} <= columns.keys()
    assert {len(column) for column in columns.values()} == {12}
    assert columns["llc_centred"].tolist() == [point.llc_centred for point in series.trajectory]
    assert columns["stderr_centred"].tolist() == [5.0] * 12
    assert columns["logged/lr"].tolist() == [0.003] * 12
    assert np.isnan(columns["sampler/distance"]).all()
    assert columns["reliable"].tolist() == [False] * 3 + [True] * 9
    assert columns["reasons"][0].startswith("not at a minimum")
    assert columns["step"][-1] == 3000


def test_every_number_of_a_point_is_in_the_table():
    numbers = [name for name, kind in get_type_hints(Point).items() if kind == float | None]
    assert {"llc", "stderr", "val_loss"} <= set(numbers)
    point = Point(7, **{name: float(i) for i, name in enumerate(numbers, 1)})
    columns = Series.of(Trajectory((point,))).columns()
    assert {name: columns[name].tolist() for name in numbers} == {name: [getattr(point, name)] for name in numbers}


def test_the_curve_is_the_one_on_which_transitions_are_found():
    points = tuple(Point(step, 60.0 + step, 0.1, 130.0, 0.2) for step in range(3))
    assert Series.of(Trajectory(points))["curve"].values.tolist() == [130.0] * 3
    plain = Trajectory.from_arrays([0, 1], [5.0, 6.0], [0.1, 0.1], reliable=[False, True])
    curve = Series.of(plain)["curve"]
    assert (math.isnan(curve.values[0]), curve.values[1], curve.errors[1]) == (True, 6.0, 0.1)


def test_what_is_first_by_name_is_lambda_and_validation_accuracy_beside_it(grokked):
    tags = sorted(quantity.tag for quantity in grokked[0])
    assert tags[:2] == ["grokking/llc", "grokking/val_accuracy"]
    assert tags[2:5] == ["learning/train_accuracy", "learning/train_loss", "learning/val_loss"]
    assert not any(tag.startswith(("grokking/", "learning/")) for tag in tags[5:])


def test_events_are_those_of_the_detector_and_say_where_there_are_none(grokked):
    series, events = grokked
    assert [transition.label for transition in events.transitions] == ["memorisation", "generalisation"]
    (drop,) = Events.of(series.trajectory, LargestDropDetector()).transitions
    assert (drop.kind, drop.label) == ("simplification", None)
    flat = Trajectory.from_arrays(range(9), [5.0] * 9, [0.1] * 9)
    assert Events.of(flat).remarks[0].startswith("No transition found in 9 snapshots: λ̂ stays at 5")
    assert Events.of(flat, LargestDropDetector()).remarks == ("No transition found in 9 snapshots.",)


def test_unknown_names_are_refused(grokked):
    with pytest.raises(KeyError, match="lambda"):
        grokked[0]["lambda"]
