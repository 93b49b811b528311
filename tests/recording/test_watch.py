import copy
import errno
import gc
import json
import pickle
import tempfile
import threading
import time
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import nn

from groktrace.errors import GroktraceError
from groktrace.recording import writer as writer_module
from groktrace.recording.termination import close_all, open_recorders
from groktrace.recording.watch import watch
from groktrace.run import files, layout
from groktrace.run.store import open_run


def steps_of(recorder):
    return layout.snapshot_steps(recorder.out)


def test_the_plain_loop(training, tmp_path):
    recorder = watch(training.model, training.optimizer, **training.data, out=tmp_path / "run", every=10)
    training.update(20)
    expected = {name: value.clone() for name, value in training.model.state_dict().items()}
    training.update(5)
    assert recorder.steps == 25
    recorder.close()
    recorder.close()
    assert recorder.out == tmp_path / "run"
    run = open_run(recorder.out)
    assert [snapshot.step for snapshot in run.snapshots] == [0, 10, 20, 25]
    weights = run.snapshots[2].load()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    size = sum(snapshot.path.stat().st_size for snapshot in run.snapshots)
    assert f"closed: 25 steps, 4 snapshots, {size} bytes, training blocked 0." in repr(recorder)


def test_the_last_step_is_kept_once(training, tmp_path):
    with watch(training.model, training.optimizer, out=tmp_path / "run", every=5) as recorder:
        assert "open: 0 steps" in repr(recorder)
        training.update(10)
    assert steps_of(recorder) == [0, 5, 10]
    training.update(5)  # nobody counts any more
    assert recorder.steps == 10
    assert steps_of(recorder) == [0, 5, 10]


def test_without_updates_the_first_step_is_kept(training, tmp_path):
    watch(training.model, training.optimizer, out=tmp_path / "run").close()
    assert layout.snapshot_steps(tmp_path / "run") == [0]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("log", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]),
        ([3, 7], [0, 3, 7, 12]),
        (lambda step: step == 4, [0, 4, 12]),
    ],
    ids=["log", "steps", "function"],
)
def test_schedules(training, tmp_path, schedule, expected):
    with watch(training.model, training.optimizer, out=tmp_path / "run", schedule=schedule) as recorder:
        training.update(12)
    assert steps_of(recorder) == expected


def test_loops_without_an_optimizer(training, tmp_path):
    with watch(training.model, out=tmp_path / "run", every=2) as recorder:
        for _ in range(5):
            training.update()
            recorder.step()
    assert steps_of(recorder) == [0, 2, 4, 5]


def test_step_besides_an_optimizer_is_told_and_not_counted(training, tmp_path):
    with watch(training.model, training.optimizer, out=tmp_path / "run") as recorder:
        training.update()
        with pytest.warns(RuntimeWarning, match="does nothing where an optimizer's updates are"):
            recorder.step()
        recorder.step()
        assert recorder.steps == 1


def test_an_optimizer_that_does_not_train_is_told(training, tmp_path):
    idle = torch.optim.SGD(training.model.parameters(), lr=1.0)
    recorder = watch(training.model, idle, out=tmp_path / "run")
    with torch.no_grad():
        training.model[2].bias.add_(1.0)
    with pytest.warns(RuntimeWarning, match="the weights changed, but no update was seen"):
        recorder.close()
    assert steps_of(recorder) == [0]


def test_logged_metrics_go_with_the_next_snapshot(training, tmp_path):
    with watch(training.model, training.optimizer, out=tmp_path / "run", every=2) as recorder:
        training.update()
        recorder.log(loss=torch.tensor(0.5), rate=1)
        recorder.log(rate=2)
        training.update()
        with pytest.warns(RuntimeWarning, match="log: 'phase' is left out.*could not convert string"):
            recorder.log(phase="warm-up", rate=3, worst=float("nan"))
        recorder.log(phase="later", many=torch.zeros(1))
        training.update()
        recorder.log(phase=None)
    first, second, third = (snapshot.metrics() for snapshot in open_run(recorder.out).snapshots)
    assert (first, second) == ({}, {"loss": 0.5, "rate": 2.0})
    assert third.keys() == {"rate", "worst", "many"}
    assert third["rate"] == 3.0


