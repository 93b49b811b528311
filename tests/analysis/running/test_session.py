import dataclasses
import shutil

import pytest
import torch
from torch import nn

import groktrace
from groktrace.analysis.measurement import measure
from groktrace.analysis.running import session
from groktrace.errors import RunError, TaskError
from groktrace.run import layout
from groktrace.run.files import write_tensors

FAST = {"draws": 20, "burn_in": 20}


def test_finished_snapshots_are_not_redone(small_run, evaluated):
    calls = evaluated["llc"]
    first = groktrace.analyze(small_run, **FAST)
    assert len(calls) == 6
    again = groktrace.analyze(small_run, **FAST)
    assert len(calls) == 6
    assert again == first
    groktrace.analyze(small_run, **FAST, seed=1)
    assert len(calls) == 12


def test_an_interrupted_analysis_goes_on_to_the_same_result(small_run, tmp_path, monkeypatch, evaluated):
    other = shutil.copytree(small_run, tmp_path / "other" / "run")
    monkeypatch.setattr(measure, "rows_per_stack", lambda loss, batch_size=None: 4)
    whole = groktrace.analyze(small_run, **FAST)

    def interrupt(phase, done, total):
        if phase == "sampling" and done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        groktrace.analyze(other, **FAST, progress=interrupt)
    evaluated.clear()
    resumed = groktrace.analyze(other, **FAST)
    assert len(evaluated["llc"]) == 2
    assert resumed.points == whole.points


def test_later_snapshots_are_measured_at_the_same_temperature(small_run, monkeypatch):
    late = [layout.snapshot_path(small_run, step) for step in (40, 50)]
    kept = [(path, path.read_bytes()) for path in late]
    for path in late:
        path.unlink()
    before = groktrace.analyze(small_run, **FAST)
    for path, data in kept:
        path.write_bytes(data)
    after = groktrace.analyze(small_run, **FAST)
    assert len(after.points) == 6
    assert (after.nbeta, after.localization) == (before.nbeta, before.localization)
    assert after.points[:4] == before.points


def test_one_bad_snapshot_costs_that_snapshot(small_run):
    truncated, flipped = (layout.snapshot_path(small_run, step) for step in (20, 40))
    truncated.write_bytes(truncated.read_bytes()[:100])
    data = bytearray(flipped.read_bytes())
    data[-1] ^= 1
    flipped.write_bytes(data)
    trajectory = groktrace.analyze(small_run, **FAST)
    assert [point.step for point in trajectory.points] == [0, 10, 30, 50]
    assert len(trajectory.unreadable) == 2
    assert any("000000000020.safetensors" in line for line in trajectory.unreadable)
    assert any("does not match its digest" in line for line in trajectory.unreadable)
    # Also when the analysis is called again, and all else comes from the journal.
    assert len(groktrace.analyze(small_run, **FAST).unreadable) == 2


def test_no_readable_snapshot_is_an_error(small_run):
    for step in layout.snapshot_steps(small_run):
        layout.snapshot_path(small_run, step).write_bytes(b"nothing")
    with pytest.raises(RunError, match=r"none of its snapshots can be read; the first: .*000000000000"):
        groktrace.analyze(small_run, **FAST)
    assert not (small_run / layout.ANALYSIS_FOLDER).exists()


def test_a_task_of_another_network_is_refused_before_anything_is_written(small_run):
    task = groktrace.Task.from_model(nn.Linear(4, 3), train=(torch.zeros(5, 4), torch.zeros(5, 3)), loss="mse")
    with pytest.raises(TaskError, match=r"cannot be evaluated on the recorded weights .* has to be of the network"):
        groktrace.analyze(small_run, task=task, task_name="a:b", **FAST)
    assert not (small_run / layout.ANALYSIS_FOLDER).exists()


def test_a_loss_that_fails_on_all_samples_only_is_refused_before_anything_is_written(small_run):
    def forward(weights, tensors):
        torch.linalg.det(tensors[0][:, :2])  # of two samples
        return weights["0.weight"].sum(), None

    task = dataclasses.replace(groktrace.open_run(small_run).task, forward=forward)
    with pytest.raises(TaskError, match=r"cannot be differentiated on the training samples .*square matrices"):
        groktrace.analyze(small_run, task=task, task_name="a:b", **FAST)
    assert not (small_run / layout.ANALYSIS_FOLDER).exists()


def test_a_given_task_gives_what_the_recorded_program_gives(small_run):
    recorded = groktrace.open_run(small_run).task
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    train, val = recorded.train.nested(), recorded.val.nested()
    task = groktrace.Task.from_model(model, train=train, loss="cross_entropy", val=val)
    own = groktrace.analyze(small_run, **FAST)
    given = groktrace.analyze(small_run, task=task, task_name="a:b", **FAST)
    for a, b in zip(own.points, given.points, strict=True):
        assert a.llc == pytest.approx(b.llc, rel=1e-3)
        assert a.val_accuracy == b.val_accuracy


