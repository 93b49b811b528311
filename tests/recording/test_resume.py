import json
import os

import pytest
import torch
from torch import nn

from groktrace.errors import SettingsError
from groktrace.recording.watch import watch
from groktrace.run import files, layout
from groktrace.run.store import open_run


def record(training, root, updates, **settings):
    return layout.snapshot_steps(training.record(root, updates, **settings).out)


def bytes_of(root):
    return {entry.name: entry.read_bytes() for entry in (root / layout.WEIGHTS_FOLDER).iterdir()}


def test_a_foreign_folder_is_left_alone(training, root):
    root.mkdir()
    (root / "thesis.tex").touch()
    with pytest.raises(SettingsError, match="holds files, but is not a groktrace run; choose another out="):
        record(training, root, 1)
    assert [entry.name for entry in root.iterdir()] == ["thesis.tex"]


def test_an_empty_folder_and_one_with_leftovers_are_new(training, root):
    root.mkdir()
    (root / f"{files.TEMPORARY_PREFIX}run.json-0").touch()
    assert record(training, root, 3) == [0, 2, 3]


def test_starting_over_is_refused(make_training, root):
    record(make_training(), root, 5)
    before = bytes_of(root)
    for settings in ({}, {"start_step": 0}):
        with pytest.raises(SettingsError, match=r"up to step 5. To continue.*start_step=; to start anew"):
            record(make_training(), root, 5, if_exists="error", **settings)
    assert bytes_of(root) == before


def test_a_run_without_snapshots_may_be_started_over(make_training, root):
    record(make_training(), root, 0)
    layout.snapshot_path(root, 0).unlink()
    assert record(make_training(), root, 2) == [0, 2]


def test_start_step_continues_and_overwrites_nothing(make_training, root):
    record(make_training(), root, 5)
    before = bytes_of(root)
    created = json.loads((root / layout.RUN_FILE).read_text())["created"]
    torn = root / layout.WEIGHTS_FOLDER / f"{files.TEMPORARY_PREFIX}torn"
    torn.touch()
    os.utime(torn, (0, 0))
    assert record(make_training(), root, 6, start_step=3) == [0, 2, 3, 4, 5, 6, 8, 9]
    assert not torn.exists()
    after = bytes_of(root)
    assert all(after[name] == content for name, content in before.items())
    assert json.loads((root / layout.RUN_FILE).read_text())["created"] == created
    assert open_run(root).info["n"] == 6


def test_the_optimizer_knows_how_far_it_is(make_training, root):
    training = make_training(torch.optim.Adam)
    record(training, root, 5)
    resumed = make_training(torch.optim.Adam)
    resumed.model.load_state_dict(training.model.state_dict())
    resumed.optimizer.load_state_dict(training.optimizer.state_dict())
    assert record(resumed, root, 3) == [0, 2, 4, 5, 6, 8]


def test_a_training_that_is_under_way_keeps_its_count(make_training, root):
    training = make_training(torch.optim.Adam)
    training.update(3)
    assert record(training, root, 2) == [3, 4, 5]


def test_a_second_watch_replaces_the_first(training, root):
    first = watch(training.model, training.optimizer, **training.data, out=root, every=2)
    training.update(3)
    second = watch(training.model, training.optimizer, **training.data, out=root, every=3)
    assert "closed" in repr(first)
    assert len(training.optimizer._optimizer_step_post_hooks) == 1
    training.update(4)
    second.close()
    assert second.steps == 7
    assert layout.snapshot_steps(root) == [0, 2, 3, 6, 7]


def test_a_second_watch_may_not_count_from_zero_again(training, root):
    first = watch(training.model, training.optimizer, out=root, every=1)
    assert watch(training.model, training.optimizer, out=root, every=1, start_step=0).steps == 0  # no update between
    training.update(3)
    with pytest.raises(SettingsError, match=r"up to step 3\. To continue"):
        watch(training.model, training.optimizer, out=root, every=1, start_step=0, if_exists="error")
    assert "closed" in repr(first)
    with watch(training.model, training.optimizer, out=root, every=1) as third:
        training.update(1)
    assert third.steps == 4
    assert layout.snapshot_steps(root) == [0, 1, 2, 3, 4]


def test_a_second_watch_without_an_optimizer(training, root):
    first = watch(training.model, out=root)
    first.step()
    with watch(training.model, out=root) as second:
        second.step()
    assert layout.snapshot_steps(root) == [0, 1, 2]


