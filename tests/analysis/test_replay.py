import dataclasses
import json
import os
import shutil

import numpy as np
import pytest
import torch
from torch import nn

import groktrace
from groktrace.analysis import measure, session
from groktrace.analysis.trajectory import Trajectory
from groktrace.errors import RunError, SettingsError, SnapshotError, TaskError
from groktrace.run import layout
from groktrace.run.files import read_json, read_tensors, write_json, write_tensors
from groktrace.sampling import network

FAST = {"draws": 20, "burn_in": 20}


def test_points_carry_what_is_known_of_each_snapshot(small_run):
    trajectory = groktrace.analyze(small_run, **FAST)
    assert [point.step for point in trajectory.points] == [0, 10, 20, 30, 40, 50]
    assert trajectory.n == 60
    assert trajectory.resolution == 10.0
    last = trajectory.points[-1]
    assert last.metrics["lr"] == pytest.approx(4.8)  # logged before the snapshot was taken
    assert last.train_loss < trajectory.points[0].train_loss
    assert 0 <= last.val_accuracy <= 1
    assert last.diagnostics["virial"] == pytest.approx(1, abs=0.5)
    assert trajectory.unreadable == ()


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


def test_snapshots_that_are_not_finite_are_named_and_the_rest_is_measured(tmp_path):
    model = nn.Linear(2, 1)
    x = torch.randn(10, 2, generator=torch.Generator().manual_seed(0))
    with groktrace.watch(model, train=(x, x[:, :1]), loss="mse", out=tmp_path / "run", every=1) as recorder:
        for _ in range(2):
            recorder.step()
        with torch.no_grad():
            model.weight.fill_(float("nan"))
        recorder.step()
    trajectory = groktrace.analyze(tmp_path / "run", **FAST)
    last = trajectory.points[-1]
    assert (last.step, last.llc, last.reliable) == (3, None, False)
    assert last.reasons == ("the weights, the loss or its curvature at the snapshot are not finite",)
    assert trajectory.points[0].llc is not None
    assert json.loads(json.dumps(trajectory.to_dict(), allow_nan=False))


class Odd(nn.Module):
    """A network with an empty parameter, in some precision."""

    def __init__(self, dtype):
        super().__init__()
        self.inner = nn.Linear(2, 1, dtype=dtype)
        self.empty = nn.Parameter(torch.zeros(0, 3, dtype=dtype))

    def forward(self, x):
        return self.inner(x) + self.empty.sum()


def record_odd(root, dtype, samples, loss="mse"):
    x = torch.randn(samples, 2, generator=torch.Generator().manual_seed(0)).to(dtype)
    with groktrace.watch(Odd(dtype), train=(x, x[:, :1]), loss=loss, out=root, every=1) as recorder:
        recorder.step()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("samples", [1, 10])
def test_odd_networks_get_numbers(tmp_path, dtype, samples):
    record_odd(tmp_path / "run", dtype, samples)
    trajectory = groktrace.analyze(tmp_path / "run", curvature=True, **FAST)
    assert trajectory.n == samples
    for name in ("llc", "stderr", "train_loss", "hessian_trace"):
        assert np.isfinite(trajectory.column(name)).all(), name


def test_a_constant_loss_has_no_scale_of_its_own_and_no_complexity(tmp_path):
    record_odd(tmp_path / "run", torch.float32, 10, lambda outputs, targets: (0 * outputs).sum())
    with pytest.raises(SettingsError, match="nbeta: cannot be derived where the loss has no curvature; give a number"):
        groktrace.analyze(tmp_path / "run", **FAST)
    trajectory = groktrace.analyze(tmp_path / "run", nbeta=100.0, localization=1.0, **FAST)
    assert [point.llc for point in trajectory.points] == [0.0, 0.0]


def test_wbic_of_a_single_sample_is_refused(tmp_path):
    record_odd(tmp_path / "run", torch.float32, 1)
    with pytest.raises(SettingsError, match="'wbic' is n/log n and needs at least 2 samples, got 1"):
        groktrace.analyze(tmp_path / "run", nbeta="wbic", **FAST)


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


