"""A sampler, a detector and a reporter from outside the package, each as short as the seams promise."""

import inspect
import io
import json
import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

import groktrace
from groktrace.analysis import follow as following
from groktrace.analysis import replay
from groktrace.analysis.tuning import Passes
from groktrace.reporting.csv import as_csv
from groktrace.reporting.figure import trajectory_figure


@dataclass(frozen=True)
class Threshold:
    """A detector: where λ first crosses a level."""

    level: float

    def detect(self, trajectory: groktrace.Trajectory) -> list[groktrace.Transition]:
        values = trajectory.curve.value
        for i in range(1, len(values)):
            if (values[i - 1] - self.level) * (values[i] - self.level) < 0:
                return [groktrace.Transition.between(trajectory, i - 1, i, label="crossing")]
        return []


@dataclass(frozen=True)
class JsonLines:
    """A reporter: one JSON object a snapshot, and one a transition."""

    name: str = "report.jsonl"

    def report(self, series: groktrace.Series, events: groktrace.Events, place) -> None:
        lines = [{"step": step} for step in series.steps.tolist()]
        for quantity in series:
            for line, value in zip(lines, quantity.values.tolist(), strict=True):
                line[quantity.tag] = value
        lines += [transition.to_dict() for transition in events.transitions]
        (place / self.name).write_text("".join(json.dumps(line) + "\n" for line in lines))


@dataclass(frozen=True)
class Euler:
    """A sampler: a drift and fresh noise."""

    name = "euler"
    vanilla = False
    momentum_is_noise = True

    def coefficients(self, step_size, nbeta, localization, halvings=0):
        return -0.5 * step_size * nbeta, 1 - 0.5 * step_size * localization, math.sqrt(step_size)

    def step(self, displacement, momentum, gradient, noise, coefficients):
        force, kept, spread = coefficients
        displacement.mul_(kept).addcmul_(gradient, force).addcmul_(noise, spread)

    def relaxation(self, step_size, localization, halvings=0):
        return 2 / (step_size * localization)

    def noise_gain(self, step_size, localization, halvings=0):
        return 0.25 * step_size


@pytest.mark.parametrize("toy", [Euler, Threshold, JsonLines])
def test_each_takes_less_than_thirty_lines(toy):
    assert len(inspect.getsource(toy).splitlines()) < 30


def test_a_sampler_of_ones_own_gives_the_soft_rank_of_a_bowl():
    """Drift and noise make an autoregressive process, too wide by 1/(1 − εa/4) along a curvature a."""
    curvature, nbeta, localization, step_size = torch.tensor([0.0, 0.5, 2.0, 2.0]), 100.0, 5.0, 4e-3

    class Bowl(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.zeros(4))

        def forward(self, x):
            return 0.5 * (curvature * self.w.square()).sum() + 0 * x

    data = torch.zeros(8, 1), torch.zeros(8, 1)
    settings = groktrace.SamplingSettings(
        Euler(), nbeta, localization, chains=16, draws=4000, burn_in=400, step_size=step_size
    )
    found = groktrace.estimate_llc(Bowl(), lambda out, y: (out - y).mean(), data, settings=settings)
    total = nbeta * curvature + localization
    exact = float(0.5 * (nbeta * curvature / total / (1 - step_size * total / 4)).sum())
    assert found.llc == pytest.approx(exact, abs=4 * found.stderr)
    assert found.llc_centred == pytest.approx(exact, abs=4 * found.stderr_centred)


def test_results_of_a_sampler_bear_its_name(small_run):
    trajectory = groktrace.analyze(small_run, method=Euler(), draws=20, burn_in=20)
    assert trajectory.method == "euler"
    assert any((small_run / "analysis").glob("euler-*"))


@pytest.fixture
def curve():
    values = [900.0] * 30 + [600.0] * 30
    return groktrace.Trajectory.from_arrays(range(0, 600, 10), values, [5.0] * 60)


def test_a_detector_of_ones_own_finds_the_transitions(curve):
    (found,) = groktrace.find_transitions(curve, Threshold(700.0))
    assert (found.label, found.kind, found.onset, found.step, found.end) == (
        "crossing",
        "simplification",
        290,
        295,
        300,
    )
    assert (found.llc_before, found.llc_after, found.delta_llc) == (900.0, 600.0, -300.0)
    assert groktrace.find_transitions(curve, Threshold(100.0)) == []


