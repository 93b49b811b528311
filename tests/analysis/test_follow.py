"""A recording that is analysed while it goes on; the training is done wherever the follower would sleep."""

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
from torch import nn

import groktrace
from groktrace.analysis import follow as following
from groktrace.analysis.detection import EarlyWarning, Transition
from groktrace.analysis.follow import Announcement, RecordingEnded, ScaleChanged, wait_for_run
from groktrace.analysis.measurement import measure
from groktrace.analysis.results.trajectory import Point
from groktrace.errors import RunError, SettingsError
from groktrace.reporting.events import as_line, as_text
from groktrace.run.files import write_json

FAST = {"draws": 20, "burn_in": 20}


@pytest.fixture
def recording(tmp_path, monkeypatch):
    """A recording that goes on by two snapshots at each poll, and is closed after twelve; of a growing network."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    x = torch.randn(30, 3)
    recorder = groktrace.watch(model, train=(x, x[:, :2]), loss="mse", out=tmp_path / "run", every=1)
    recorder.flush()

    def train(seconds):
        for _ in range(2):
            with torch.no_grad():
                model.weight.mul_(1.3)
            recorder.step()
        recorder.flush()
        if recorder.steps >= 12:
            recorder.close()

    monkeypatch.setattr(following.time, "sleep", train)
    yield tmp_path / "run"
    recorder.close()


def events_of(run, timeout=None, stop_after=None, **settings):
    found = []
    for event in groktrace.follow(run, timeout=timeout, **FAST, **settings):
        found.append(event)
        if stop_after is not None and sum(isinstance(seen, Point) for seen in found) == stop_after:
            break
    return found


def steps_of(events):
    return [event.step for event in events if isinstance(event, Point)]


def test_a_recording_is_followed_to_its_end_and_gives_what_a_plain_analysis_gives(recording, tmp_path):
    events = events_of(recording)
    end = events[-1]
    assert end.reason == "closed"
    scales = [event for event in events if isinstance(event, ScaleChanged)]
    assert len(scales) > 1  # the norm grows, so that all was measured anew now and then
    assert set(steps_of(events)) == set(range(13))
    assert len(steps_of(events)) > 13
    plain = shutil.copytree(recording, tmp_path / "plain" / "run")
    shutil.rmtree(plain / "analysis")
    assert groktrace.analyze(plain, **FAST).points == end.trajectory.points
    assert not list((recording / "analysis").rglob("live-*.jsonl"))


def test_with_numbers_given_nothing_is_measured_twice_whatever_comes_between(recording, monkeypatch, evaluated):
    monkeypatch.setattr(measure, "rows_per_stack", lambda loss, batch_size=None: 1)
    numbers = {"nbeta": 100.0, "localization": 1.0}
    first = events_of(recording, **numbers, stop_after=4)
    rest = events_of(recording, **numbers)
    assert steps_of(first) + steps_of(rest) == list(range(13))
    assert len(evaluated["llc"]) == 13
    assert [point.step for point in rest[-1].trajectory.points] == list(range(13))


def test_a_recording_that_was_killed_ends_by_the_timeout(recorded, tmp_path, monkeypatch):
    run = shutil.copytree(recorded, tmp_path / "run")
    info = json.loads((run / "run.json").read_text())
    write_json(run / "run.json", {**info, "closed": None})
    monkeypatch.setattr(following, "POLL_SECONDS", 0.01)
    (end,) = [event for event in events_of(run, timeout=0.05) if isinstance(event, RecordingEnded)]
    assert end.reason == "timeout"
    assert len(end.trajectory.points) == 6


def test_a_recording_that_takes_the_place_of_another_is_named(recorded, tmp_path, monkeypatch):
    run = shutil.copytree(recorded, tmp_path / "run")
    info = json.loads((run / "run.json").read_text())
    write_json(run / "run.json", {**info, "closed": None})
    anew = {**info, "created": "2001-01-01T00:00:00+00:00"}
    monkeypatch.setattr(following.time, "sleep", lambda seconds: write_json(run / "run.json", anew))
    with pytest.raises(RunError, match="run: was recorded anew while it was followed; follow it again"):
        events_of(run, nbeta=100.0, localization=1.0)


def test_the_first_snapshot_is_waited_for(recorded, tmp_path, monkeypatch):
    monkeypatch.setattr(following, "POLL_SECONDS", 0.01)
    wait_for_run(recorded, None)
    with pytest.raises(RunError, match=r"nowhere: no recording has begun there in 0\.05 s"):
        wait_for_run(tmp_path / "nowhere", 0.05)
    torch.save({}, tmp_path / "1.pt")
    with pytest.raises(RunError, match=r"It holds 1 checkpoint; to make a run of them: groktrace import"):
        wait_for_run(tmp_path, None)
    (tmp_path / ".lock").touch()  # of a recording that begins
    with pytest.raises(RunError, match=r"no recording has begun there"):
        wait_for_run(tmp_path, 0.05)


def transition(step, kind="simplification", label=None, width=20):
    return Transition(kind, label, step, step - 5, step + 5, step - width, step + width, 10.0, 5.0, -5.0, 0.1)


def said(announcements):
    return [(announcement.kind, announcement.number, announcement.transition.step) for announcement in announcements]


def test_a_transition_is_announced_once_and_what_becomes_of_it_is_said(tmp_path):
    path = tmp_path / "live.json"
    a, b = transition(100), transition(300, "complexification")
    assert said(following._Announced(path).compare([a])) == [("transition", 1, 100)]
    # Also by another process, and though its date moves within its interval.
    assert following._Announced(path).compare([transition(104)]) == []
    assert said(following._Announced(path).compare([transition(104), b])) == [("transition", 2, 300)]
    assert said(following._Announced(path).compare([transition(110), b])) == [("revised", 1, 110)]
    labelled = transition(110, label="generalisation")
    assert said(following._Announced(path).compare([labelled, b])) == [("revised", 1, 110)]
    assert said(following._Announced(path).compare([b])) == [("withdrawn", 1, 110)]
    assert following._Announced(path).compare([b]) == []
    assert said(following._Announced(path).compare([transition(112), b])) == [("revised", 1, 112)]
    assert said(following._Announced(path).compare([transition(112), b, transition(500)])) == [("transition", 3, 500)]
    path.write_text("{}")
    with pytest.raises(RunError, match=r"live\.json: damaged .* remove the file to follow anew"):
        following._Announced(path)


def test_a_fall_is_warned_of_once_until_lambda_falls_no_more(tmp_path):
    path = tmp_path / "live.json"
    clear, slight, rising = EarlyWarning(100, 0.2, 0.01), EarlyWarning(110, 0.02, 0.01), EarlyWarning(130, -0.02, 0.01)
    assert following._Announced(path).warn(None) == following._Announced(path).warn(slight) == []
    assert following._Announced(path).warn(clear) == [clear]
    # Also by another process.
    assert following._Announced(path).warn(replace(clear, step=120)) == []
    assert following._Announced(path).warn(slight) == []
    assert following._Announced(path).warn(rising) == []
    assert following._Announced(path).warn(replace(clear, step=140)) == [replace(clear, step=140)]


def test_a_fall_is_warned_of_while_the_recording_goes_on(recording, monkeypatch):
    falls = []

    def last_fall(trajectory):
        falls.append(trajectory.points[-1].step)
        return EarlyWarning(falls[-1], 0.2 if len(falls) > 2 else 0.0, 0.01)

    monkeypatch.setattr(following, "last_fall", last_fall)
    events = events_of(recording, nbeta=100.0, localization=1.0)
    (warning,) = [event for event in events if isinstance(event, EarlyWarning)]
    assert warning.step == falls[2]
    assert isinstance(events[events.index(warning) + 1], Announcement | groktrace.Trajectory)


def test_what_to_do_while_there_is_nothing_new_is_the_callers(recording, monkeypatch):
    train = following.time.sleep
    monkeypatch.setattr(following.time, "sleep", None)
    events = list(groktrace.follow(recording, idle=lambda: train(0), **FAST, nbeta=100.0, localization=1.0))
    assert events[-1].reason == "closed"


def test_events_as_lines_and_in_words():
    news = Announcement("transition", 1, transition(100, label="generalisation"))
    assert as_line(news) == {"event": "transition", "number": 1, **news.transition.to_dict()}
    endless = Announcement("revised", 1, replace(news.transition, stderr=math.inf))
    assert as_line(endless)["stderr"] is None
    assert as_text(news) == "transition 1: generalisation at step 100 [95, 105], λ 10 → 5"
    assert "withdrawn" in as_text(Announcement("withdrawn", 1, transition(100)))
    scale = {"nbeta": 1.0, "localization": 2.0, "curvature": None}
    assert as_line(ScaleChanged(1.0, 2.0, None)) == {"event": "scale", **scale}
    assert as_line(Point(3, 1.0, 0.1))["event"] == "point"
    warning = EarlyWarning(300, 0.0812, 0.0123)
    assert as_line(warning) == {"event": "warning", "step": 300, "rate": 0.0812, "stderr": 0.0123}
    assert (
        as_text(warning) == "warning: at step 300 λ falls, by 8.1 ± 1.2 % each time the training grows by a factor of e"
    )


@pytest.mark.parametrize(
    "content",
    [
        [],
        {"scale": None},
        {"scale": {"nbeta": -1, "localization": 1, "curvature": None}, "said": []},
        {"scale": {"nbeta": "1", "localization": 1, "curvature": None}, "said": []},
        {"scale": {"nbeta": 10**400, "localization": 1, "curvature": None}, "said": []},
        {"scale": None, "said": [{"transition": {"step": 1}, "stands": True}]},
        {"scale": None, "said": [{"transition": [], "stands": True}]},
        {"scale": None, "said": [7]},
    ],
)
def test_damaged_notes_are_named(tmp_path, content):
    write_json(tmp_path / "live.json", content)
    with pytest.raises(RunError, match=r"live\.json: damaged \(.*\); remove the file to follow anew"):
        following._Announced(tmp_path / "live.json")


def test_weights_that_begin_to_train_are_sampled_from_then_on(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 2))
    model[0].requires_grad_(False)
    x = torch.randn(30, 3)
    recorder = groktrace.watch(model, train=(x, x[:, :2]), loss="mse", out=tmp_path / "run", every=1)
    recorder.flush()

    def train(seconds):
        if recorder.steps == 4:
            model[0].requires_grad_(True)
        for _ in range(2):
            with torch.no_grad():
                model[1].weight.mul_(1.1)
            recorder.step()
        recorder.flush()
        if recorder.steps >= 8:
            recorder.close()

    monkeypatch.setattr(following.time, "sleep", train)
    settings = {"nbeta": 100.0, "localization": 1.0}
    events = events_of(tmp_path / "run", **settings)
    assert events[-1].reason == "closed"
    first = [event for event in events if isinstance(event, Point) and event.step == 0]
    assert len(first) == 2
    assert first[1].diagnostics["norm"] > 1.2 * first[0].diagnostics["norm"]  # of nine more weights
    plain = shutil.copytree(tmp_path / "run", tmp_path / "plain" / "run")
    shutil.rmtree(plain / "analysis")
    assert groktrace.analyze(plain, **FAST, **settings).points == events[-1].trajectory.points


class Halves:
    """A detector that finds one transition in the middle of any run."""

    def detect(self, trajectory):
        middle = len(trajectory) // 2
        return [Transition.between(trajectory, middle - 1, middle, label="half")]


def test_a_recording_may_begin_later_and_transitions_are_those_of_the_detector(recorded, tmp_path, monkeypatch):
    monkeypatch.setattr(following.time, "sleep", lambda seconds: shutil.copytree(recorded, tmp_path / "late"))
    numbers = {"nbeta": 100.0, "localization": 1.0}
    events = list(groktrace.follow(str(tmp_path / "late"), detector=Halves(), **FAST, **numbers))
    (said,) = (event for event in events if isinstance(event, Announcement))
    assert (said.kind, said.transition.label) == ("transition", "half")
    assert events[-1].reason == "closed"
    assert groktrace.open_run(tmp_path / "late").trajectory() == events[-1].trajectory


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"timeout": -1.0}, "timeout: expected seconds"),
        ({"reference": -2.0}, "reference: expected a positive number"),
        ({"draw": 3}, "unknown draw"),
    ],
)
def test_wrong_arguments_are_refused_before_any_event_is_asked_for(recorded, given, message):
    with pytest.raises(SettingsError, match=message):
        groktrace.follow(recorded, **given)