def test_a_snapshot_is_of_one_moment(training, tmp_path, monkeypatch):
    gate, write = threading.Event(), files.write_tensors
    monkeypatch.setattr(files, "write_tensors", lambda *args: gate.wait(10) and write(*args))
    before = {name: value.clone() for name, value in training.model.state_dict().items()}
    with watch(training.model, out=tmp_path / "run") as recorder:
        with torch.no_grad():
            for parameter in training.model.parameters():
                parameter.fill_(7)
        gate.set()
        recorder.step()
    first, last = (snapshot.load() for snapshot in open_run(recorder.out).snapshots)
    assert all(torch.equal(first[name], before[name]) for name in before)
    assert all((value == 7).all() for value in last.values())


def test_a_full_disk_is_told_once_and_later_snapshots_are_written(training, tmp_path, monkeypatch):
    write, full = files.write_tensors, [False]

    def write_or_fail(*args):
        if full[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(*args)

    monkeypatch.setattr(files, "write_tensors", write_or_fail)
    recorder = watch(training.model, training.optimizer, out=tmp_path / "run", every=1)

    def train():
        recorder.flush()
        full[0] = True
        training.update(3)
        recorder.flush()
        full[0] = False
        training.update(2)
        recorder.close()

    with pytest.warns(RuntimeWarning) as caught:
        train()
    assert len(caught) == 1
    assert "OSError: [Errno 28] No space left on device" in str(caught[0].message)
    assert recorder.steps == 5
    assert steps_of(recorder) == [0, 4, 5]


def test_a_slow_disk_makes_training_wait_and_is_told_once(training, tmp_path, monkeypatch):
    write = files.write_tensors
    monkeypatch.setattr(files, "write_tensors", lambda *args: time.sleep(0.05) or write(*args))
    monkeypatch.setattr(writer_module, "SILENT_WAIT", 0.07)
    monkeypatch.setattr(writer_module, "QUEUE_BYTES", 0)  # so that every snapshot is large
    recorder = watch(training.model, training.optimizer, out=tmp_path / "run", every=1)
    with pytest.warns(RuntimeWarning, match=r"training waits for snapshots to be written .* 0\.\d s so far") as caught:
        training.update(6)
    recorder.close()
    assert len(caught) == 1
    assert steps_of(recorder) == [0, 1, 2, 3, 4, 5, 6]
    assert recorder._blocked > 0.2


def test_copies_of_an_optimizer_are_not_counted_and_loading_its_state_changes_nothing(training, tmp_path):
    with watch(training.model, training.optimizer, out=tmp_path / "run", every=1) as recorder:
        training.update()
        other = copy.deepcopy(training.optimizer)
        other.step()
        pickle.loads(pickle.dumps(training.optimizer)).step()
        copy.deepcopy(training.model)
        training.optimizer.load_state_dict(other.state_dict())
        training.update()
    assert recorder.steps == 2


def test_the_last_step_is_tried_again_on_close(training, tmp_path, monkeypatch):
    recorder = watch(training.model, training.optimizer, out=tmp_path / "run", every=1)
    recorder.flush()
    with monkeypatch.context() as patch:
        patch.setattr(files, "save", lambda *_: 1 / 0)
        training.update()
        recorder.flush()
    with pytest.warns(RuntimeWarning, match="ZeroDivisionError"):
        recorder.close()
    assert steps_of(recorder) == [0, 1]


def test_an_interrupted_close_is_made_up_for_at_exit(training, tmp_path, monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    threads = set(threading.enumerate())
    recorder = watch(training.model, training.optimizer, out=tmp_path / "run")
    training.update(3)
    with monkeypatch.context() as patch:
        patch.setattr(recorder._capture, "copy", interrupt)
        with pytest.raises(KeyboardInterrupt):
            recorder.close()
    assert recorder in open_recorders
    close_all()
    assert steps_of(recorder) == [0, 3]
    assert recorder not in open_recorders
    assert set(threading.enumerate()) <= threads


def test_our_errors_do_not_reach_the_training(training, tmp_path):
    def schedule(step):
        return step == 4 or 1 / (step - 2)

    with watch(training.model, training.optimizer, out=tmp_path / "run", schedule=schedule) as recorder:
        with pytest.warns(RuntimeWarning, match=r"ZeroDivisionError: division by zero.*training goes on"):
            training.update(3)
        training.update(2)
    assert steps_of(recorder) == [0, 1, 3, 4, 5]


def test_warnings_that_are_errors_do_not_reach_the_training(training, tmp_path, capsys):
    with watch(training.model, training.optimizer, out=tmp_path / "run", schedule=lambda step: 1 / 0):
        training.update(3)
    assert capsys.readouterr().err.count("ZeroDivisionError") == 1


@pytest.mark.parametrize("fused", [True, False])
def test_skipped_updates_do_not_count(make_training, tmp_path, fused):
    training = make_training(torch.optim.AdamW, fused=fused)
    scaler = torch.amp.GradScaler("cpu")
    with watch(training.model, training.optimizer, out=tmp_path / "run", every=2) as recorder:
        for update in range(9):
            training.optimizer.zero_grad()
            loss = nn.functional.mse_loss(training.model(training.x), training.y)
            scaler.scale(loss * (float("inf") if update in (1, 2, 6) else 1.0)).backward()
            scaler.step(training.optimizer)
            scaler.update()
        assert recorder.steps == 6
    assert steps_of(recorder) == [0, 2, 4, 6]


@given(st.lists(st.booleans(), max_size=15), st.integers(1, 5))
@hypothesis_settings(max_examples=25, deadline=None)
def test_a_count_that_is_set_right_late_misses_no_snapshot(skipped, every):
    weight = nn.Linear(1, 1, bias=False)
    truth = 0
    with tempfile.TemporaryDirectory() as folder:
        with watch(weight, out=folder, every=every) as recorder:
            for skip in skipped:
                truth += not skip
                nn.init.constant_(weight.weight, truth)
                recorder._update(torch.tensor(float(skip)))
            nn.init.constant_(weight.weight, truth)
            assert recorder.steps == truth
        kept = {snapshot.step: snapshot.load() for snapshot in open_run(folder).snapshots if snapshot.step}
    assert kept.keys() == ({*range(every, truth + 1, every), truth} - {0})
    assert all(tensors["weight"] == step for step, tensors in kept.items())


def test_accumulated_gradients_are_one_update(training, tmp_path):
    with watch(training.model, training.optimizer, out=tmp_path / "run", every=1) as recorder:
        for micro in range(8):
            training.model(training.x).square().mean().backward()
            if micro % 4 == 3:
                training.optimizer.step()
    assert steps_of(recorder) == [0, 1, 2]


def test_wrapped_optimizer_and_compiled_model(training, tmp_path):
    wrapper = type("Wrapper", (), {"optimizer": training.optimizer})()
    compiled = torch.compile(training.model, backend="eager")
    with watch(nn.DataParallel(compiled), wrapper, **training.data, out=tmp_path / "run") as recorder:
        training.update()
    weights = open_run(recorder.out).snapshots[-1].load()
    assert all(torch.equal(weights[name], value) for name, value in training.model.state_dict().items())


def test_the_model_is_free_after_close(training, tmp_path):
    recorder = watch(training.model, training.optimizer, **training.data, out=tmp_path / "run")
    training.update()
    assert recorder in open_recorders
    recorder.close()
    assert recorder not in open_recorders
    model, weight = weakref.ref(training.model), weakref.ref(training.model[0].weight)
    training.model = training.optimizer = None
    gc.collect()
    assert model() is None
    assert weight() is None


def test_of_several_processes_the_first_writes(training, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    with watch(training.model, training.optimizer, **training.data, out=tmp_path / "run", every=1) as recorder:
        training.update(2)
    assert "2 steps; another process" in repr(recorder)
    assert not (tmp_path / "run").exists()


@pytest.fixture
def wrong(training, tmp_path):
    other = nn.Linear(1, 1)
    return {
        "every": ({"every": 0}, "every: expected a whole number"),
        "schedule": ({"schedule": "weekly"}, "schedule: expected 'log'"),
        "both schedules": ({"every": 3, "schedule": "log"}, "every, schedule: give one"),
        "loss name": ({"loss": "hinge"}, "one of cross_entropy, mse, got 'hinge'"),
        "lengths": ({"train": (training.x, training.y[:3])}, r"equally many samples, got \[6, 3\]"),
        "two losses": ({"batch_loss": lambda model, batch: 0}, "exactly one of loss="),
        "no loss": ({"loss": None}, "exactly one of loss="),
        "no train": ({"train": None}, "loss: of no use without train"),
        "loss fails": ({"train": (training.y, training.y)}, "fail on the training data"),
        "not a model": ({"model": lambda x: x}, "model: expected a torch.nn.Module, got function"),
        "no parameters": ({"model": nn.ReLU()}, "model: expected a network with parameters"),
        "wrong optimizer": ({"optimizer": torch.optim.SGD(other.parameters())}, "holds none of the model's"),
        "not an optimizer": ({"optimizer": 3}, "optimizer: expected a torch.optim.Optimizer"),
        "task": ({"task": "module.factory"}, "task: expected 'package.module:factory'"),
        "task type": ({"task": print}, "task: expected 'package.module:factory'"),
        "out type": ({"out": 7}, "out: expected the path of a folder"),
        "out is a file": ({"out": tmp_path / "file"}, "is a file"),
        "out below a file": ({"out": tmp_path / "file" / "run"}, "is a file"),
        "n": ({"n": 0}, "n: expected a whole number"),
        "n too small": ({"n": 5}, "n: expected .* at least the 6 that it holds, got 5"),
        "n alone": ({"train": None, "loss": None, "n": 5}, "n: of no use without train"),
        "start": ({"start_step": -1}, "start_step: expected a whole number"),
        "seed": ({"seed": 0.5}, "seed: expected a whole number"),
        "data type": (
            {"train": (training.x, training.y.to(torch.float8_e4m3fnuz)), "loss": lambda a, b: a.sum()},
            "stored",
        ),
    }


@pytest.mark.parametrize(
    "case",
    [
        *("every", "schedule", "both schedules", "loss name", "lengths", "two losses", "no loss", "no train"),
        *("loss fails", "not a model", "no parameters", "wrong optimizer", "not an optimizer", "task", "task type"),
        *("out type", "out is a file", "out below a file", "start", "seed", "data type"),
        *("n", "n too small", "n alone"),
    ],
)
def test_wrong_arguments(training, tmp_path, wrong, case):
    (tmp_path / "file").touch()
    changes, message = wrong[case]
    arguments = {"model": training.model, "optimizer": training.optimizer, **training.data, "out": tmp_path / "run"}
    with pytest.raises(GroktraceError, match=message):
        watch(**(arguments | changes))
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
    assert not training.optimizer._optimizer_step_post_hooks


def test_out_that_cannot_be_written(training, tmp_path, monkeypatch):
    def refuse(path, data):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(files, "write_file", refuse)
    with pytest.raises(GroktraceError, match=r"cannot be written \(Permission denied\)"):
        watch(training.model, training.optimizer, out=tmp_path / "run")


def test_failed_tracing_is_told_and_weights_are_kept(training, tmp_path, program):
    program.failure = ValueError("a branch\ndepends on data")
    with pytest.warns(RuntimeWarning, match=r"--task mine.tasks:make`, a function .* \(a branch depends on data\)\.$"):
        recorder = watch(
            training.model, training.optimizer, **training.data, task="mine.tasks:make", out=tmp_path / "run"
        )
    training.update()
    recorder.close()
    assert steps_of(recorder) == [0, 1]
    assert not (recorder.out / layout.PROGRAM_FILE).exists()
    assert json.loads((recorder.out / layout.RUN_FILE).read_text())["task"] == "mine.tasks:make"


def test_one_training_into_two_folders(training, tmp_path):
    first = watch(training.model, training.optimizer, out=tmp_path / "a", every=1)
    with watch(training.model, training.optimizer, out=tmp_path / "b", every=1) as second:
        training.update(2)
    first.close()
    assert first.steps == second.steps == 2


def specs_of(root):
    return open_run(root).specs


def test_what_trains_is_followed(training, tmp_path):
    training.model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(training.model[2].parameters(), lr=0.1)
    training.optimizer = optimizer
    with watch(training.model, optimizer, **training.data, out=tmp_path / "run", every=2) as recorder:
        training.update(4)
        recorder.flush()
        assert not specs_of(tmp_path / "run")["0.weight"].trainable
        training.model[0].requires_grad_(True)
        optimizer.add_param_group({"params": list(training.model[0].parameters())})
        training.update(1)
        before = training.model[0].weight.detach().clone()
        training.update(1)
    specs = specs_of(tmp_path / "run")
    assert all(spec.trainable for spec in specs.values())
    assert {name: spec.trainable_from for name, spec in specs.items()} == {
        "0.weight": 6,
        "0.bias": 6,
        "2.weight": 0,
        "2.bias": 0,
    }
    run = open_run(tmp_path / "run")
    weights = {snapshot.step: snapshot.load()["0.weight"] for snapshot in run.snapshots}
    assert torch.equal(weights[0], weights[4])
    assert torch.equal(weights[6], training.model[0].weight)
    assert not torch.equal(weights[6], before)


def test_a_change_that_was_seen_late_is_told_with_the_steps(training, tmp_path):
    training.model.append(nn.Linear(2, 20_000))
    training.model[3].requires_grad_(False)
    recorder = watch(training.model, training.optimizer, out=tmp_path / "run", every=1)
    training.model[3].weight.data.view(-1)[1] += 1  # none of those that are looked at each time
    recorder._update(None)
    with pytest.warns(
        RuntimeWarning, match=r"'3.weight'; snapshots after step 0, up to step 1, may hold older"
    ) as told:
        recorder._update(None)
    recorder.close()
    assert len(told) == 1
    values = [snapshot.load()["3.weight"].view(-1)[1] for snapshot in open_run(tmp_path / "run").snapshots]
    assert values[2] == values[0] + 1


def test_numbers_in_one_memory_are_recorded_as_they_are(training, tmp_path):
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = nn.Parameter(model[0].weight.t())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer, out=tmp_path / "run", every=1):
        for _ in range(3):
            optimizer.zero_grad()
            model(training.x).square().sum().backward()
            optimizer.step()
    last = open_run(tmp_path / "run").snapshots[-1].load()
    assert torch.equal(last["1.weight"], model[0].weight.t())
    model.load_state_dict(last)


class Temperature(nn.Module):
    """A loss with a trained number, and one that it counts with."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2))
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, outputs, targets):
        if self.training:
            self.calls += 1
        return ((outputs - targets) * self.scale).square().mean() + (self.scale - 2).square().sum() + 0 * self.calls


def test_weights_of_the_loss_are_recorded_beside_the_models(training, tmp_path):
    criterion = Temperature()
    optimizer = torch.optim.SGD([*training.model.parameters(), *criterion.parameters()], lr=0.1)
    data = {"train": (training.x, training.y), "loss": criterion}
    with watch(training.model, optimizer, **data, out=tmp_path / "run", every=1):
        assert criterion.calls == 0
        for _ in range(3):
            optimizer.zero_grad()
            criterion(training.model(training.x), training.y).backward()
            optimizer.step()
    run = open_run(tmp_path / "run")
    assert {name: spec.trainable for name, spec in run.specs.items() if spec.loss} == {
        "loss.scale": True,
        "loss.calls": False,
    }
    last = run.snapshots[-1].load(with_loss=True)
    assert torch.equal(last["loss.scale"], criterion.scale)
    assert last["loss.calls"] == 3
    assert run.snapshots[0].load(with_loss=True)["loss.calls"] == 0
    training.model.load_state_dict(run.snapshots[0].load())


def test_a_loss_that_another_optimizer_trains(training, tmp_path, capsys):
    criterion = Temperature()
    other = torch.optim.SGD(criterion.parameters(), lr=0.1)
    data = {"train": (training.x, training.y), "loss": criterion}
    with watch(training.model, training.optimizer, **data, out=tmp_path / "run", every=2) as recorder:
        recorder.flush()
        assert not specs_of(tmp_path / "run")["loss.scale"].trainable
        for _ in range(4):
            training.optimizer.zero_grad()
            other.zero_grad()
            criterion(training.model(training.x), training.y).backward()
            other.step()
            training.optimizer.step()
    spec = specs_of(tmp_path / "run")["loss.scale"]
    assert (spec.trainable, spec.trainable_from) == (True, 2)
    assert "another optimizer trains 'loss.scale' of the loss" in capsys.readouterr().err


def test_weights_that_are_projected_after_updates_are_kept_where_steps_are_counted_after_that(tmp_path):
    torch.manual_seed(0)
    model, x = nn.Linear(3, 2), torch.randn(20, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with watch(model, train=(x, x[:, :2]), loss="mse", out=tmp_path / "run", every=10) as recorder:
        for step in range(1, 21):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), x[:, :2]).backward()
            optimizer.step()
            with torch.no_grad():
                model.weight.div_(10 * model.weight.norm())
            recorder.step()
            if step == 10:
                kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    snapshots = {snapshot.step: snapshot.load() for snapshot in open_run(tmp_path / "run").snapshots}
    assert all(torch.equal(snapshots[10][name], tensor) for name, tensor in kept.items())
    assert all(torch.equal(snapshots[20][name], tensor) for name, tensor in model.state_dict().items())
