"""A second run of the same script: which folder it is recorded in, and what becomes of the first."""

import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

import groktrace
from groktrace.errors import RunError, SettingsError
from groktrace.recording.folder import latest_beside
from groktrace.recording.lock import FolderLock
from groktrace.recording.termination import open_recorders
from groktrace.recording.watch import watch
from groktrace.run import layout


def contents(root):
    """All files of a folder and when they were written."""
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in root.rglob("*") if path.is_file()}


def steps(*folders):
    return [layout.snapshot_steps(folder) for folder in folders]


def test_a_second_run_goes_into_the_next_folder_and_says_so(make_training, root, capsys):
    make_training().record(root, 5)
    before = contents(root)
    assert capsys.readouterr().err == ""
    second = make_training().record(root, 3)
    assert capsys.readouterr().err == (
        f"groktrace: '{root}' holds a recording up to step 5 and stays as it is; this training is recorded in "
        f"'{root}-2'.\n"
    )
    third = make_training().record(str(root) + "/", 1, start_step=0)
    assert contents(root) == before
    assert (second.out, third.out) == (root.with_name("run-2"), root.with_name("run-3"))
    assert steps(root, second.out, third.out) == [[0, 2, 4, 5], [0, 2, 3], [0, 1]]
    assert {json.loads((folder / "run.json").read_text())["out"] for folder in (root, second.out)} == {"run"}
    (root.with_name("run-7")).touch()  # whatever it is, its number is taken
    assert make_training().record(root, 1).out == root.with_name("run-8")
    assert f"'{root}-2', 3 steps" not in repr(second)
    assert str(second.out) in repr(second)


def test_another_network_goes_into_the_next_folder_too(training, root, capsys):
    training.record(root, 1)
    before = contents(root)
    training.model = nn.Linear(3, 2)
    training.optimizer = torch.optim.SGD(training.model.parameters(), lr=0.1)
    assert training.record(root, 2, start_step=10).out == root.with_name("run-2")
    assert "is the run of another network or loss and stays as it is" in capsys.readouterr().err
    criterion = nn.Bilinear(2, 2, 1)
    training.optimizer.add_param_group({"params": list(criterion.parameters())})
    data = {"train": (training.x, training.y), "loss": lambda o, t: criterion(o, t).square().mean()}
    watch(training.model, training.optimizer, **data, out=root, start_step=12).close()
    assert steps(root, root.with_name("run-2"), root.with_name("run-3")) == [[0, 1], [10, 12], [12]]
    assert contents(root) == before