def test_another_training_into_the_folder_closes_the_first(make_training, root):
    first, training = make_training(), make_training()
    earlier = watch(first.model, first.optimizer, out=root)
    first.update(3)
    with watch(training.model, training.optimizer, out=root, start_step=3):
        assert "closed: 3 steps" in repr(earlier)
        training.update(1)
    assert layout.snapshot_steps(root) == [0, 3, 4]


def test_wrong_arguments_leave_the_first_open(training, root):
    first = watch(training.model, training.optimizer, out=root)
    with pytest.raises(SettingsError):
        watch(training.model, training.optimizer, out=root, every=-1)
    assert "open" in repr(first)
    first.close()


def test_other_data_are_told_and_used(training, root):
    record(training, root, 1)
    training.x = training.x + 1
    with pytest.warns(RuntimeWarning, match="held other data than these"):
        record(training, root, 1, start_step=1)
    assert torch.equal(files.read_tensors(root / layout.DATA_FILE)[0]["train.0"], training.x)


def test_weights_alone_keep_the_data_that_are_there(training, root):
    record(training, root, 1, task="mine:make")
    watch(training.model, training.optimizer, out=root, start_step=1).close()
    info = open_run(root).info
    assert (info["n"], info["task"], info["data"]["train"]["stored"]) == (6, "mine:make", 6)
    assert (root / layout.PROGRAM_FILE).exists()


def test_a_program_of_other_data_does_not_stay(training, root, program):
    record(training, root, 1)
    program.failure = ValueError("no")
    with pytest.warns(RuntimeWarning, match="--task package.module:factory"):
        record(training, root, 1, start_step=1)
    assert not (root / layout.PROGRAM_FILE).exists()


def test_the_run_says_whether_it_is_closed(tmp_path):
    model = nn.Linear(2, 1)
    recorder = watch(model, out=tmp_path / "run", every=1)
    recorder.step()
    recorder.flush()
    opened = open_run(tmp_path / "run")
    assert not opened.closed
    recorder.close()
    assert opened.refreshed().closed
    again = watch(model, out=tmp_path / "run", every=1, start_step=1)
    assert not opened.refreshed().closed
    again.step()
    again.close()
    after = opened.refreshed()
    assert after.closed
    assert [snapshot.step for snapshot in after.snapshots] == [0, 1, 2]


def test_a_recording_that_was_killed_while_it_began_is_begun_anew(make_training, root):
    record(make_training(), root, 1)
    (root / layout.RUN_FILE).unlink()
    for path in (root / layout.WEIGHTS_FOLDER).iterdir():
        path.unlink()
    (root / layout.WEIGHTS_FOLDER).rmdir()
    torn = root / f"{files.TEMPORARY_PREFIX}-{layout.RUN_FILE}-1"
    torn.touch()
    os.utime(torn, (0, 0))
    assert record(make_training(), root, 2) == [0, 2]
    assert not torn.exists()
    (root / "thesis.tex").touch()
    (root / layout.RUN_FILE).unlink()
    with pytest.raises(SettingsError, match="is not a groktrace run"):
        record(make_training(), root, 2)


def test_a_recording_that_was_killed_after_its_first_snapshot_goes_on_where_told_to(make_training, root):
    assert record(make_training(), root, 0) == [0]
    with pytest.raises(SettingsError, match="or pass start_step="):
        record(make_training(), root, 2, if_exists="error")
    assert record(make_training(), root, 2, start_step=0) == [0, 2]


def test_what_is_known_of_when_weights_train_stays(make_training, root):
    training = make_training()
    training.model[0].requires_grad_(False)
    training.optimizer = torch.optim.SGD(training.model[2].parameters(), lr=0.1)
    record(training, root, 4)
    training.model[0].requires_grad_(True)
    training.optimizer = torch.optim.SGD(training.model.parameters(), lr=0.1)
    record(training, root, 2, start_step=4)
    training.model[2].requires_grad_(False)
    training.optimizer = torch.optim.SGD(training.model[0].parameters(), lr=0.1)
    record(training, root, 2, start_step=6)
    found = {name: (spec.trainable, spec.trainable_from) for name, spec in open_run(root).specs.items()}
    assert found == {"0.weight": (True, 4), "0.bias": (True, 4), "2.weight": (True, 0), "2.bias": (True, 0)}
    last = open_run(root).snapshots[-1].load()
    assert all(torch.equal(last[name], value) for name, value in training.model.state_dict().items())