def test_every_reporter_shows_what_such_a_detector_found(curve, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    series, events = groktrace.Series.of(curve), groktrace.Events.of(curve, Threshold(700.0))
    own = (groktrace.ConsoleReporter(), groktrace.CsvReporter(), groktrace.FigureReporter("figure.svg"))
    for reporter in (JsonLines(), *own, groktrace.TensorBoardReporter()):
        reporter.report(series, events, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "report.jsonl").read_text().splitlines()]
    assert len(lines) == 61
    assert lines[0]["grokking/llc"] == 900.0
    assert lines[-1]["label"] == "crossing"
    assert "simplification  crossing" in capsys.readouterr().out
    assert (tmp_path / "trajectory.csv").exists()
    assert (tmp_path / "figure.svg").exists()
    assert (tmp_path / "tensorboard" / "transition 1: crossing @ 295 [290, 300]").is_dir()


def test_a_quantity_that_is_in_the_table_is_shown_by_all(curve, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    norm = groktrace.Quantity(
        "norm", "weights/norm", np.linspace(1.0, 2.0, 60), np.full(60, 0.125), "norm_stderr", "‖w‖", "norm", "weights"
    )
    series = groktrace.Series.of(curve)
    series, events = replace(series, quantities=(*series, norm)), groktrace.Events.of(curve)
    text = io.StringIO()
    for reporter in (groktrace.ConsoleReporter(text), groktrace.CsvReporter(), groktrace.TensorBoardReporter()):
        reporter.report(series, events, tmp_path)
    heading, first, *_ = text.getvalue().split("\n\n")[2].splitlines()
    assert heading.split()[-2:] == ["‖w‖", "±"]
    assert first.split()[-2:] == ["1", "0.125"]
    heading, first, *_ = (tmp_path / "trajectory.csv").read_text().splitlines()
    cells = dict(zip(heading.split(","), first.split(","), strict=True))
    assert (cells["norm"], cells["norm_stderr"]) == ("1.0", "0.125")
    (logs,) = (tmp_path / "tensorboard" / "trajectory").iterdir()
    assert all(tag in logs.read_bytes() for tag in (b"weights/norm", b"weights/norm_stderr"))
    _, panel, *_ = trajectory_figure(series, events).axes
    assert panel.get_ylabel() == "weights"
    assert [line.get_label() for line in panel.lines if line.get_ydata()[-1] == 2.0] == ["norm, 95 % band"]


def test_an_analysis_takes_both(small_run):
    trajectory = groktrace.analyze(
        small_run, draws=20, burn_in=20, detector=Threshold(0.0), reporters=[JsonLines(), groktrace.CsvReporter()]
    )
    lines = [json.loads(line) for line in (small_run / "report.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "kind" not in line] == [point.step for point in trajectory]
    assert len((small_run / "trajectory.csv").read_text().splitlines()) == 1 + len(trajectory)
    level = float(np.nanmean(trajectory.curve.value))
    groktrace.analyze(small_run, draws=20, burn_in=20, detector=Threshold(level), reporters=[JsonLines("again.jsonl")])
    last = json.loads((small_run / "again.jsonl").read_text().splitlines()[-1])
    expected = groktrace.find_transitions(trajectory, Threshold(level))
    assert len(expected) == 1
    assert [last] == [transition.to_dict() for transition in expected]


def test_reporters_show_what_there_is_so_far(small_run, monkeypatch):
    shown, told = [], []

    class Count:
        def report(self, series, events, place):
            shown.append((len(series.steps), series.trajectory.unsampled, place))

    monkeypatch.setattr(replay, "PASSES", Passes(coarse=2, stacks=0, round=2, partial_seconds=0.0))
    groktrace.analyze(small_run, draws=20, burn_in=20, reporters=[Count()], partial=told.append)
    assert len(shown) > 1
    assert all(count + left == 6 and place == small_run for count, left, place in shown)
    assert shown[-1][1] == 0 < shown[0][1]
    assert len(told) == len(shown) - 1


def test_reporters_follow_a_recording(small_run, monkeypatch):
    shown = []

    class Count:
        def report(self, series, events, place):
            shown.append((len(series.steps), events.transitions, place))

    detector = Threshold(0.0)
    *rounds, end = groktrace.follow(
        small_run, timeout=0, draws=20, burn_in=20, detector=detector, reporters=[Count(), groktrace.CsvReporter()]
    )
    # The first round, whose scale is that of fewer snapshots, and the end; those within seconds are left out.
    first = next(event for event in rounds if isinstance(event, groktrace.Trajectory))
    found = [tuple(groktrace.find_transitions(trajectory, detector)) for trajectory in (first, end.trajectory)]
    assert shown == [(6, transitions, small_run) for transitions in found]
    assert (small_run / "trajectory.csv").read_text() == as_csv(groktrace.Series.of(end.trajectory))
    monkeypatch.setattr(following, "PASSES", Passes(partial_seconds=0.0))
    shown.clear()
    rounds = list(groktrace.follow(small_run, timeout=0, draws=20, burn_in=20, reporters=[Count()]))
    assert len(shown) == 1 + sum(isinstance(event, groktrace.Trajectory) for event in rounds)