def record_like(run, out, learning_rate, scale=1.0, seen=None):
    """A training from the start of a recorded one, on its data, at another rate."""
    opened = groktrace.open_run(run)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    model.load_state_dict(opened.snapshots[0].load())
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)
    x, y = opened.task.train.nested()
    x = scale * x
    with groktrace.watch(
        model, optimizer, train=(x, y), loss="cross_entropy", val=opened.task.val.nested(), out=out, every=10
    ) as recorder:
        for _ in range(50):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            recorder.log(seen=seen or 0.0)
    return out


def seeds_of(monkeypatch, run, **settings):
    """The seed of every generator that an analysis makes."""
    from groktrace.sampling import noise

    seeds = []
    original = noise.generator_for

    def noting(*key):
        generator = original(*key)
        seeds.append(generator.initial_seed())
        return generator

    with monkeypatch.context() as patch:
        for module in ("groktrace.sampling.chains", "groktrace.analysis.measure", "groktrace.analysis.hessian"):
            patch.setattr(f"{module}.generator_for", noting)
        groktrace.analyze(run, **FAST, **settings)
    return seeds


def test_runs_share_no_noise_and_copies_all_of_it(small_run, tmp_path, monkeypatch):
    copy = shutil.copytree(small_run, tmp_path / "copy" / "run")
    seeds = seeds_of(monkeypatch, small_run, curvature=True, locality=0.22)
    assert len(set(seeds)) == len(seeds) > 18
    assert seeds_of(monkeypatch, copy, curvature=True, locality=0.22) == seeds
    # From the same start, at the same rate: the same training, whatever was logged.
    (first, *_), same = groktrace.analyze(copy, **FAST).points, record_like(small_run, tmp_path / "same", 0.1, seen=3.0)
    assert groktrace.analyze(same, **FAST).points[0].llc == first.llc
    # At another rate only the start is the same, on other data nothing.
    other = seeds_of(monkeypatch, record_like(small_run, tmp_path / "faster", 0.2), curvature=True, locality=0.22)
    assert len(set(other) & set(seeds)) * 6 == len(seeds)
    assert not set(
        seeds_of(monkeypatch, record_like(small_run, tmp_path / "data", 0.1, 1.5), curvature=True, locality=0.22)
    ) & set(seeds)


def test_what_was_logged_is_that_of_the_run_that_is_there(small_run, tmp_path):
    groktrace.analyze(record_like(small_run, tmp_path / "run2", 0.1, seen=1.0), **FAST)
    other = record_like(small_run, tmp_path / "other", 0.1, seen=2.0)
    shutil.copytree(tmp_path / "run2" / "analysis", other / "analysis")
    found = groktrace.analyze(other, **FAST)
    assert [point.metrics.get("seen") for point in found.points] == [None, *[2.0] * 5]


def test_results_of_a_run_that_was_recorded_anew_are_neither_shown_nor_gone_on_from(small_run, tmp_path):
    place = record_like(small_run, tmp_path / "again", 0.1)
    groktrace.analyze(place, **FAST)
    left = shutil.copytree(place / "analysis", tmp_path / "left")
    shutil.rmtree(place)
    record_like(small_run, place, 0.3)
    info = json.loads((place / "run.json").read_text())
    write_json(place / "run.json", {**info, "created": "2001-01-01T00:00:00+00:00"})  # the clock has gone on
    fresh = groktrace.analyze(place, **FAST)
    shutil.rmtree(place / "analysis")
    shutil.copytree(left, place / "analysis")
    with pytest.raises(
        RunError, match=r"its results are of another recording, or of other data, .* 'groktrace analyze"
    ):
        groktrace.open_run(place).trajectory()
    found = groktrace.analyze(place, **FAST)
    assert found == fresh  # also nβ and γ
    assert groktrace.open_run(place).trajectory() == found


@pytest.mark.parametrize("change", ["data", "snapshot"])
def test_results_of_other_data_or_snapshots_are_not_shown(small_run, change):
    found = groktrace.analyze(small_run, **FAST)
    for name in ("program.json", "data.safetensors"):  # what is gone is no other
        (small_run / name).rename(small_run / f"{name}.away")
    assert groktrace.open_run(small_run).trajectory() == found
    for name in ("program.json", "data.safetensors"):
        (small_run / f"{name}.away").rename(small_run / name)
    if change == "data":
        tensors, _ = read_tensors(small_run / "data.safetensors")
        tensors["train.0"][0, 0] += 1
        write_tensors(small_run / "data.safetensors", tensors, {})
    else:
        weights = groktrace.open_run(small_run).snapshots[-1].load()
        weights["0.bias"][0] += 1
        write_tensors(layout.snapshot_path(small_run, 50), weights, {"step": "50"})
    with pytest.raises(RunError, match="its results are of another recording, or of other data"):
        groktrace.open_run(small_run).trajectory()