def test_tasks_never_get_each_others_results(small_run):
    recorded = groktrace.open_run(small_run).task
    x, y = recorded.train.nested()
    own = groktrace.analyze(small_run, **FAST)

    def given(loss, **data):
        return groktrace.Task.from_model(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)), loss=loss, **data)

    def smoothed(outputs, targets):
        return nn.functional.cross_entropy(outputs, targets, label_smoothing=0.2)

    fewer = given("cross_entropy", train=(3 * x[:20], y[:20]))
    with pytest.warns(
        RuntimeWarning, match=r"groktrace: the task's data are others .* \(20 training samples, not 60\)"
    ):
        found = groktrace.analyze(small_run, task=fewer, task_name="a:b", **FAST)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    model.load_state_dict(groktrace.open_run(small_run).snapshots[-1].load())
    expected = nn.functional.cross_entropy(model(3 * x[:20]), y[:20]).item()
    assert (found.n, found.points[-1].train_loss) == (20, pytest.approx(expected, rel=1e-5))
    with pytest.warns(RuntimeWarning, match="groktrace: the task's loss is another than that recorded"):
        other = groktrace.analyze(small_run, task=given(smoothed), task_name="a:b", **FAST)
    expected = smoothed(model(x), y).item()
    assert other.points[-1].train_loss == pytest.approx(expected, rel=1e-5)
    # And each its own, when it comes again.
    assert groktrace.analyze(small_run, **FAST) == own
    with pytest.warns(RuntimeWarning):
        assert groktrace.analyze(small_run, task=fewer, **FAST) == found


def test_a_task_without_data_is_measured_on_those_recorded(small_run):
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    own = groktrace.analyze(small_run, **FAST)
    given = groktrace.analyze(small_run, task=groktrace.Task.from_model(model, loss="cross_entropy"), **FAST)
    assert given.n == own.n
    for a, b in zip(own.points, given.points, strict=True):
        assert a.llc == pytest.approx(b.llc, rel=1e-3)  # also the noise is that of the run
        assert (a.val_loss, a.val_accuracy) == (pytest.approx(b.val_loss), b.val_accuracy)
    # Also where model and loss could not be recorded; where no data were, they are asked for.
    (small_run / "program.json").unlink()
    again = groktrace.analyze(small_run, task=groktrace.Task.from_model(model, loss="cross_entropy"), **FAST)
    assert [point.train_loss for point in again.points] == [point.train_loss for point in given.points]
    (small_run / "data.safetensors").unlink()
    with pytest.raises(
        TaskError, match=r"holds no data; give the task its own: groktrace\.Task\.from_model\(\.\.\., train"
    ):
        groktrace.analyze(small_run, task=groktrace.Task.from_model(model, loss="cross_entropy"), **FAST)


def test_a_damaged_recording_can_still_be_analysed_with_a_task(small_run):
    recorded = groktrace.open_run(small_run).task
    for name in ("program.json", "data.safetensors"):
        (small_run / name).write_bytes(b"half")
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    task = groktrace.Task.from_model(model, loss="cross_entropy", train=recorded.train.nested())
    assert groktrace.analyze(small_run, task=task, **FAST).n == 60
    assert groktrace.open_run(small_run).trajectory().n == 60


def test_a_snapshot_replaced_during_the_analysis_is_named(small_run):
    path = layout.snapshot_path(small_run, 30)
    other = groktrace.open_run(small_run).snapshots[3].load()
    other["0.bias"] = other["0.bias"] + 1

    def replace(phase, done, total):
        if phase == "sampling" and done == 0:
            write_tensors(path, other, {"step": "30", "metrics": "{}"})

    with pytest.raises(RunError, match="the snapshot of step 30 is not the one that was there when the analysis began"):
        groktrace.analyze(small_run, **FAST, progress=replace)
    assert len(groktrace.analyze(small_run, **FAST).points) == 6


def test_what_was_logged_is_that_of_the_run_that_is_there(small_run, tmp_path, record_like):
    groktrace.analyze(record_like(small_run, tmp_path / "run2", 0.1, seen=1.0), **FAST)
    other = record_like(small_run, tmp_path / "other", 0.1, seen=2.0)
    shutil.copytree(tmp_path / "run2" / "analysis", other / "analysis")
    found = groktrace.analyze(other, **FAST)
    assert [point.metrics.get("seen") for point in found.points] == [None, *[2.0] * 5]


def test_the_rank_is_taken_once_and_at_the_last_snapshot_that_loads(small_run, monkeypatch):
    calls = []
    original = session.jacobian_reference
    monkeypatch.setattr(session, "jacobian_reference", lambda *rest: calls.append(1) or original(*rest))
    first = groktrace.analyze(small_run, **FAST, reference="jacobian")
    assert groktrace.analyze(small_run, **FAST, reference="jacobian") == first
    assert len(calls) == 1
    path = layout.snapshot_path(small_run, 50)
    path.write_bytes(path.read_bytes()[:-1])
    assert groktrace.analyze(small_run, **FAST, reference="jacobian").reference.step == 40


def test_losses_and_curvatures_are_measured_once_for_all_settings(small_run, evaluated):
    measured = evaluated["metrics"]
    first = groktrace.analyze(small_run, draws=20, burn_in=20)
    assert len(measured) == 6
    second = groktrace.analyze(small_run, draws=25, burn_in=20, chains=2)
    assert len(measured) == 6
    assert [point.train_loss for point in second] == [point.train_loss for point in first]
    groktrace.analyze(small_run, draws=20, burn_in=20, parameters=["0.weight"])  # other weights, another curvature
    assert len(measured) == 12
