import sys
from dataclasses import replace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from groktrace.analysis.measurement.reference import Reference
from groktrace.analysis.results.trajectory import Point, Trajectory
from groktrace.reporting.series import Events, Series
from groktrace.reporting.tensorboard import TensorBoardReporter


def write(series, events, folder):
    TensorBoardReporter(folder.name).report(series, events, folder.parent)


def read(folder):
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    return accumulator


def scalars(folder, tag):
    return [(event.step, event.value) for event in read(folder).Scalars(tag)]


def test_curves_hold_what_was_measured(grokked, tmp_path):
    write(*grokked, tmp_path)
    mean = scalars(tmp_path / "trajectory", "grokking/llc")
    assert mean[0] == (0, 139)  # λ_c, as the transitions are found on it
    assert mean[-1] == (3000, 844)
    assert scalars(tmp_path / "trajectory", "llc/raw")[0] == (0, -3125)
    assert scalars(tmp_path / "trajectory", "llc/upper")[-1] == (3000, pytest.approx(844 + 1.96 * 5))
    assert scalars(tmp_path / "trajectory", "grokking/val_accuracy")[5] == (300, pytest.approx(0.62))
    assert scalars(tmp_path / "trajectory", "logged/lr")[0] == (0, pytest.approx(0.003))
    tags = read(tmp_path / "trajectory").Tags()
    assert "sampler/virial" in tags["scalars"]
    assert "sampler/distance" not in tags["scalars"]  # never known
    assert tags["images"] == ["trajectory"]
    assert {"transitions/text_summary", "settings/text_summary"} <= set(tags["tensors"])


def test_each_transition_is_a_line_in_the_same_chart(grokked, tmp_path):
    write(*grokked, tmp_path)
    fall = grokked[1].transitions[1]
    folder = tmp_path / f"transition 2: generalisation @ {fall.step} [{fall.step_low}, {fall.step_high}]"
    line = scalars(folder, "grokking/llc")
    steps, values = zip(*line, strict=True)
    assert list(steps) == list(range(fall.step, fall.step + len(line)))
    assert values[0] == 139
    assert set(values[1:]) == {1340.0}
    assert len(values) >= 8
    assert [value for _, value in scalars(folder, "grokking/val_accuracy")] == [0.0] + [1.0] * (len(values) - 1)


def test_the_band_is_a_margin_chart(grokked, tmp_path):
    write(*grokked, tmp_path)
    (event,) = read(tmp_path / "trajectory").Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    assert layout.category[0].chart[0].title == "centred learning coefficient λ_c, 95 %"
    (series,) = layout.category[0].chart[0].margin.series
    assert (series.value, series.lower, series.upper) == ("grokking/llc", "llc/lower", "llc/upper")


def test_the_table_of_transitions_is_text(grokked, tmp_path):
    write(*grokked, tmp_path)
    (event,) = read(tmp_path / "trajectory").Tensors("transitions/text_summary")
    text = event.tensor_proto.string_val[0].decode()
    assert "| simplification | generalisation |" in text
    assert f"Step {grokked[1].transitions[1].step}: λ falls by" in text
    assert "generalised at step 600" in text


def test_writing_again_replaces_and_spares_what_others_wrote(grokked, tmp_path):
    series, events = grokked
    other = tmp_path / "mine" / "events.out.tfevents.1"
    other.parent.mkdir()
    other.write_text("keep")
    beside = tmp_path / "trajectory" / "notes.txt"
    write(series, events, tmp_path)
    beside.write_text("keep")
    write(series, replace(events, transitions=()), tmp_path)
    assert len(scalars(tmp_path / "trajectory", "grokking/llc")) == 12
    assert other.read_text() == beside.read_text() == "keep"
    assert {path.name for path in tmp_path.iterdir()} == {"mine", "trajectory"}


def test_event_files_of_others_in_the_same_folder_stay(grokked, tmp_path):
    logs = tmp_path / "logs"
    other = logs / "trajectory" / "events.out.tfevents.1.host.2.0"
    other.parent.mkdir(parents=True)
    other.write_bytes(b"")
    outside = tmp_path / "outside" / "events.out.tfevents.1.host.2.0.groktrace"
    outside.parent.mkdir()
    outside.write_text("keep")
    (logs / "link").symlink_to(outside.parent)
    write(*grokked, logs)
    assert other.exists()
    assert outside.read_text() == "keep"