def test_a_copy_shows_what_the_run_shows(small_run, tmp_path):
    groktrace.analyze(small_run, **FAST, seed=3)
    latest = groktrace.analyze(small_run, **FAST)
    earlier = max(path for path in small_run.glob("analysis/*/trajectory.json") if not is_latest(path, latest))
    copy = shutil.copytree(small_run, tmp_path / "copy")
    for root in (small_run, copy):
        (touched,) = root.glob(f"analysis/{earlier.parent.name}/trajectory.json")
        os.utime(touched)  # as copying may do, in whatever order
        assert groktrace.open_run(root).trajectory() == latest
    # A run of before this was noted: by time.
    (copy / "analysis" / "latest.json").unlink()
    assert groktrace.open_run(copy).trajectory() != latest
    # Results that were removed.
    note = read_json(small_run / "analysis" / "latest.json")
    write_json(copy / "analysis" / "latest.json", {**note, "folder": "../run"})
    assert groktrace.open_run(copy).trajectory() != latest


def is_latest(path, latest):
    return Trajectory.load(path) == latest


@pytest.mark.parametrize("change", [[], {"folder": 3}, {"recorded": []}, {"recorded": {"a": 1}}, {"step": "3"}])
def test_a_damaged_note_of_the_last_result_is_named(small_run, change):
    groktrace.analyze(small_run, **FAST)
    path = small_run / "analysis" / "latest.json"
    write_json(path, change if isinstance(change, list) else {**read_json(path), **change})
    with pytest.raises(RunError, match=r"latest\.json: damaged"):
        groktrace.open_run(small_run).trajectory()


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


def test_paper_settings_run_as_published(small_run):
    settings = {"method": "sgld", "nbeta": 30.0, "localization": 5.0, "step_size": 1e-4, "chains": 3, "batch_size": 16}
    trajectory = groktrace.analyze(small_run, **settings, burn_in=10, draws=30)
    assert (trajectory.nbeta, trajectory.localization, trajectory.method) == (30.0, 5.0, "sgld")
    assert (trajectory.resolution, trajectory.locality) == (None, None)


def test_the_last_finished_analysis_is_found(small_run):
    with pytest.raises(RunError, match="not analysed yet; run 'groktrace analyze"):
        groktrace.open_run(small_run).trajectory()
    groktrace.analyze(small_run, **FAST)
    latest = groktrace.analyze(small_run, **FAST, seed=3)
    assert groktrace.open_run(small_run).trajectory() == latest


def test_damaged_results_are_named(small_run):
    groktrace.analyze(small_run, **FAST)
    (folder,) = (small_run / layout.ANALYSIS_FOLDER).glob("*/")
    (folder / "settings.json").write_text("{}")
    with pytest.raises(RunError, match=r"settings\.json: damaged .* analyse again"):
        groktrace.analyze(small_run, **FAST)


def test_mismatched_shapes_are_named(small_run):
    info = json.loads((small_run / layout.RUN_FILE).read_text())
    info["weights"]["0.weight"]["shape"] = [8, 5]
    write_json(small_run / layout.RUN_FILE, info)
    with pytest.raises(SnapshotError, match=r"'0.weight' should be float32\[8, 5\] as run.json says, but is"):
        groktrace.open_run(small_run).snapshots[0].load()
    with pytest.raises(RunError, match="none of its snapshots can be read"):
        groktrace.analyze(small_run, **FAST)


