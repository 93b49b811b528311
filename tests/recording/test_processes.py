"""What a recording does to its process, and what the end of the process does to a recording."""

import os
import random
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from torch import nn

from groktrace.recording.watch import watch
from groktrace.run import files, layout, program
from groktrace.run.store import open_run

SETUP = """
import os, random, signal, sys, time
import torch
from groktrace.recording.watch import watch
torch.set_num_threads(1)
out = sys.argv[1]
model = torch.nn.Linear(300, 300)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
x = torch.randn(2, 300)
def update():
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()
"""


def run_script(body, out):
    script = SETUP + textwrap.dedent(body)
    return subprocess.run([sys.executable, "-c", script, str(out)], capture_output=True, text=True, timeout=100)


def train_with_everything(out):
    """Seven updates with dropout and batch normalisation; returns all that a recording might have changed."""
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))
    model[0].bias.requires_grad_(False)
    model[2].eval()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    x, y = torch.randn(16, 3), torch.randn(16, 2)
    recorder = None if out is None else watch(model, optimizer, train=(x, y), loss="mse", out=out, every=2)
    for update in range(7):
        model[2].train(update % 2 == 0)
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
    if recorder is not None:
        recorder.close()
    numbers = (random.getstate(), tuple(np.random.get_state()[1]), tuple(torch.get_rng_state().tolist()))
    flags = [module.training for module in model.modules()], [p.requires_grad for p in model.parameters()]
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    return model.state_dict(), gradients, numbers, flags


