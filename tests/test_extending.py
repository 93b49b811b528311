"""A detector and a reporter from outside the package, each as short as the seams promise."""

import inspect
import json
from dataclasses import dataclass

import pytest

import groktrace


@dataclass(frozen=True)
class Threshold:
    """A detector: where λ first falls below a level."""

    level: float

    def detect(self, trajectory: groktrace.Trajectory) -> list[groktrace.Transition]:
        values = trajectory.curve.value
        for i in range(1, len(values)):
            if values[i - 1] >= self.level > values[i]:
                return [groktrace.Transition.between(trajectory, i - 1, i, label="below")]
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
        lines += [each.to_dict() for each in events.transitions]
        (place / self.name).write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize("toy", [Threshold, JsonLines])
def test_each_takes_less_than_thirty_lines(toy):
    assert len(inspect.getsource(toy).splitlines()) < 30


@pytest.fixture
def curve():
    values = [900.0] * 30 + [600.0] * 30
    return groktrace.Trajectory.from_arrays(range(0, 600, 10), values, [5.0] * 60)


def test_a_detector_of_ones_own_finds_the_transitions(curve):
    (found,) = groktrace.find_transitions(curve, Threshold(700.0))
    assert (found.label, found.kind, found.onset, found.step, found.end) == ("below", "simplification", 290, 295, 300)
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
    assert lines[-1]["label"] == "below"
    assert "simplification  below" in capsys.readouterr().out
    assert (tmp_path / "trajectory.csv").exists()
    assert (tmp_path / "figure.svg").exists()
    assert (tmp_path / "tensorboard" / "transition 1: below @ 295 [290, 300]").is_dir()