def test_an_open_tensorboard_forgets_the_earlier_result(grokked, tmp_path):
    write(*grokked, tmp_path)
    accumulator = read(tmp_path / "trajectory")
    write(*grokked, tmp_path)
    accumulator.Reload()
    assert [event.step for event in accumulator.Scalars("grokking/llc")] == grokked[0].steps.tolist()


def test_lines_of_short_runs_stay_upright(grokked, tmp_path):
    series, events = grokked
    short = replace(series.trajectory, points=series.trajectory.points[:4])
    fall = replace(events.transitions[1], step=90)
    write(Series.of(short), replace(events, transitions=(fall,)), tmp_path)
    (folder,) = [path for path in tmp_path.iterdir() if path.name.startswith("transition 1: generalisation @ 90 ")]
    assert [step for step, _ in scalars(folder, "grokking/llc")] == [90, 91, 92, 93]


def test_a_line_has_a_height_even_where_the_curve_is_not_known(grokked, tmp_path):
    events = replace(grokked[1], transitions=grokked[1].transitions[1:])
    points = tuple(Point(step, None, None, reliable=False) for step in range(5))
    write(Series.of(Trajectory(points)), events, tmp_path)
    (folder,) = [path for path in tmp_path.iterdir() if path.name.startswith("transition 1: generalisation")]
    values = [value for _, value in scalars(folder, "grokking/llc")]
    assert values[0] == pytest.approx(events.transitions[0].llc_after)
    assert values[-1] == pytest.approx(events.transitions[0].llc_before)


def test_without_matplotlib_all_but_the_figure_is_written(grokked, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    write(*grokked, tmp_path)
    assert read(tmp_path / "trajectory").Tags()["images"] == []


def test_a_label_with_a_slash_is_one_folder(grokked, tmp_path):
    series, events = grokked
    fall = replace(events.transitions[1], label="../circuit/2")
    write(series, replace(events, transitions=(fall,)), tmp_path / "logs")
    assert [path.name for path in tmp_path.iterdir()] == ["logs"]
    (folder,) = [path for path in (tmp_path / "logs").iterdir() if path.name.startswith("transition")]
    assert folder.name.startswith("transition 1: ..-circuit-2 @ ")
    assert len(scalars(folder, "grokking/llc")) > 3


def test_odd_trajectories_are_written(odd, tmp_path):
    write(*odd, tmp_path)
    assert (tmp_path / "trajectory").is_dir()


def test_a_reference_is_a_horizontal_line_in_the_same_chart(grokked, tmp_path):
    series, events = grokked
    measured = replace(series.trajectory, reference=Reference(900.0, "value"))
    write(Series.of(measured), events, tmp_path)
    for tag in ("grokking/llc", "llc/lower", "llc/upper"):
        assert scalars(tmp_path / "reference λ 900", tag) == [(0, 900.0), (3000, 900.0)]
    write(*grokked, tmp_path)
    assert not (tmp_path / "reference λ 900").exists()


def test_curvature_is_scalars(grokked, tmp_path):
    series, events = grokked
    trajectory = series.trajectory
    first = replace(trajectory.points[0], hessian_trace=19.5, hessian_trace_stderr=0.25, hessian_top=2.0)
    measured = replace(trajectory, points=(first, *trajectory.points[1:]))
    write(Series.of(measured), events, tmp_path)
    assert scalars(tmp_path / "trajectory", "loss_hessian/hessian_trace") == [(0, 19.5)]
    assert scalars(tmp_path / "trajectory", "loss_hessian/hessian_trace_stderr") == [(0, 0.25)]
    assert scalars(tmp_path / "trajectory", "loss_hessian/hessian_top") == [(0, 2.0)]


def test_no_chart_holds_what_is_not_finite(tmp_path):
    points = (
        Point(0, 1e300, 1e300, metrics={"a": -1e39}),
        Point(1, 2.0, 1.0, metrics={"a": 3.0}),
        Point(2, None, None),
    )
    trajectory = Trajectory(points)
    write(Series.of(trajectory), Events.of(trajectory), tmp_path)
    for tag in read(tmp_path / "trajectory").Tags()["scalars"]:
        assert [step for step, _ in scalars(tmp_path / "trajectory", tag)] == [1]