@pytest.mark.parametrize("traced", [False, True], ids=["stand-in", "traced"])
def test_a_recorded_training_is_bitwise_the_same(tmp_path, monkeypatch, traced):
    if traced:
        monkeypatch.setitem(sys.modules, program.__name__, program)
    plain, recorded = train_with_everything(None), train_with_everything(tmp_path / "run")
    run = open_run(tmp_path / "run")
    assert len(run.snapshots) == 5
    if traced:
        loss, _ = run.task.forward(run.snapshots[-1].load(), run.task.train.tensors)
        assert torch.isfinite(loss)
    for name, value in plain[0].items():
        assert torch.equal(value, recorded[0][name]), name
    for a, b in zip(plain[1], recorded[1], strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    assert plain[2:] == recorded[2:]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # forking is what this test is about
def test_a_forked_child_records_nothing(training, tmp_path):
    recorder = watch(training.model, training.optimizer, out=tmp_path / "run", every=1)
    recorder.flush()
    child = os.fork()
    if child == 0:
        failed = 1
        try:
            for _ in range(3):
                training.optimizer.step()
            recorder.log(loss=1.0)
            recorder.close()
            failed = int(recorder.steps != 0)
        finally:
            os._exit(failed)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert layout.snapshot_steps(tmp_path / "run") == [0]
    training.update(2)
    recorder.close()
    assert layout.snapshot_steps(tmp_path / "run") == [0, 1, 2]


@pytest.mark.parametrize("ending", ["", "raise SystemExit(3)", "1 / 0"], ids=["end", "exit", "error"])
def test_a_script_without_close_keeps_the_last_step(tmp_path, ending):
    done = run_script(
        f"""
        def main():
            watch(model, optimizer, out=out, every=10)
            for _ in range(25):
                update()
        main()
        {ending}
        """,
        tmp_path / "run",
    )
    assert done.returncode == {"": 0, "1 / 0": 1}.get(ending, 3), done.stderr
    run = open_run(tmp_path / "run")
    assert [snapshot.step for snapshot in run.snapshots] == [0, 10, 20, 25]
    run.snapshots[-1].load()


def test_killed_recordings_leave_whole_snapshots_only(tmp_path):
    done = run_script(
        """
        random.seed(0)
        for attempt in range(10):
            folder = f"{out}/{attempt}"
            child = os.fork()
            if child == 0:
                watch(model, optimizer, out=folder, every=1)
                while True:
                    update()
            while not os.path.exists(f"{folder}/weights/000000000000.safetensors"):
                time.sleep(0.001)
            time.sleep(random.uniform(0, 0.15))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        """,
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    kept = 0
    for attempt in range(10):
        run = open_run(tmp_path / str(attempt))
        steps = [snapshot.step for snapshot in run.snapshots]
        assert steps == list(range(len(steps)))
        for snapshot in run.snapshots:
            assert snapshot.load()["weight"].shape == (300, 300)
        kept += len(steps)
    assert kept > 10
    for entry in (tmp_path / "9" / layout.WEIGHTS_FOLDER).glob(f"{files.TEMPORARY_PREFIX}*"):
        os.utime(entry, (0, 0))  # as if this process had started after the kill
    model = nn.Linear(300, 300)
    watch(model, out=tmp_path / "9", start_step=steps[-1] + 1).close()
    names = [entry.name for entry in (tmp_path / "9" / layout.WEIGHTS_FOLDER).iterdir()]
    assert not any(name.startswith(files.TEMPORARY_PREFIX) for name in names)


def test_termination_flushes_and_keeps_the_last_step(tmp_path):
    done = run_script(
        """
        recorder = watch(model, optimizer, out=out, every=1)
        for _ in range(25):
            update()
        os.kill(os.getpid(), signal.SIGTERM)
        """,
        tmp_path / "run",
    )
    assert done.returncode == -signal.SIGTERM, done.stderr
    run = open_run(tmp_path / "run")
    assert [snapshot.step for snapshot in run.snapshots] == list(range(26))
    assert all(snapshot.load() for snapshot in run.snapshots)


def test_termination_within_our_own_code(tmp_path):
    done = run_script(
        """
        def kill():
            os.kill(os.getpid(), signal.SIGTERM)
        def submit(recorder):  # with the writer's lock held
            class Jobs(type(recorder._writer._jobs)):
                def append(self, job):
                    super().append(job)
                    kill()
            recorder._writer._jobs = Jobs(recorder._writer._jobs)
        def close(recorder):
            join = recorder._writer._thread.join
            recorder._writer._thread.join = lambda: (kill(), join())
            recorder.close()
        def copy(recorder):
            original = recorder._capture.copy
            recorder._capture.copy = lambda: (setattr(recorder._capture, "copy", original), kill(), original())[2]
        def within(recorder):
            optimizer.register_step_pre_hook(lambda *_: kill())  # after ours, as if amid the parameters
        for place in (submit, close, copy, within):
            child = os.fork()
            if child == 0:
                recorder = watch(model, optimizer, out=f"{out}/{place.__name__}", every=1)
                update()
                place(recorder)
                update()
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM, place
        """,
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    for place, kept in {"submit": [0, 1, 2], "close": [0, 1], "copy": [0, 1, 2], "within": [0, 1]}.items():
        assert [snapshot.step for snapshot in open_run(tmp_path / place).snapshots] == kept, place
    assert done.stderr.count("the weights after step 1 are not kept") == 1


def test_termination_is_left_to_a_handler_of_the_scripts_own(training, tmp_path):
    calls = []
    before = signal.signal(signal.SIGTERM, lambda *_: calls.append(1))
    try:
        with watch(training.model, training.optimizer, out=tmp_path / "own"):
            os.kill(os.getpid(), signal.SIGTERM)
            training.update()
        assert calls == [1]
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with watch(training.model, training.optimizer, out=tmp_path / "ours"):
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)


def test_an_update_that_was_interrupted_is_not_kept(training, tmp_path):
    def interrupt(*_):
        raise KeyboardInterrupt

    def interrupted_update():
        with watch(training.model, training.optimizer, out=tmp_path / "run", every=1):
            training.update(2)
            training.optimizer.register_step_pre_hook(interrupt)  # after ours, as if amid the parameters
            training.update()

    with pytest.warns(RuntimeWarning, match="the weights after step 2 are not kept"), pytest.raises(KeyboardInterrupt):
        interrupted_update()
    assert layout.snapshot_steps(tmp_path / "run") == [0, 1, 2]
