"""A callback that is told of transitions; a stand-in for the process that finds them says what a test needs."""

import json
import sys
import time

import pytest
import torch

from groktrace import EarlyWarning, watch
from groktrace.errors import SettingsError
from groktrace.recording import on_transition

STAND_IN = """
import json, pathlib, sys
heard = 0
while sys.stdin.buffer.read(1):
    heard += 1
    rate = float(pathlib.Path(sys.argv[-1]).name == "run")
    news = {"kind": "warning", "step": heard, "rate": rate, "stderr": 0.1}
    print(json.dumps({"announcements": [news]}), json.dumps({"answered": heard}), sep="\\n", flush=True)
"""


def warning(step):
    return EarlyWarning(step, 1.0, 0.1)


@pytest.fixture
def stand_in(monkeypatch):
    def use(code):
        monkeypatch.setattr(on_transition, "follower_command", lambda run: [sys.executable, "-c", code, str(run)])

    use(STAND_IN)
    return use


def test_the_callback_is_told_in_the_loop_and_the_process_ends_with_the_recording(training, tmp_path, stand_in):
    heard = []
    recorder = watch(
        training.model,
        training.optimizer,
        out=tmp_path / "run",
        every=1,
        on_transition=lambda news, so_far: heard.append((training.optimizer.param_groups[0]["lr"], news, so_far)),
    )
    training.update(2)
    assert heard == []
    recorder.catch_up()
    training.optimizer.param_groups[0]["lr"] = 0.2
    recorder.catch_up()
    assert heard == [(0.1, warning(1), None), (0.2, warning(2), None)]
    process = recorder.transition_callback._process
    assert process.poll() is None
    recorder.close()
    assert process.returncode is not None
    recorder.catch_up()  # does nothing


def test_what_comes_between_is_told_at_the_next_update(training, tmp_path, stand_in):
    line = json.dumps({"announcements": [warning(1).to_dict(), warning(2).to_dict()]})
    stand_in(f"import sys; print({line!r}, flush=True); sys.stdin.read()")
    heard = []
    recorder = watch(
        training.model,
        training.optimizer,
        out=tmp_path / "run",
        on_transition=lambda news, so_far: heard.append((recorder.steps, news)),
    )
    while not recorder.transition_callback._news:
        time.sleep(0.01)
    training.update(2)
    recorder.close()
    assert heard == [(1, warning(1)), (1, warning(2))]


def test_a_callback_that_fails_is_one_warning_and_called_again(training, tmp_path, stand_in):
    calls = []

    def fail(news, so_far):
        calls.append(news)
        raise ValueError("no such optimizer")

    recorder = watch(training.model, training.optimizer, out=tmp_path / "run", on_transition=fail)
    message = r"on_transition failed \(ValueError: no such optimizer\); training goes on"
    with pytest.warns(RuntimeWarning, match=message):
        recorder.catch_up()
    recorder.catch_up()  # a second warning would be an error here
    training.update(2)
    assert len(calls) == 2
    recorder.close()


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raise SystemExit(1)", "its process has ended"),
        ("""print('{"ended": "no program"}')""", "no program"),
        ("print('no message')", "JSONDecodeError: .*"),
        ("""print('{"announcements": [{"step": "four"}]}')""", "ValueError: 'rate' is missing .*"),
        ("import pickle, sys; sys.stdout.buffer.write(pickle.dumps(print))", "UnicodeDecodeError: .*"),
    ],
)
def test_a_process_that_ends_is_one_warning(training, tmp_path, stand_in, code, reason):
    stand_in(code)
    recorder = watch(training.model, training.optimizer, out=tmp_path / "run", on_transition=print)
    with pytest.warns(RuntimeWarning, match=rf"no more transitions will be told \({reason}\)"):
        recorder.catch_up()
    training.update(3)
    recorder.catch_up()
    recorder.close()


def test_an_interpreter_that_does_not_start_is_one_warning(training, tmp_path, monkeypatch):
    monkeypatch.setattr(on_transition.sys, "executable", "/nowhere/python")
    recorder = watch(training.model, training.optimizer, out=tmp_path / "run", on_transition=print)
    with pytest.warns(RuntimeWarning, match=r"no more transitions will be told \(FileNotFoundError"):
        training.update(2)
    recorder.close()


def test_trained_weights_are_the_same_with_and_without(training, tmp_path, stand_in):
    before = {name: tensor.clone() for name, tensor in training.model.state_dict().items()}
    training.update(5)
    plain = {name: tensor.clone() for name, tensor in training.model.state_dict().items()}
    training.model.load_state_dict(before)
    with watch(training.model, training.optimizer, out=tmp_path / "run", on_transition=lambda *_: None) as recorder:
        for _ in range(5):
            training.update(1)
            recorder.catch_up()
    assert all(torch.equal(tensor, plain[name]) for name, tensor in training.model.state_dict().items())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"on_transition": 3}, "on_transition: expected a function of two arguments, got 3"),
        ({"on_transition": print, "out": "memory://run"}, "on_transition: 'memory://run' is a URL; record into a fold"),
    ],
)
def test_what_cannot_be_told_is_refused(training, tmp_path, given, message):
    with pytest.raises(SettingsError, match=message):
        watch(training.model, training.optimizer, **({"out": tmp_path / "run"} | given))
