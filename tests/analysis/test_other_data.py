"""λ of the same snapshots on other data."""

import json
import math
import shutil

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import groktrace
from groktrace.analysis.results.store import all_results
from groktrace.cli import main
from groktrace.errors import RunError, SettingsError, TaskError

FAST = {"draws": 20, "burn_in": 20}
OPTIONS = ("--draws", 20, "--burn-in", 20, "--threads", 1)


def invoke(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def other():
    generator = torch.Generator().manual_seed(5)
    return torch.randn(90, 4, generator=generator), torch.randint(0, 3, (90,), generator=generator)


def folders(run):
    return {path.parent.name: path for path in run.glob("analysis/*/trajectory.json")}


def test_the_runs_own_data_give_its_own_numbers_under_another_name(small_run):
    own = groktrace.analyze(small_run, **FAST)
    again = groktrace.analyze(small_run, train=small_run / "data.safetensors", **FAST)
    assert again.points == own.points
    assert (own.data, again.data.name, again.data.own_scale) == (None, "data.safetensors", True)
    assert len(folders(small_run)) == 2


def test_nbeta_and_localization_are_the_runs_own_where_it_was_analysed(small_run, other):
    alone = groktrace.analyze(shutil.copytree(small_run, small_run.parent / "copy"), train=other, **FAST)
    own = groktrace.analyze(small_run, **FAST)
    beside = groktrace.analyze(small_run, train=other, **FAST)
    assert (beside.nbeta, beside.localization) == (own.nbeta, own.localization) != (alone.nbeta, alone.localization)
    assert (alone.data.own_scale, beside.data.own_scale) == (False, True)
    assert (beside.n, own.n, groktrace.analyze(small_run, train=other, n=500, **FAST).n) == (90, 60, 500)
    assert [p.llc for p in beside] != [p.llc for p in own]
    assert [p.val_loss for p in beside] == [p.val_loss for p in own]
    given = groktrace.analyze(small_run, train=other, nbeta=7.0, localization=2.0, **FAST)
    assert (given.nbeta, given.localization, given.data.own_scale) == (7.0, 2.0, None)
    assert groktrace.analyze(small_run, nbeta="wbic", **FAST).nbeta == pytest.approx(60 / math.log(60))
    wbic = groktrace.analyze(small_run, train=other, n=500, nbeta="wbic", **FAST)
    assert (wbic.nbeta, wbic.data.own_scale) == (pytest.approx(500 / math.log(500)), False)
    assert groktrace.analyze(small_run, **FAST) == own  # it goes on from its own results


def test_lambda_is_that_of_the_other_loss(tmp_path):
    """A linear network's λ is ½Σ nβh/(nβh + γ) over the curvatures of the data that it is measured on."""
    generator = torch.Generator().manual_seed(2)
    x, z = torch.randn(50, 6, generator=generator), torch.randn(80, 6, generator=generator) * torch.logspace(0, -2, 6)
    model = nn.Linear(6, 1, bias=False)
    with groktrace.watch(model, train=(x, x[:, :1]), loss="mse", out=tmp_path / "run", every=1) as recorder:
        with torch.no_grad():
            model.weight.copy_(torch.eye(6)[:1])
        recorder.step()
    options = {"nbeta": 50.0, "localization": 5.0, "rtol": 0.01}
    for inputs, data in ((x, None), (z, (z, z[:, :1]))):
        last = groktrace.analyze(tmp_path / "run", train=data, **options).points[-1]
        curvatures = torch.linalg.eigvalsh(2 * inputs.T @ inputs / len(inputs))
        exact = float(0.5 * (50 * curvatures / (50 * curvatures + 5)).sum())
        assert last.llc == pytest.approx(exact, abs=4 * last.stderr + 1e-3)
        assert last.stderr < 0.03 * exact


def test_an_analysis_goes_on_where_it_was_interrupted(small_run, other, monkeypatch):
    whole = groktrace.analyze(shutil.copytree(small_run, small_run.parent / "copy"), train=other, **FAST)
    partial = groktrace.analyze(small_run, train=other, time_limit=1e-9, **FAST)
    assert partial.unsampled == 6
    assert groktrace.analyze(small_run, train=other, **FAST).points == whole.points
    monkeypatch.setattr("groktrace.analysis.measurement.measure.Objective.estimate", None)  # all of it is known by now
    assert groktrace.analyze(small_run, train=other, **FAST).points == whole.points
    (folder,) = folders(small_run)
    kept = small_run / "analysis" / folder / "data.safetensors"
    assert groktrace.analyze(small_run, train=kept, **FAST).points == whole.points  # by content, not by name


def test_workers_read_the_samples_from_the_run(small_run, other):
    own = groktrace.analyze(shutil.copytree(small_run, small_run.parent / "copy"), train=other, **FAST)
    assert groktrace.analyze(small_run, train=other, jobs=2, **FAST).points == own.points


def test_a_task_that_is_given_is_measured_on_them(small_run, other):
    run = groktrace.open_run(small_run)
    network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    task = groktrace.Task.from_model(network, loss="cross_entropy")
    by_task = groktrace.analyze(run, task=task, train=other, **FAST)
    by_program = groktrace.analyze(run, train=other, **FAST)
    assert [p.train_loss for p in by_task] == pytest.approx([p.train_loss for p in by_program], rel=1e-5)
    own = groktrace.Task.from_model(network, loss="cross_entropy", train=(other[0][:9], other[1][:9]))
    assert groktrace.analyze(run, task=own, train=other, **FAST).n == 90
    for name in ("data.safetensors", "program.json"):
        (small_run / name).unlink()
    bare = groktrace.open_run(small_run)
    found = groktrace.analyze(bare, task=task, train=other, **FAST)
    assert [p.train_loss for p in found] == pytest.approx([p.train_loss for p in by_program], rel=1e-5)
    assert found.data.own_scale is False
    with pytest.raises(TaskError, match="no model and loss to evaluate"):
        groktrace.analyze(bare, train=other, **FAST)


def test_wrong_data_are_refused_before_anything_is_written(small_run, other):
    x, y = other
    with pytest.raises(TaskError, match=r"train: tensor 0 is float64\[samples, 4\], but that of the recorded"):
        groktrace.analyze(small_run, train=(x.double(), y), **FAST)
    with pytest.raises(SettingsError, match="n: says how many samples train= stands for; give both, or neither"):
        groktrace.analyze(small_run, n=5, **FAST)
    with pytest.raises(SettingsError, match="n: expected a whole number of at least 90"):
        groktrace.analyze(small_run, train=other, n=5, **FAST)
    assert not (small_run / "analysis").exists()


def test_the_command_line_shows_both_side_by_side(small_run, other, tmp_path):
    file = tmp_path / "new.safetensors"
    groktrace.save_data(file, other)
    assert invoke("analyze", small_run, *OPTIONS).exit_code in (0, 3)
    result = invoke("analyze", small_run, "--data", file, *OPTIONS)
    said = (
        "Measured on new.safetensors, not on the run's training samples; nβ and γ are those of the run's own analysis"
    )
    assert said in result.stdout
    assert said in invoke("show", small_run).stdout
    shown = json.loads(invoke("show", small_run, "--json").stdout)
    assert (shown["data"]["name"], shown["n"]) == ("new.safetensors", 90)
    assert (small_run / "tensorboard").exists()  # of the run's own data, as it was
    events = [path.parts for path in small_run.rglob("*.groktrace")]
    assert {"tensorboard", "tensorboard-new"} <= {part for parts in events for part in parts}

    table = invoke("compare", small_run, "--analyses", "-o", tmp_path / "both.png")
    assert table.exit_code == 0, table.output
    names = [f"{small_run}: training data", f"{small_run}: new.safetensors"]
    found = json.loads(invoke("compare", small_run, "--analyses", "--json").stdout)["runs"]
    assert list(found) == names
    assert found[names[1]]["trajectory"] == shown["trajectory"]
    assert "different nβ" not in table.stdout
    invoke("analyze", small_run, "--parameters", "0.weight[0:2]", *OPTIONS)
    found = json.loads(invoke("compare", small_run, "--analyses", "--json").stdout)["runs"]
    assert f"{small_run}: training data, parameters 0.weight[0:2]" in found
    assert len(found) == 3
    bad = invoke("analyze", small_run, "--data", tmp_path / "none", *OPTIONS)
    assert (bad.exit_code, "Expected a file that groktrace.save_data" in bad.stderr) == (1, True)
    assert "--n: says how many samples those of --data stand for" in invoke("analyze", small_run, "--n", 3).stderr
    with pytest.raises(SettingsError, match="group_by: puts runs together by their settings"):
        groktrace.compare(small_run, group_by="n", analyses=True)


def test_comparing_runs_says_which_was_measured_on_what(small_run, other):
    copy = shutil.copytree(small_run, small_run.parent / "copy")
    groktrace.analyze(small_run, train=other, **FAST)
    groktrace.analyze(copy, **FAST)
    table = groktrace.compare(small_run, copy).table()
    assert f"Not measured on the run's training samples: {small_run} on other data (" in table


def test_reporters_write_beside_the_results_of_other_data(small_run, other):
    groktrace.analyze(small_run, reporters=[groktrace.CsvReporter()], **FAST)
    (own,) = small_run.glob("*.csv")
    before = own.read_bytes()
    groktrace.analyze(small_run, train=other, reporters=[groktrace.CsvReporter()], **FAST)
    assert own.read_bytes() == before
    assert len(list(small_run.glob("analysis/*/*.csv"))) == 1


def test_results_of_an_older_recording_are_not_shown(small_run, recorded):
    groktrace.analyze(small_run, **FAST)
    assert len(all_results(groktrace.open_run(small_run))) == 1
    for path in (small_run / "weights").iterdir():
        path.unlink()
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    with groktrace.watch(
        model,
        train=(torch.zeros(5, 4), torch.zeros(5, dtype=torch.long)),
        loss="cross_entropy",
        out=small_run,
        every=10,
    ) as recorder:
        for _ in range(50):
            recorder.step()
    with pytest.raises(RunError, match="not analysed yet"):
        all_results(groktrace.open_run(small_run))


def test_a_curve_over_temperatures_and_a_forecast_are_of_it_and_write_nothing(small_run, other):
    groktrace.save_data(small_run / "other.safetensors", other)
    own = groktrace.analyze(small_run, **FAST)
    before = sorted(small_run.rglob("*"))
    given = {"nbetas": [10.0, 20.0], **FAST}
    curve = groktrace.temperature_curve_at(small_run, 50, train=small_run / "other.safetensors", **given)
    assert curve.estimates == groktrace.temperature_curve_at(small_run, 50, train=other, **given).estimates
    assert [each.localization for each in curve.estimates] == [own.localization] * 2
    assert curve.estimates[0].llc != groktrace.temperature_curve_at(small_run, 50, **given).estimates[0].llc
    found = groktrace.forecast(small_run, train=other, **FAST)
    assert (found.snapshots, found.finished) == (6, 0)
    assert sorted(small_run.rglob("*")) == before
    groktrace.analyze(small_run, train=other, **FAST)
    assert groktrace.forecast(small_run, train=other, **FAST).finished == 6


def test_following_ends_with_what_analyze_finds(small_run, other):
    own = groktrace.analyze(small_run, **FAST)
    *events, end = groktrace.follow(small_run, train=other, n=500, **FAST)
    assert [event.step for event in events if isinstance(event, groktrace.Point)] == [0, 10, 20, 30, 40, 50]
    (scaled,) = (event for event in events if isinstance(event, groktrace.ScaleChanged))
    assert (scaled.nbeta, scaled.localization) == (own.nbeta, own.localization)  # known, so that each is sampled once
    assert end.trajectory == groktrace.analyze(small_run, train=other, n=500, **FAST)
    assert (end.trajectory.n, end.trajectory.data.own_scale) == (500, True)


@pytest.mark.parametrize("command", [("follow",), ("forecast",), ("temperature", "50")], ids=lambda words: words[0])
def test_other_commands_take_a_file_of_it(small_run, other, command):
    groktrace.save_data(small_run.parent / "other.safetensors", other)
    name, *more = command
    result = invoke(name, small_run, *more, "--json", "--data", small_run.parent / "other.safetensors", *OPTIONS)
    assert result.exit_code in (0, 3), result.output
    if name == "follow":
        assert json.loads(result.stdout.splitlines()[-1])["n"] == 90
        assert list(small_run.glob("analysis/*/tensorboard-other"))
    refused = invoke(name, small_run, *more, "--n", "9")
    assert refused.exit_code == 2
    assert "--n: says how many samples those of --data stand for" in refused.stderr
