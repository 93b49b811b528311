"""A recording that is followed by the process that `watch(on_transition=...)` starts, from end to end."""

import pytest
import torch

import groktrace
from groktrace.analysis.follow import Announcement
from groktrace.analysis.results.trajectory import Trajectory
from groktrace.recording.on_transition import TransitionCallback


def test_a_training_is_told_of_its_own_transitions(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    x, y = torch.randn(40, 6), torch.randn(40, 3)
    heard = []

    def tell(announcement, so_far):
        heard.append((recorder.steps, announcement, so_far))

    with groktrace.watch(
        model, optimizer, train=(x, y), loss="mse", out=tmp_path / "run", every=10, on_transition=tell
    ) as recorder:
        for _ in range(15):
            for _ in range(10):
                optimizer.zero_grad()
                torch.nn.functional.mse_loss(model(x), y).backward()
                optimizer.step()
            recorder.catch_up()
            if heard:
                break
    step, announcement, so_far = heard[0]
    assert isinstance(announcement, Announcement)
    assert announcement.transition.kind == "complexification"
    assert isinstance(so_far, Trajectory)
    assert so_far.points[-1].step == step  # nothing was left to be analysed


def test_a_run_that_cannot_be_followed_says_why(tmp_path):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = groktrace.watch(model, optimizer, out=tmp_path / "run", on_transition=print)
    with pytest.warns(RuntimeWarning, match=r"no more transitions will be told \(TaskError: .*; training goes on"):
        recorder.catch_up()
    recorder.close()


def test_the_process_does_not_outlive_the_one_that_trains(tmp_path):
    reaction = TransitionCallback(print, tmp_path / "nowhere")
    reaction._process.stdin.close()
    assert reaction._process.wait(60) == 0
    reaction._process.stdout.close()
