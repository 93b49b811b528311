"""Runs at URLs: in memory, and on an S3 server of the test's own."""

import json
import os
import re

import fsspec
import pytest
import torch
from click.testing import CliRunner
from torch import nn
from torch.nn import functional as F  # noqa: N812

import groktrace
from groktrace.cli import main
from groktrace.reporting.csv import as_csv
from groktrace.run import layout
from groktrace.run.remote import Remote

FEW = {"chains": 1, "burn_in": 4, "draws": 8}


@pytest.fixture(scope="module")
def bucket():
    """A bucket of a server on this machine; the environment says where it is."""
    server_module = pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    server = server_module.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_DEFAULT_REGION": "us-east-1",
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        fsspec.filesystem("s3").mkdir("runs")
        yield "s3://runs"
    server.stop()


@pytest.fixture(params=["memory", "s3"])
def url(request):
    """Where a run may go."""
    base = "memory://runs" if request.param == "memory" else request.getfixturevalue("bucket")
    yield f"{base}/first"
    files, root = fsspec.core.url_to_fs(f"{base}/first")
    if files.exists(root):
        files.rm(root, recursive=True)


class Training:
    def __init__(self):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
        self.model[0].bias.requires_grad_(False)
        self.optimizer = torch.optim.Adam([p for p in self.model.parameters() if p.requires_grad], lr=0.01)
        self.x, self.y = torch.randn(24, 4), torch.randint(0, 3, (24,))

    def record(self, out, updates, **more):
        about = {"train": (self.x, self.y), "loss": "cross_entropy", "every": 2, **more}
        with groktrace.watch(self.model, self.optimizer, **about, out=out) as recorder:
            for _ in range(updates):
                self.optimizer.zero_grad()
                F.cross_entropy(self.model(self.x), self.y).backward()
                self.optimizer.step()
        return recorder


def names(url):
    files, root = fsspec.core.url_to_fs(url)
    files.invalidate_cache()
    return {name.removeprefix(root).lstrip("/") for name in files.find(root)}


def test_recording_resuming_and_analysing(url):
    training = Training()
    recorder = training.record(url, 4)
    assert re.search(r" 3 snapshots, [1-9]\d* bytes", repr(recorder))
    assert url in repr(recorder)
    assert not recorder._root.exists()
    weights = {f"weights/{step:012d}.safetensors" for step in (0, 2, 4)}
    assert names(url) == weights | {"run.json", "program.json", "data.safetensors", "frozen.safetensors"}
    with pytest.raises(groktrace.GroktraceError, match=rf"'{url}' holds a recording up to step 4\. To continue"):
        Training().record(url, 1, if_exists="error")
    training.record(url + "/", 3)
    run = groktrace.open_run(url)
    assert [snapshot.step for snapshot in run.snapshots] == [0, 2, 4, 6, 7]
    last, state = run.snapshots[-1].load(), training.model.state_dict()
    assert all(torch.equal(last[name], state[name]) for name in state)

    settings = ["--chains", "1", "--burn-in", "4", "--draws", "8"]
    first = CliRunner().invoke(main, ["analyze", url, "--json", *settings])
    assert first.exit_code in (0, 3), first.output
    assert json.loads(first.stdout)["run"] == url
    after = names(url)
    kept = {name.rpartition("/")[2].split("-")[0] for name in after if name.startswith("analysis/")}
    assert kept == {"settings.json", "metrics", "points.jsonl", "trajectory.json", "latest.json"}
    assert any(name.startswith("tensorboard/trajectory/events") for name in after)
    again = CliRunner().invoke(main, ["analyze", url, "--json", *settings])  # from the journal
    assert json.loads(again.stdout) == json.loads(first.stdout)
    assert len(names(url)) == len(after)  # the event files took the place of the first ones
    shown = CliRunner().invoke(main, ["show", url, "--json"])
    assert json.loads(shown.stdout)["trajectory"] == json.loads(first.stdout)["trajectory"]
    checked = CliRunner().invoke(main, ["check", url])
    assert "5 of 5 snapshots whole" in checked.stdout


