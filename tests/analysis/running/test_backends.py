"""Many processes give what one gives, whatever happens to them."""

import importlib
import multiprocessing
import os
import shutil
import signal
import sys
from concurrent.futures import BrokenExecutor, Executor, Future, ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch

import groktrace
from groktrace.analysis.measurement import measure
from groktrace.analysis.running import backends
from groktrace.errors import RunError, SettingsError, TaskError
from groktrace.run import layout
from groktrace.run.factory import load_factory

FAST = {"draws": 20, "burn_in": 20}


@pytest.fixture
def in_pieces(monkeypatch):
    """Several pieces of work, also of a small run: stacks of one snapshot, on one thread as in each worker."""
    monkeypatch.setattr(measure, "rows_per_stack", lambda loss, batch_size=None: 1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def copy_of(run, tmp_path):
    return shutil.copytree(run, tmp_path / "other" / "run")


def test_jobs_give_what_one_process_gives_though_one_of_them_is_killed(small_run, tmp_path, in_pieces):
    other = copy_of(small_run, tmp_path)
    alone = groktrace.analyze(small_run, **FAST)
    killed = []

    def kill_one(phase, done, total):
        if phase == "sampling" and done == 1:
            killed.append(multiprocessing.active_children()[0])
            killed[0].kill()

    together = groktrace.analyze(other, **FAST, jobs=2, progress=kill_one)
    assert together.points == alone.points
    assert killed[0].exitcode == -signal.SIGKILL
    assert not multiprocessing.active_children()


def test_a_dask_cluster_gives_what_one_process_gives_though_a_worker_is_killed(small_run, tmp_path, in_pieces):
    distributed = pytest.importorskip("distributed")
    other = copy_of(small_run, tmp_path)
    alone = groktrace.analyze(small_run, **FAST)
    with distributed.LocalCluster(2, threads_per_worker=1, dashboard_address=None) as cluster:
        pids = process_ids(cluster)
        assert len(set(pids)) == 2

        def kill_one(phase, done, total):
            if phase == "sampling" and done == 1:
                os.kill(pids[0], signal.SIGKILL)

        with backends.dask_executor(cluster.scheduler_address) as executor:
            together = groktrace.analyze(other, **FAST, executor=executor, progress=kill_one)
        after = process_ids(cluster)
    assert together.points == alone.points
    assert pids[0] not in after


def process_ids(cluster):
    """Of the workers that there are."""
    import distributed

    with distributed.Client(cluster.scheduler_address, set_as_default=False) as client:
        return list(client.run(os.getpid).values())


def test_any_executor_will_do_and_damaged_snapshots_are_named(small_run, tmp_path, in_pieces):
    path = layout.snapshot_path(small_run, 20)
    path.write_bytes(path.read_bytes()[:-1])
    other = copy_of(small_run, tmp_path)
    with ThreadPoolExecutor(2) as executor:
        together = groktrace.analyze(small_run, **FAST, executor=executor)
    alone = groktrace.analyze(other, **FAST)
    assert together.points == alone.points
    assert [point.step for point in together.points] == [0, 10, 30, 40, 50]
    assert len(together.unreadable) == 1
    assert "000000000020.safetensors" in together.unreadable[0]


class Failing(Executor):
    """Fails in one way from some call on."""

    def __init__(self, failure, after):
        self.failure, self.after = failure, after

    def submit(self, function, *args):
        future = Future()
        self.after -= 1
        if self.after < 0:
            future.set_exception(self.failure)
        else:
            future.set_result(function(*args))
        return future


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (BrokenExecutor(), "workers end before they finish; out of memory"),
        (OSError("disk gone"), r"a worker failed at the snapshots of steps \d+ to \d+ \(OSError: disk gone\)"),
    ],
)
def test_what_was_finished_before_a_failure_is_kept(small_run, in_pieces, evaluated, failure, message):
    with pytest.raises(RunError, match=message):
        groktrace.analyze(small_run, **FAST, executor=Failing(failure, 6 + 2))
    evaluated.clear()
    groktrace.analyze(small_run, **FAST)
    assert len(evaluated["llc"]) == 4


def record(out, scale=1.0, rate=0.1):
    """A small regression; `scale` makes other data, `rate` other weights on the same data from the same start."""
    torch.manual_seed(0)
    x = torch.randn(40, 3)
    y = scale * x.sum(1, keepdim=True)
    model = torch.nn.Sequential(torch.nn.Linear(3, 6), torch.nn.Tanh(), torch.nn.Linear(6, 1))
    optimizer = torch.optim.SGD(model.parameters(), rate)
    with groktrace.watch(model, optimizer, train=(x, y), loss="mse", out=out, every=10):
        for _ in range(30):
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
    return out


