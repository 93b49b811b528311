import itertools
import math
import sys
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.text import Text

from groktrace.analysis.measurement.llc import OFF_MINIMUM
from groktrace.analysis.measurement.reference import Reference
from groktrace.analysis.results.trajectory import Point, Trajectory
from groktrace.errors import GroktraceError, SettingsError
from groktrace.reporting.figure import FigureReporter, trajectory_figure
from groktrace.reporting.series import Events, Series


def shown(trajectory):
    return Series.of(trajectory), Events.of(trajectory)


@pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG"), (".pdf", b"%PDF"), (".svg", b"<?xml")])
def test_files_of_every_kind(grokked, tmp_path, suffix, start):
    path = tmp_path / f"figure{suffix}"
    FigureReporter(path.name).report(*grokked, tmp_path)
    assert path.read_bytes().startswith(start)


def test_other_kinds_of_file_are_refused(grokked, tmp_path):
    with pytest.raises(SettingsError, match=r"output: expected a file ending in \.png, \.pdf, \.svg, got .*\.gif"):
        FigureReporter("figure.gif").report(*grokked, tmp_path)


def test_without_matplotlib_the_extra_is_named(grokked, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(GroktraceError, match=r"figures need matplotlib: pip install 'groktrace\[plot\]'"):
        FigureReporter().report(*grokked, tmp_path)


def test_odd_trajectories_can_be_drawn(odd, tmp_path):
    FigureReporter().report(*odd, tmp_path)


def test_unreliable_points_neither_set_the_axis_nor_look_reliable(grokked):
    value = grokked[0]["curve"].values
    assert value[0] == 139  # λ_c, not λ̂ = −3125
    assert value[-1] == 844  # λ_c again, on which the transitions were found, not λ̂ = 836
    upper = trajectory_figure(*grokked).axes[0]
    assert upper.get_ylim()[0] > -100
    assert upper.get_ylim()[1] < 1500
    filled, hollow = (line for line in upper.lines if line.get_marker() == "o")
    assert len(hollow.get_xdata()) == 3
    assert hollow.get_markerfacecolor() == "white"
    assert len(filled.get_xdata()) == 9


def test_the_curve_is_the_centred_estimate_throughout_or_nowhere():
    points = tuple(
        Point(step, llc, 0.1, 130.0, 0.2, reliable=step % 200 == 0)
        for step, llc in ((0, 60.0), (100, 70.0), (200, 80.0))
    )
    following = Trajectory(points, localization=1.0, resolution=100.0)
    assert following.curve.value.tolist() == [130] * 3
    assert replace(following, nbeta=1.0).curve.value.tolist() == [130] * 3
    single = replace(following, points=tuple(replace(point, llc_centred=None, stderr_centred=None) for point in points))
    assert single.curve.value[[0, 2]].tolist() == [60, 80]
    axes = [trajectory_figure(*shown(trajectory)).axes[0] for trajectory in (following, single)]
    assert [ax.get_ylabel() for ax in axes] == [
        r"centred learning coefficient $\lambda_c$",
        r"local learning coefficient $\hat\lambda$",
    ]


def test_points_that_were_not_measured_in_their_basin_do_not_set_the_axis():
    points = [Point(step, 5.0, 0.1, 5.0, 0.1) for step in range(0, 900, 100)]
    left = Point(900, 5.0, 0.1, 4000.0, 30.0, False, ("left the basin: the chains' loss has climbed",))
    off = Point(1000, -9.0, 0.1, 5.0, 0.1, False, (OFF_MINIMUM,))
    trajectory = Trajectory((*points, left, off))
    upper = trajectory_figure(*shown(trajectory)).axes[0]
    assert upper.get_ylim()[1] < 6
    marks = {line.get_label(): line.get_ydata().tolist() for line in upper.lines if line.get_marker() != "None"}
    assert marks == {
        r"$\lambda_c$ with 95 % band": [5.0] * 9,
        r"$\lambda_c$, not at a minimum": [5.0],
        r"$\lambda_c$, unreliable": [4000.0],
        "1 point beyond the axis": [0.98],
    }


def test_values_known_to_nothing_do_not_set_the_axis():
    early = Point(0, -2e4, 1e3, -2291.0, 1544.0, reliable=False, reasons=(OFF_MINIMUM,))
    points = (early, *(Point(step, 60.0, 1.0, 61.0 + step / 100, 1.0) for step in (100, 200, 300, 400)))
    low, high = trajectory_figure(*shown(Trajectory(points))).axes[0].get_ylim()
    assert low > 55
    assert high < 70


def test_values_without_a_stand_in_are_hollow_and_do_not_set_the_axis():
    steps = list(range(0, 1000, 100))
    trajectory = Trajectory.from_arrays(steps, [-3000.0] + [5.0] * 9, [0.1] * 10, reliable=[False] + [True] * 9)
    upper = trajectory_figure(*shown(trajectory)).axes[0]
    assert upper.get_ylim() == pytest.approx((4.8 - 0.0314, 5.2 + 0.0314), abs=0.01)
    hollow, edge = [line for line in upper.lines if line.get_markerfacecolor() == "white"]
    assert hollow.get_ydata() == [-3000]
    assert (edge.get_marker(), edge.get_xdata().tolist()) == ("v", [0])


def test_points_beyond_the_axis_are_triangles_at_its_edges_and_counted():
    left = ("left the basin: the chains' loss has climbed",)
    far = {0: 1358.0, 100: 700.0, 200: 96.0, 500: -400.0}  # the third lies within
    points = tuple(
        Point(
            step, far.get(step, 100.0 - step / 100), 1.0, reliable=step not in far, reasons=left if step in far else ()
        )
        for step in range(0, 1000, 100)
    )
    figure = trajectory_figure(*shown(Trajectory(points)))
    upper = figure.axes[0]
    assert upper.get_ylim()[0] > 80
    assert upper.get_ylim()[1] < 120
    edges = {line.get_marker(): line for line in upper.lines if "beyond" in str(line.get_label())}
    assert {marker: line.get_xdata().tolist() for marker, line in edges.items()} == {"^": [0, 100], "v": [500]}
    figure.canvas.draw()
    for line in edges.values():
        x, y = line.get_transform().transform(line.get_xydata()).T
        assert all(upper.bbox.contains(*at) for at in zip(x, y, strict=True))
        assert x == pytest.approx(upper.transData.transform([(step, 0) for step in line.get_xdata()])[:, 0])
    said = [text.get_text() for text in figure.legends[0].get_texts()]
    assert [label for label in said if "beyond" in label] == ["2 points beyond the axis", "1 point beyond the axis"]


def test_where_no_point_is_beyond_the_axis_nothing_is_said(odd):
    figure = trajectory_figure(*odd)
    assert not any("beyond" in text.get_text() for legend in figure.legends for text in legend.get_texts())


@pytest.mark.parametrize("odd_one", [{"stderr": 1e4}, {"stderr": 0.1, "reasons": ("noted by hand",)}])
def test_reliable_points_are_always_within_the_axis(odd_one):
    points = tuple(Point(step, 5.0, 0.1) for step in range(0, 900, 100))
    upper = trajectory_figure(*shown(Trajectory((*points, Point(900, 40.0, **odd_one))))).axes[0]
    assert 40 < upper.get_ylim()[1] < 50  # the value, but not a band a thousand times as wide
    assert not any("beyond" in str(line.get_label()) for line in upper.lines)


def test_where_every_error_is_larger_than_its_value_there_are_points_all_the_same():
    upper = trajectory_figure(*shown(Trajectory(tuple(Point(step, 2.0, 9.0) for step in range(5))))).axes[0]
    assert upper.get_ylim()[0] < 2 < upper.get_ylim()[1]
    assert not upper.texts


@pytest.mark.parametrize(
    ("losses", "scale"),
    [
        ([2.0, 0.5, 1e-3, 1e-4], "log"),
        ([2.0, 0.5, -0.7, -1.3], "linear"),
        ([-0.1, -0.5, -0.7, -1.3], "linear"),
        ([2.0, 1e-3, 1e-6, 0.0], "symlog"),
        ([0.0, 0.0, 0.0, 0.0], "linear"),
        ([2.0, 1e-3, math.nan, -math.inf], "log"),
    ],
)
def test_every_finite_loss_is_seen(losses, scale):
    points = tuple(Point(step, 5.0, 0.1, train_loss=loss, val_loss=loss) for step, loss in enumerate(losses))
    figure = trajectory_figure(*shown(Trajectory(points)))
    (panel,) = [axes for axes in figure.axes if axes.get_ylabel() == "loss (dotted)"]
    assert panel.get_yscale() == scale
    (line,) = [line for line in panel.lines if line.get_label() == "training loss"]
    assert line.get_ydata().tolist() == [loss for loss in losses if math.isfinite(loss)]
    figure.canvas.draw()
    heights = panel.transData.transform(line.get_xydata())[:, 1]
    assert all(panel.bbox.y0 < height < panel.bbox.y1 for height in heights)


def test_values_that_are_not_finite_are_left_out(tmp_path):
    points = tuple(Point(step, value, 0.1, train_loss=value) for step, value in enumerate([1.0, math.inf, math.nan]))
    trajectory = Trajectory(points)
    assert np.array_equal(trajectory.curve.value, [1, math.nan, math.nan], equal_nan=True)
    FigureReporter().report(*shown(trajectory), tmp_path)


def labels(figure):
    return [text for text in figure.axes[0].texts if " at step " in text.get_text()]


def test_transitions_are_named_in_the_figure(grokked):
    fall = grokked[1].transitions[1]
    texts = [text.get_text() for text in labels(trajectory_figure(*grokked))]
    expected = f"generalisation at step {fall.step} ({fall.step_low}–{fall.step_high}), Δλ = −{-fall.delta_llc:.0f}"
    assert texts.count(expected) == 1
    assert len(texts) == 2


@pytest.mark.parametrize("at", [[20, 300, 420, 1500, 1600, 2500, 2900], [0, 0, 10, 2990, 3000]])
def test_labels_neither_touch_nor_leave_the_figure(grokked, at):
    series, events = grokked
    transitions = [replace(events.transitions[0], step=step, step_low=step, step_high=step) for step in at]
    figure = trajectory_figure(series, replace(events, transitions=transitions))
    figure.canvas.draw()
    boxes = [Text.get_window_extent(label) for label in labels(figure)]
    assert len(boxes) == len(at)
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    assert all(figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1 for box in boxes)


def test_the_legend_covers_no_curve(grokked):
    figure = trajectory_figure(*grokked)
    figure.canvas.draw()
    (legend,) = figure.legends
    assert {"training accuracy", "validation loss"} <= {text.get_text() for text in legend.get_texts()}
    assert not any(legend.get_window_extent().overlaps(axes.get_window_extent()) for axes in figure.axes)


def test_what_is_not_known_has_no_axis(grokked):
    series, events = grokked
    trajectory = series.trajectory
    unknown = replace(trajectory, points=tuple(replace(p, train_loss=None, val_loss=None) for p in trajectory.points))
    *_, losses = trajectory_figure(Series.of(unknown), events).axes
    assert not losses.axison


def test_a_reference_is_a_line_within_the_axis(grokked):
    series, events = grokked
    measured = replace(series.trajectory, reference=Reference(3634.0, "jacobian", 3000, 7268))
    upper = trajectory_figure(Series.of(measured), events).axes[0]
    (line,) = [line for line in upper.lines if "reference" in str(line.get_label())]
    assert set(line.get_ydata()) == {3634.0}
    assert line.get_label().endswith("= 3634 (rank 7268 / 2)")
    assert upper.get_ylim()[1] > 3634


def test_curvature_gets_a_panel_where_it_was_measured(grokked):
    series, events = grokked
    trajectory = series.trajectory
    assert not any("Hessian" in axes.get_ylabel() for axes in trajectory_figure(*grokked).axes)
    points = tuple(
        replace(point, hessian_trace=100.0 - i, hessian_trace_stderr=0.5, hessian_top=2.0)
        for i, point in enumerate(trajectory.points)
    )
    figure = trajectory_figure(Series.of(replace(trajectory, points=points)), events)
    (panel,) = [axes for axes in figure.axes if axes.get_ylabel() == "Hessian's trace\n(solid)"]
    curve = next(line for line in panel.lines if "trace" in str(line.get_label()))
    assert curve.get_ydata().tolist() == [100.0 - i for i in range(len(points))]