def test_a_second_run_goes_beside_the_first_or_replaces_it(url, capsys):
    first = Training()
    first.record(url, 2)
    before = names(url)
    second, interrupted = Training().record(url, 1), Training()
    with torch.no_grad():
        interrupted.model[0].weight.mul_(2)
    interrupted.record(url, 3)
    assert (second.out, names(url)) == (f"{url}-2", before)
    assert f"'{url}' holds a recording up to step 2 and stays as it is" in capsys.readouterr().err
    interrupted.record(url, 1)  # its optimizer has made three updates
    assert [snapshot.step for snapshot in groktrace.open_run(f"{url}-3").snapshots] == [0, 2, 3, 4]
    first.record(url, 2)
    assert [snapshot.step for snapshot in groktrace.open_run(url).snapshots] == [0, 2, 4]
    analysed = CliRunner().invoke(main, ["analyze", url, "--chains", "1", "--burn-in", "4", "--draws", "8"])
    assert analysed.exit_code in (0, 3)
    Training().record(url, 1, if_exists="replace")
    assert names(url) == (before - {f"weights/{2:012d}.safetensors"}) | {f"weights/{1:012d}.safetensors"}
    files, root = fsspec.core.url_to_fs(url)
    for beside in ("-2", "-3"):
        files.rm(root + beside, recursive=True)


class Odd:
    """A reporter of one's own that writes where it likes."""

    def report(self, series, events, place):
        (place / "mine").mkdir(exist_ok=True)
        (place / "mine" / "report.txt").write_text(f"{len(series.steps)} {len(series.steps)}")


def test_what_reporters_write_goes_where_the_run_is(url):
    Training().record(url, 4)
    before = names(url)
    reporters = [groktrace.CsvReporter(), groktrace.TensorBoardReporter(), Odd()]
    found = groktrace.analyze(url, reporters=reporters, **FEW)
    first = {name for name in names(url) - before if not name.startswith("analysis/")}
    assert {"trajectory.csv", "mine/report.txt"} < first
    files, root = fsspec.core.url_to_fs(url)
    assert files.cat_file(f"{root}/trajectory.csv").decode() == as_csv(groktrace.Series.of(found))
    assert files.cat_file(f"{root}/mine/report.txt") == b"3 3"
    groktrace.analyze(url, reporters=reporters, **FEW)
    again = {name for name in names(url) - before if not name.startswith("analysis/")}
    assert len(again) == len(first)  # TensorBoard's took the place of the first
    assert again != first


def test_other_data_are_measured_there(url):
    training = Training()
    training.record(url, 4)
    other = torch.randn(30, 4), torch.randint(0, 3, (30,))
    reporters = [groktrace.CsvReporter(), groktrace.TensorBoardReporter()]
    found = groktrace.analyze(url, train=other, reporters=reporters, **FEW)
    first = names(url)
    assert not any(name.startswith("tensorboard/") for name in first)
    (folder,) = {name.split("/")[1] for name in first if name.endswith("/data.safetensors")}
    assert f"analysis/{folder}/trajectory.csv" in first
    groktrace.analyze(url, train=other, reporters=reporters, **FEW)
    assert len(names(url)) == len(first)  # TensorBoard's took the place of the first
    if url.startswith("s3"):  # which other processes see too
        by_workers = groktrace.analyze(url, train=other, jobs=2, seed=3, **FEW)
        assert (len(by_workers), by_workers.unsampled) == (len(found), 0)
    shown = [series.trajectory.points for _, series, _ in groktrace.compare(url, analyses=True).results]
    assert found.points in shown


def test_the_command_line_writes_its_table_there(url):
    Training().record(url, 4)
    settings = ["--chains", "1", "--burn-in", "4", "--draws", "8"]
    result = CliRunner().invoke(main, ["analyze", url, "--csv", *settings])
    assert result.exit_code in (0, 3), result.output
    (table,) = (name for name in names(url) if name.endswith(".csv"))
    assert f"table: {url}/{table}" in result.stderr
    assert table.startswith("analysis/")


