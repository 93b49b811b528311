"""A few of the scripts of tools/torture/training_scripts.py, and that its judgement tells outcomes apart."""

import itertools
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import groktrace

sys.path.insert(0, str(Path(__file__).parents[1]))
from tools.torture.strange_scripts.generate import generate
from tools.torture.strange_scripts.truth import Directions
from tools.torture.training_scripts import Result, attempt

ROOT = Path(__file__).parents[1]
PLAIN = next(generate(0))
REAL_WATCH = groktrace.watch


def judged(monkeypatch, watch):
    """What comes of the plainest script under a watch() that is not groktrace's own."""
    monkeypatch.setattr(groktrace, "watch", watch)
    return attempt(PLAIN)


def test_plain_scripts_are_right():
    parts = [part for number in range(3) for part in ("--only", str(number))]
    done = subprocess.run(
        [sys.executable, "-m", "tools.torture", "scripts", *parts], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "training scripts: 3 right; 0 failures"


def test_every_script_is_drawn_again_as_it_was():
    few = [list(itertools.islice(generate(0), 180)) for _ in range(2)]
    assert [script.title for script in few[0]] == [script.title for script in few[1]]
    assert all(compile(script.training + script.reading, "script", "exec") for script in few[0])
    assert len({script.title for script in few[0]}) > 150


def test_a_recording_of_other_data_is_silently_wrong(monkeypatch):
    def watch(model, optimizer, train, **more):
        return REAL_WATCH(model, optimizer, train=(train[0][:30], train[1][:30]), **more)

    result = judged(monkeypatch, watch)
    assert result.outcome == "SILENT WRONG"
    assert result.wrong[0] == "n = 30, in truth 48"
    assert {line.split(" =")[0] for line in result.wrong[1:]} >= {"train_loss", "llc"}


def test_weights_under_other_steps_are_silently_wrong(monkeypatch):
    def watch(model, optimizer, **more):
        return REAL_WATCH(model, optimizer, **more, start_step=1)

    result = judged(monkeypatch, watch)
    assert result.outcome == "SILENT WRONG"
    assert any(line.startswith("no snapshots of steps [0, 10]") for line in result.wrong)
    assert any(line.startswith("other weights under steps [") for line in result.wrong)


def test_a_wrong_count_of_weights_shows_in_llc(monkeypatch):
    def watch(model, optimizer, **more):
        model.bias.requires_grad_(False)
        try:
            return REAL_WATCH(model, optimizer, **more)
        finally:
            model.bias.requires_grad_(True)

    # What begins to train later is noticed; not if nobody looks.
    monkeypatch.setattr("groktrace.recording.capture.Capture.look", lambda self, step: None)
    result = judged(monkeypatch, watch)
    assert result.outcome == "SILENT WRONG"
    assert any(line.startswith("llc =") for line in result.wrong)


def test_words_are_held_against_the_matter(monkeypatch):
    def refuse(*_, **__):
        raise groktrace.GroktraceError("train: no such data.")

    def warn(*args, **more):
        warnings.warn("groktrace: the data are odd.", RuntimeWarning, stacklevel=2)
        return REAL_WATCH(*args, **more)

    assert judged(monkeypatch, refuse).outcome == "refused needlessly"
    assert judged(monkeypatch, warn).outcome == "warned needlessly"
    result = Result(PLAIN, wrong=["n = 30, in truth 48"], said=["groktrace: the data are odd."])
    assert result.outcome == "SILENT WRONG"
    odd = replace(PLAIN, parts={**PLAIN.parts, "data": replace(PLAIN.parts["data"], matter="odd")})
    assert replace(result, script=odd).outcome == "warned"
    assert replace(result, script=odd, refusal="TaskError: odd").outcome == "refused"


@pytest.mark.parametrize("failing", ["an exception", "another training"])
def test_a_hook_that_reaches_the_training_is_a_crash(monkeypatch, failing):
    def watch(model, optimizer, **more):
        recorder = REAL_WATCH(model, optimizer, **more)
        if failing == "an exception":
            optimizer.register_step_post_hook(lambda *_: (_ for _ in ()).throw(groktrace.GroktraceError("no")))
        else:
            torch.nn.init.zeros_(model.bias)
        return recorder

    result = judged(monkeypatch, watch)
    assert result.outcome == "crashed"
    assert ("broken off" if failing == "an exception" else "differs") in result.crash


def test_views_of_one_storage_count_once():
    whole = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
    turned, part = torch.nn.Parameter(whole.detach().T), torch.nn.Parameter(whole.detach()[:, 1:])
    pairs = torch.nn.Parameter(torch.tensor([1 + 2j, 3 - 1j]))
    directions = Directions([whole, turned, part, pairs])
    assert len(directions.base) == 10
    again = directions.spread(directions.base + 1)
    assert torch.equal(again[0], whole + 1)
    assert torch.equal(again[1], again[0].T)
    assert torch.equal(again[2], again[0][:, 1:])
    assert torch.equal(again[3], pairs + (1 + 1j))