def test_a_reference_goes_with_the_trajectory_and_is_replaced(small_run):
    given = groktrace.analyze(small_run, **FAST, reference=3)
    assert given.reference.to_dict() | {"llc": 3.0, "source": "value"} == given.reference.to_dict()
    assert groktrace.open_run(small_run).trajectory() == given
    ranked = groktrace.analyze(small_run, **FAST, reference="jacobian").reference
    assert (ranked.source, ranked.step, 2 * ranked.llc) == ("jacobian", 50, ranked.rank)
    # Two layers of tanh have no symmetry that is continuous: all 67 weights count.
    assert ranked.rank == 67
    assert groktrace.open_run(small_run).trajectory().reference == ranked
    assert groktrace.analyze(small_run, **FAST).reference is None


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


def test_curvature_is_measured_where_asked_for_and_kept(small_run, evaluated):
    plain = groktrace.analyze(small_run, **FAST)
    assert plain.points[0].hessian_trace is None
    curved = groktrace.analyze(small_run, **FAST, curvature=True)
    assert len(evaluated["hessian"]) == 6
    for point in curved.points:
        assert 0 < point.hessian_top < point.hessian_trace
        assert 0 < point.hessian_trace_stderr < point.hessian_trace
        assert point.hessian_top == pytest.approx(point.diagnostics["top_curvature"], rel=0.07)
    assert groktrace.analyze(small_run, **FAST, curvature=True) == curved
    assert groktrace.open_run(small_run).trajectory() == curved
    assert len(evaluated["hessian"]) == 6


@pytest.mark.parametrize("large", [False, True])
def test_nbeta_that_follows_the_curvature_is_at_each_snapshot_the_number_given(small_run, monkeypatch, large):
    if large:
        monkeypatch.setattr(network, "LARGE_WEIGHTS", 1)
    settings = {"chains": 2, "burn_in": 20, "draws": 60, "localization": 5.0, "resolution": 30.0}
    following = groktrace.analyze(small_run, nbeta="curvature", **settings)
    assert (following.nbeta, following.resolution, following.follows_curvature) == (None, 30.0, True)
    nbetas = [point.diagnostics["nbeta"] for point in following.points]
    assert max(nbetas) > 1.1 * min(nbetas)
    for point in (following.points[0], following.points[-1]):
        top = point.diagnostics["top_curvature"]
        assert point.diagnostics["nbeta"] == pytest.approx(30.0 * 5.0 / top)
        fixed = groktrace.analyze(small_run, nbeta=point.diagnostics["nbeta"], **settings)
        (same,) = (other for other in fixed.points if other.step == point.step)
        assert point.llc == pytest.approx(same.llc, rel=1e-3)
        assert point.llc_centred == pytest.approx(same.llc_centred, rel=1e-3)
        if not large:
            seen = point.diagnostics["singular_fluctuation"]
            assert seen == pytest.approx(same.diagnostics["singular_fluctuation"], rel=1e-3)


@pytest.mark.parametrize(("loss", "follows"), [("cross_entropy", True), ("mse", False)])
def test_where_the_curvature_falls_away_nbeta_follows_it_by_default(tmp_path, loss, follows):
    x = torch.randn(40, 2, generator=torch.Generator().manual_seed(0)).sign()
    classes = (x[:, 0] > 0).long()
    targets = classes if follows else nn.functional.one_hot(classes, 2).float()
    model, run = nn.Linear(2, 2, bias=False), tmp_path / "run"
    with groktrace.watch(model, train=(x, targets), loss=loss, out=run, every=1) as recorder, torch.no_grad():
        for size in np.geomspace(0.1, 8.0, 12):  # margins that grow
            model.weight.copy_(size * torch.tensor([[-1.0, 0.0], [1.0, 0.0]]))
            recorder.step()
    found = groktrace.analyze(run, chains=2, burn_in=10, draws=20)
    assert found.follows_curvature is follows
    assert found.resolution == (100.0 if follows else 10.0)
    assert found.weight_decay is None


def test_losses_and_curvatures_are_measured_once_for_all_settings(small_run, evaluated):
    measured = evaluated["metrics"]
    first = groktrace.analyze(small_run, draws=20, burn_in=20)
    assert len(measured) == 6
    second = groktrace.analyze(small_run, draws=25, burn_in=20, chains=2)
    assert len(measured) == 6
    assert [point.train_loss for point in second] == [point.train_loss for point in first]
    groktrace.analyze(small_run, draws=20, burn_in=20, parameters=["0.weight"])  # other weights, another curvature
    assert len(measured) == 12