def test_draws_are_kept_there_and_fetched_when_asked_for(url):
    Training().record(url, 4)
    kept = groktrace.analyze(url, keep="losses", **FEW)
    run = groktrace.open_run(url)
    (path,) = run.root.glob("analysis/*/draws/000000000002.safetensors")
    assert path.stat().st_size == 0
    found = run.draws(2)
    assert found.llc == pytest.approx(kept.points[1].llc)
    assert found.sample_losses.shape == (1, 8, 24)
    time = fsspec.core.url_to_fs(url)[0].modified(f"{url}/analysis/{path.parent.parent.name}/draws/{path.name}")
    assert groktrace.analyze(url, keep="losses", **FEW) == kept
    after = fsspec.core.url_to_fs(url)[0].modified(f"{url}/analysis/{path.parent.parent.name}/draws/{path.name}")
    assert after == time


def test_a_bucket_has_nothing_beside_it(bucket):
    files = fsspec.filesystem("s3")
    files.mkdir("alone")
    Training().record("s3://alone", 1)
    with pytest.raises(groktrace.GroktraceError, match=r"'s3://alone' holds a recording up to step 1\. To continue"):
        Training().record("s3://alone", 1)


def test_another_folder_is_left_alone(url):
    files, root = fsspec.core.url_to_fs(url)
    files.pipe_file(f"{root}/thesis.tex", b"x")
    with pytest.raises(groktrace.GroktraceError, match="holds files, but is not a groktrace run"):
        Training().record(url, 1)
    assert names(url) == {"thesis.tex"}


def test_an_upload_that_fails_is_made_up_for(url, monkeypatch):
    training, upload = Training(), Remote.retry
    recorder = groktrace.watch(training.model, training.optimizer, out=url, every=1)
    recorder.flush()
    with monkeypatch.context() as patch:
        patch.setattr(Remote, "retry", lambda self, forget=False: 1 / 0)
        training.optimizer.step()
        recorder.flush()
        assert names(url) & {f"weights/{1:012d}.safetensors"} == set()
    with pytest.warns(RuntimeWarning, match="ZeroDivisionError"):
        training.optimizer.step()
    recorder.close()
    assert upload is Remote.retry
    assert [snapshot.step for snapshot in groktrace.open_run(url).snapshots] == [0, 1, 2]
    assert groktrace.open_run(url).snapshots[1].load()


def test_what_cannot_be_sent_stays_here(monkeypatch, tmp_path):
    training = Training()
    recorder = groktrace.watch(training.model, training.optimizer, out="memory://runs/lost", every=1)
    recorder.flush()
    monkeypatch.setattr(fsspec.get_filesystem_class("memory"), "put_file", lambda *_: 1 / 0)
    training.optimizer.step()
    with pytest.warns(RuntimeWarning) as caught:
        recorder.close()
    assert "ZeroDivisionError" in str(caught[0].message)
    assert f"what could not be sent to 'memory://runs/lost' is in '{recorder._root}'" in str(caught[1].message)
    left = layout.snapshot_path(recorder._root, 1)
    assert left.stat().st_size > 0
    monkeypatch.undo()
    for path in sorted(recorder._root.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    os.rmdir(recorder._root)


@pytest.mark.parametrize("place", ["nothing://runs/x", "s3x:"])
def test_a_place_that_cannot_be_reached_is_named(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "://" in place:
        with pytest.raises(groktrace.GroktraceError, match=r"out: cannot be reached \(nothing://runs/x: ValueError"):
            Training().record(place, 1)
    with pytest.raises(groktrace.GroktraceError, match=r"cannot be read|no such directory"):
        groktrace.open_run(place)


def test_a_run_that_is_not_there_is_named():
    with pytest.raises(groktrace.GroktraceError, match=r"memory://runs/none: holds no run\.json"):
        groktrace.open_run("memory://runs/none")