@pytest.mark.parametrize("change", [{"scale": 3.0}, {"rate": 0.01}])
def test_workers_see_that_a_run_was_recorded_anew(tmp_path, in_pieces, change):
    given = {"nbeta": 100.0, "localization": 1.0, **FAST}
    place = record(tmp_path / "run")
    with ThreadPoolExecutor(1) as executor:
        before = groktrace.analyze(place, **given, executor=executor)
        shutil.rmtree(place)
        record(place, **change)
        found = groktrace.analyze(place, **given, executor=executor)
    shutil.rmtree(place / "analysis")
    assert found.points == groktrace.analyze(place, **given).points
    assert [point.train_loss for point in found.points] != [point.train_loss for point in before.points]


class SeesAnotherCopy(Executor):
    """Workers whose file system shows another folder under the run's path."""

    def __init__(self, run, copy):
        self.run, self.copy = run, copy

    def submit(self, function, *args):
        future = Future()
        hidden = self.run.rename(self.run.parent / "hidden")
        self.copy.rename(self.run)
        try:
            future.set_result(function(*args))
        except Exception as failure:
            future.set_exception(failure)
        self.run.rename(self.copy)
        hidden.rename(self.run)
        return future


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": 3.0}, "a worker finds other data or another program there than the process that asked; it may see"),
        ({"rate": 0.01}, r"the snapshot of step \d+ is not the one that was there when the analysis began"),
    ],
)
def test_workers_that_see_another_copy_of_the_run_refuse_to_work(tmp_path, in_pieces, change, message):
    run, copy = record(tmp_path / "run"), record(tmp_path / "copy", **change)
    (copy / "run.json").write_bytes((run / "run.json").read_bytes())
    with pytest.raises(RunError, match=message):
        groktrace.analyze(run, **FAST, executor=SeesAnotherCopy(run, copy))
    assert groktrace.analyze(run, **FAST, executor=ThreadPoolExecutor(1)).points


TASK = """
import torch, groktrace
from torch import nn
def make():
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 1))
    return groktrace.Task.from_model(model, loss={loss}{data})
"""


@pytest.mark.parametrize(
    ("asked", "found", "error", "message"),
    [
        ({"loss": "'mse'", "data": ""}, {"loss": "'mse'", "data": ""}, None, None),
        (
            {"loss": "'mse'", "data": ""},
            {"loss": "lambda o, t: 2 * (o - t).square().mean()", "data": ""},
            TaskError,
            "--task tasks_of_workers:make: computes another loss in a worker than in the process that asked",
        ),
        (
            {"loss": "'mse'", "data": ", train=(torch.ones(5, 3), torch.ones(5, 1))"},
            {"loss": "'mse'", "data": ", train=(torch.randn(5, 3), torch.randn(5, 1))"},
            RunError,
            "other data .*, or --task tasks_of_workers:make makes others at each call",
        ),
    ],
)
def test_workers_with_another_factory_refuse_to_work(
    tmp_path, in_pieces, monkeypatch, recwarn, asked, found, error, message
):
    run = record(tmp_path / "run")
    name, module = "tasks_of_workers:make", tmp_path / "tasks_of_workers.py"
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    module.write_text(TASK.format(**asked))
    task = load_factory(name)
    monkeypatch.delitem(sys.modules, "tasks_of_workers")
    module.write_text(TASK.format(**found))
    importlib.invalidate_caches()
    with ThreadPoolExecutor(1) as executor, pytest.raises(error, match=message) if error else nullcontext():
        together = groktrace.analyze(run, task=task, task_name=name, **FAST, executor=executor)
    if error is None:
        shutil.rmtree(run / "analysis")
        assert together.points == groktrace.analyze(run, task=task, **FAST).points
    monkeypatch.delitem(sys.modules, "tasks_of_workers", raising=False)


def test_what_cannot_be_asked_for_is_refused(small_run, monkeypatch):
    with pytest.raises(SettingsError, match="jobs: expected a whole number of at least 1, got 0"):
        groktrace.analyze(small_run, jobs=0)
    with pytest.raises(SettingsError, match="executor: takes the place of jobs"):
        groktrace.analyze(small_run, jobs=2, executor=Failing(OSError(), 0))
    task = groktrace.open_run(small_run).task
    with pytest.raises(SettingsError, match="other processes need its name"):
        groktrace.analyze(small_run, task=task, jobs=2)
    pytest.importorskip("distributed")
    monkeypatch.setattr(backends, "CONNECT_SECONDS", 1)
    with (
        pytest.raises(SettingsError, match=r"no scheduler answers at 'tcp://127\.0\.0\.1:9'"),
        backends.dask_executor("tcp://127.0.0.1:9"),
    ):
        pass