def test_the_first_folder_is_the_relative_one_too(make_training, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_training().record("snapshots", 1)
    recorder = make_training().record(Path("snapshots"), 1)
    assert recorder.out == tmp_path / "snapshots-2"
    assert recorder.requested == tmp_path / "snapshots"


@pytest.mark.parametrize("if_exists", ["error", "new", "replace"])
def test_what_is_no_run_is_refused_and_left_alone(make_training, root, if_exists):
    root.mkdir()
    (root / "thesis.tex").write_text("x")
    before = contents(root)
    with pytest.raises(SettingsError, match="holds files, but is not a groktrace run; choose another out="):
        make_training().record(root, 1, if_exists=if_exists)
    (root / layout.RUN_FILE).write_text('{"epochs": 3}')
    with pytest.raises(RunError, match="not a groktrace run file"):
        make_training().record(root, 1, if_exists=if_exists)
    (root / layout.RUN_FILE).unlink()
    assert contents(root) == before
    assert [path.name for path in root.parent.iterdir()] == ["run"]


def test_error_refuses(make_training, root):
    make_training().record(root, 5)
    before = contents(root)
    with pytest.raises(SettingsError, match=r"up to step 5\. To continue it, .*start_step=; to start anew"):
        make_training().record(root, 1, if_exists="error")
    other = make_training()
    other.model = nn.Linear(3, 2)
    other.optimizer = torch.optim.SGD(other.model.parameters(), lr=0.1)
    with pytest.raises(SettingsError, match=r"is the run of another network or loss\. To start anew"):
        other.record(root, 1, if_exists="error", start_step=5)
    assert contents(root) == before
    make_training().record(root, 2, if_exists="error", start_step=5)
    assert steps(root) == [[0, 2, 4, 5, 6, 7]]
    with pytest.raises(SettingsError, match="if_exists: expected 'error', 'new' or 'replace', got 'overwrite'"):
        make_training().record(root, 1, if_exists="overwrite")


def test_replace_removes_what_groktrace_wrote(make_training, root, capsys):
    make_training().record(root, 5)
    for name in ("notes.txt", "tensorboard/events.mine", "tensorboard/x/events.groktrace", "analysis/x/points.jsonl"):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    created = json.loads((root / "run.json").read_text())
    other = make_training()
    other.model = nn.Linear(3, 2)
    other.optimizer = torch.optim.SGD(other.model.parameters(), lr=0.1)
    assert other.record(root, 3, if_exists="replace").out == root
    assert steps(root) == [[0, 2, 3]]
    left = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
    assert {"notes.txt", "tensorboard/events.mine"} < left
    assert not left & {"tensorboard/x/events.groktrace", "analysis/x/points.jsonl"}
    assert json.loads((root / "run.json").read_text())["weights"] != created["weights"]
    assert capsys.readouterr().err == ""


def test_replace_continues_what_it_can(make_training, root):
    make_training().record(root, 4)
    make_training().record(root, 2, if_exists="replace", start_step=4)
    assert steps(root) == [[0, 2, 4, 6]]


def test_what_was_refused_before_the_start_removes_nothing(training, make_training, root):
    make_training().record(root, 2)
    before = contents(root)
    with pytest.raises(groktrace.GroktraceError):
        watch(training.model, training.optimizer, train=(training.x, training.y[:3]), loss="mse", out=root)
    with pytest.raises(groktrace.GroktraceError):
        watch(
            training.model,
            training.optimizer,
            train=(training.x, 3),
            loss="mse",
            out=root,
            if_exists="replace",
            every=2,
        )
    assert contents(root) == before
    assert [path.name for path in root.parent.iterdir()] == ["run"]


class TestResuming:
    def interrupted(self, make_training, root):
        """A run of ten updates, and one of six beside it that starts from other weights."""
        make_training().record(root, 10)
        training = make_training()
        with torch.no_grad():
            training.model[0].weight.mul_(2)
        training.record(root, 6)
        return training

    def test_the_newest_goes_on(self, make_training, root):
        self.interrupted(make_training, root)
        before = contents(root)
        assert make_training().record(root, 3, start_step=7).out == root.with_name("run-2")
        assert contents(root) == before
        assert steps(root.with_name("run-2")) == [[0, 2, 4, 6, 7, 8, 10]]

    def test_the_one_with_the_weights_goes_on(self, make_training, root):
        second = self.interrupted(make_training, root)
        first = make_training()
        first.update(10)
        before = contents(root.with_name("run-2"))
        assert first.record(root, 2, start_step=10).out == root
        first = make_training()
        first.update(4)
        assert first.record(root, 1, start_step=4).out == root  # not the newest, which has other weights at step 4
        assert contents(root.with_name("run-2")) == before
        assert second.record(root, 2, start_step=6).out == root.with_name("run-2")

    def test_neighbours_of_another_name_are_not_taken_for_siblings(self, make_training, root):
        make_training().record(root, 4)
        make_training().record(root.with_name("run-2"), 6)  # of its own, say of seed 2
        before = contents(root.with_name("run-2"))
        make_training().record(root, 2, start_step=4)
        assert contents(root.with_name("run-2")) == before
        assert steps(root) == [[0, 2, 4, 6]]

    def test_a_sibling_goes_on_where_the_first_was_removed(self, make_training, root):
        self.interrupted(make_training, root)
        shutil.rmtree(root)
        assert make_training().record(root, 2, start_step=6).out == root.with_name("run-2")

    def test_a_damaged_sibling_is_passed_over(self, make_training, root):
        self.interrupted(make_training, root)
        (root.with_name("run-2") / "run.json").write_text("{")
        assert make_training().record(root, 2, start_step=10).out == root


class TestInOneProcess:
    """What running a cell of a notebook again does."""

    def test_the_old_recorder_ends_quietly(self, make_training, root, capsys):
        first = make_training()
        old = watch(first.model, first.optimizer, **first.data, out=root, every=2)
        first.update(3)
        with torch.no_grad():
            first.model[0].weight.zero_()  # as when a cell builds the network anew, in place
        second = make_training()
        new = watch(second.model, second.optimizer, **second.data, out=root, every=2)
        assert "closed: 3 steps" in repr(old)
        assert json.loads((root / "run.json").read_text())["closed"] is not None
        third = make_training()
        second.update(1)
        newest = watch(third.model, third.optimizer, **third.data, out=root, every=2)
        assert "closed: 1 steps" in repr(new)
        newest.close()
        assert steps(root, new.out, newest.out) == [[0, 2], [0, 1], [0]]
        assert capsys.readouterr().err.count("\n") == 2

    def test_the_same_training_goes_on_where_it_was(self, make_training, root):
        make_training().record(root, 1)
        training = make_training()
        watch(training.model, training.optimizer, out=root)
        training.update(3)
        with watch(training.model, training.optimizer, out=root) as again:
            assert again.out == root.with_name("run-2")
            training.update(2)
        assert steps(root.with_name("run-2")) == [[0, 3, 5]]

    def test_two_networks_are_recorded_side_by_side(self, make_training, root, capsys):
        one, other = make_training(), make_training()
        other.model = nn.Linear(3, 2)
        other.optimizer = torch.optim.SGD(other.model.parameters(), lr=0.1)
        first = watch(one.model, one.optimizer, out=root, every=2)
        second = watch(other.model, other.optimizer, out=root, every=2)
        one.update(4)
        other.update(2)
        first.close()
        second.close()
        assert steps(root, second.out) == [[0, 2, 4], [0, 2]]

    def test_replace_ends_the_recording_that_it_replaces(self, make_training, root):
        first, second = make_training(), make_training()
        old = watch(first.model, first.optimizer, out=root)
        old.flush()
        with watch(second.model, second.optimizer, out=root, if_exists="replace", every=1):
            assert "closed" in repr(old)
            second.update(1)
        assert steps(root) == [[0, 1]]


def test_readers_are_told_of_the_later_run(make_training, root, monkeypatch):
    make_training().record(root, 1)
    groktrace.open_run(root)
    assert latest_beside(root) is None
    second = make_training().record(root, 2)
    with pytest.warns(RuntimeWarning, match=f"'{root}' is an earlier run; what was .* here is in '{second.out}'"):
        assert len(groktrace.open_run(root).snapshots) == 2
    groktrace.open_run(root)  # told once
    make_training().record(root.with_name("run-3"), 1)  # of its own
    assert latest_beside(root) == second.out
    make_training().record(root, 1, if_exists="replace")
    groktrace.open_run(root)


class TestLost:
    @pytest.mark.parametrize("again", [False, True], ids=["removed", "made anew"])
    def test_a_recorder_says_once_that_its_folder_was_removed(self, make_training, root, again):
        training = make_training()
        recorder = watch(training.model, training.optimizer, out=root, every=1)
        recorder.flush()
        shutil.rmtree(root)
        if again:
            root.mkdir()
            (root / layout.WEIGHTS_FOLDER).mkdir()
            (root / layout.LOCK_FILE).write_text("another")
            (root / layout.RUN_FILE).write_text("{}")
        with pytest.warns(RuntimeWarning) as caught:  # noqa: PT031
            training.update(1)
            recorder._writer.wait()
            training.update(3)
            recorder.flush()
            recorder.close()
        assert [str(each.message) for each in caught] == [
            f"groktrace: '{root}' was removed, or taken by another recording: this one ends."
        ]
        assert recorder not in open_recorders
        assert not training.optimizer._optimizer_step_post_hooks
        assert layout.snapshot_steps(root) == []
        assert root.exists() == again

    def test_it_is_told_at_the_end_at_the_latest(self, make_training, root):
        training = make_training()
        recorder = watch(training.model, training.optimizer, out=root, every=10)
        recorder.flush()
        shutil.rmtree(root)
        training.update(1)
        with pytest.warns(RuntimeWarning, match="was removed") as caught:
            recorder.close()
        assert len(caught) == 1
        assert not root.exists()

    def test_a_lock_that_was_swept_away_is_no_loss(self, make_training, root):
        training = make_training()
        with watch(training.model, training.optimizer, out=root, every=1):
            (root / layout.LOCK_FILE).unlink()
            training.update(1)
        assert steps(root) == [[0, 1]]


SCRIPT = """
import sys, time, torch, groktrace
torch.set_num_threads(1)
torch.manual_seed(int(sys.argv[2]))
model = torch.nn.Linear(3, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
x = torch.randn(6, 3)
print("ready", flush=True)
sys.stdin.readline()
recorder = groktrace.watch(model, optimizer, train=(x, x[:, :2]), loss="mse", out=sys.argv[1], every=1, start_step=0)
for _ in range(3):
    optimizer.zero_grad()
    torch.nn.functional.mse_loss(model(x), x[:, :2]).backward()
    optimizer.step()
recorder.close()
print(recorder.out)
"""


def test_a_folder_that_another_process_holds_is_left_to_it(make_training, root, capsys):
    root.mkdir()
    hold = FolderLock(root)
    hold.sign()
    assert make_training().record(root, 1, start_step=0).out == root.with_name("run-2")
    assert f"'{root}' is being recorded already and stays as it is" in capsys.readouterr().err
    for if_exists in ("error", "replace"):
        with pytest.raises(SettingsError, match="is being recorded already; choose another out="):
            make_training().record(root, 1, if_exists=if_exists)
    assert [path.name for path in root.iterdir()] == [layout.LOCK_FILE]
    assert not hold.lost()
    hold.release()
    assert make_training().record(root, 1).out == root
    assert hold.lost()


def test_processes_that_start_together_take_folders_of_their_own(root):
    started = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(SCRIPT), str(root), str(seed)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in range(2)
    ]
    assert [process.stdout.readline() for process in started] == ["ready\n"] * 2
    for process in started:
        process.stdin.write("\n")
        process.stdin.flush()
    said = [process.communicate(timeout=60)[0].strip() for process in started]
    assert sorted(said) == [str(root), f"{root}-2"]
    for seed, out in enumerate(said):
        torch.manual_seed(seed)
        first = groktrace.open_run(out).snapshots
        assert [snapshot.step for snapshot in first] == [0, 1, 2, 3]
        assert torch.equal(first[0].load()["weight"], nn.Linear(3, 2).weight)
