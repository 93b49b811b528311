import json

import pytest
import torch
from torch import nn

import groktrace
from groktrace.importing import plan, write
from groktrace.run import files, layout


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def task(model=None, **more):
    x = torch.linspace(-1, 1, 24).reshape(8, 3)
    return groktrace.Task.from_model(model or network(), train=(x, x[:, :2]), loss="mse", **more)


@pytest.fixture
def folder(tmp_path):
    """Five checkpoints of a network whose weights grow."""
    (tmp_path / "saved").mkdir()
    for step in range(5):
        state = {name: tensor * (1 + step) for name, tensor in network().state_dict().items()}
        torch.save({"model": state, "step": step}, tmp_path / "saved" / f"{step}.pt")
    return tmp_path


def contents(root):
    return {path.name: path.read_bytes() for path in root.rglob("*") if path.is_file() and path.name != "run.json"}


def test_a_run_of_checkpoints(folder):
    seen = []
    run = groktrace.import_checkpoints(
        folder / "saved", task=task(), out=folder / "run", progress=lambda *a: seen.append(a)
    )
    assert [snapshot.step for snapshot in run.snapshots] == [0, 1, 2, 3, 4]
    assert torch.equal(run.snapshots[3].load()["0.weight"], network()[0].weight * 4)
    assert run.closed
    assert run.info["schedule"] == {"kind": "imported"}
    assert seen[0] == ("looking into checkpoints", 0, 5)
    assert seen[-1] == ("importing", 5, 5)
    assert groktrace.analyze(run, chains=1, burn_in=4, draws=8).points


def test_an_interrupted_import_goes_on(folder, monkeypatch):
    groktrace.import_checkpoints(folder / "saved", task=task(), out=folder / "whole")
    opened = []

    def interrupt(path):
        opened.append(path.name)
        if len(opened) == 8:  # five times to look, and then to read
            raise KeyboardInterrupt
        return real(path)

    real = write.open_checkpoint
    monkeypatch.setattr(plan, "open_checkpoint", interrupt)
    monkeypatch.setattr(write, "open_checkpoint", interrupt)
    with pytest.raises(KeyboardInterrupt):
        groktrace.import_checkpoints(folder / "saved", task=task(), out=folder / "run")
    assert layout.snapshot_steps(folder / "run") == [0, 1]
    assert not groktrace.open_run(folder / "run").closed
    (folder / "run" / ".tmp-run.json-1").touch()
    opened[:] = ["already"] * 10
    before = (folder / "run" / "weights" / "000000000001.safetensors").stat().st_mtime_ns
    run = groktrace.import_checkpoints(folder / "saved", task=task(), out=folder / "run")
    assert opened[15:] == ["2.pt", "3.pt", "4.pt"]
    assert (folder / "run" / "weights" / "000000000001.safetensors").stat().st_mtime_ns == before
    whole = groktrace.open_run(folder / "whole")
    assert [a.fingerprint() for a in run.snapshots] == [b.fingerprint() for b in whole.snapshots]
    assert run.closed


def test_more_checkpoints_later(folder):
    run = groktrace.import_checkpoints(folder / "saved" / "[34].pt", task=task(), out=folder / "run")
    run = groktrace.import_checkpoints(folder / "saved", task=task(), out=folder / "run")
    assert [snapshot.step for snapshot in run.snapshots] == [0, 1, 2, 3, 4]
    (folder / "other").mkdir()
    torch.save({"model": network().state_dict(), "step": 3}, folder / "other" / "new.pt")
    with pytest.raises(
        groktrace.GroktraceError, match=r"new.pt: is of step 3, which is there already, of saved/3.pt; choose"
    ):
        groktrace.import_checkpoints(folder / "other", task=task(), out=folder / "run")


def test_weights_that_do_not_train_are_kept_once(folder):
    model = network()
    model[0].bias.requires_grad_(False)
    for step in range(5):
        path = folder / "saved" / f"{step}.pt"
        state = torch.load(path)
        state["model"]["0.bias"] = torch.full((4,), 1.0 + step // 3)
        torch.save(state, path)
    groktrace.import_checkpoints(folder / "saved" / "4.pt", task=task(model), out=folder / "backwards")
    for out in ("run", "backwards"):
        run = groktrace.import_checkpoints(folder / "saved", task=task(model), out=folder / out)
        assert [s.load()["0.bias"][0].item() for s in run.snapshots] == [1, 1, 1, 2, 2]
        held = ["0.bias" in files.read_tensors(s.path)[0] for s in run.snapshots]
        assert held == ([False] * 3 + [True] * 2 if out == "run" else [True] * 3 + [False] * 2)


def test_a_damaged_snapshot_of_an_earlier_import_stays(folder):
    groktrace.import_checkpoints(folder / "saved", task=task(), out=folder / "run")
    (folder / "run" / "weights" / "000000000000.safetensors").write_bytes(b"damaged")
    run = groktrace.import_checkpoints(folder / "saved", task=task(), out=folder / "run")
    with pytest.raises(groktrace.GroktraceError, match="truncated or not a safetensors file"):
        run.snapshots[0].load()


def test_weights_that_look_frozen_are_warned_of(folder):
    for step in range(5):
        state = torch.load(path := folder / "saved" / f"{step}.pt")
        state["model"]["0.bias"] = torch.ones(4)
        torch.save(state, path)
    with pytest.warns(
        RuntimeWarning, match=r"the first and the last checkpoint have the same '0.bias', which counts as tr"
    ):
        groktrace.import_checkpoints(folder / "saved", task=task(), out=folder / "run")
    model = network()
    model[0].bias.requires_grad_(False)
    groktrace.import_checkpoints(folder / "saved", task=task(model), out=folder / "frozen")


def test_what_cannot_be_used_is_left_out(folder):
    (folder / "saved" / "1.pt").write_bytes(b"PK\3\4")
    torch.save({"model": nn.Linear(2, 2).state_dict(), "step": 2}, folder / "saved" / "2.pt")
    with pytest.warns(
        RuntimeWarning, match=r"groktrace: 2 checkpoints were left out\. .*1.pt: not a whole.* 2.pt: |2.pt: expected"
    ):
        run = groktrace.import_checkpoints(folder / "saved", task=task(), out=folder / "run")
    assert [snapshot.step for snapshot in run.snapshots] == [0, 3, 4]


def test_nothing_is_written_where_nothing_can_be_used(folder):
    for step in range(5):
        torch.save({"model": nn.Linear(2, 2).state_dict(), "step": step}, folder / "saved" / f"{step}.pt")
    with pytest.raises(
        groktrace.GroktraceError, match=r"0.pt: expected the weights .* None of the 5 checkpoints can be used\."
    ):
        groktrace.import_checkpoints(folder / "saved", task=task(), out=folder / "run")
    torch.save({"model": network().state_dict(), "step": float("nan")}, folder / "saved" / "3.pt")
    with pytest.raises(groktrace.GroktraceError, match=r"3.pt: its step is nan by step, expected a whole number"):
        groktrace.import_checkpoints(folder / "saved", task=task(), out=folder / "run")
    assert not (folder / "run").exists()


def test_a_checkpoint_that_changes_while_it_is_imported(folder):
    planned = plan.plan_import(folder / "saved", task())
    (folder / "saved" / "2.pt").unlink()
    (folder / "saved" / "3.pt").write_bytes(b"")
    imported = planned.write(folder / "run")
    assert [snapshot.step for snapshot in imported.run.snapshots] == [0, 1, 4]
    assert len(imported.left_out) == 2
    for step in (0, 1, 4):
        (folder / "saved" / f"{step}.pt").unlink()
    with pytest.raises(groktrace.GroktraceError, match=r"0.pt: cannot be read"):
        planned.write(folder / "other")
    assert not (folder / "other").exists()


def test_other_things_are_not_touched(folder, recorded):
    (folder / "full").mkdir()
    (folder / "full" / "thesis.tex").touch()
    (folder / "file").touch()
    for out, message in (
        (recorded, "is a run that was recorded, not imported"),
        (folder / "full", "holds files, but is not a groktrace run"),
        (folder / "file", "expected a folder, but '.*' is a file"),
        ("", "out: expected the path of a folder, got ''"),
        ("nosuch://bucket/run", "out: cannot be reached"),
    ):
        with pytest.raises(groktrace.GroktraceError, match=message):
            groktrace.import_checkpoints(folder / "saved", task=task(), out=out)
    groktrace.import_checkpoints(folder / "saved", task=task(), out=folder / "run")
    model = network()
    model[0].bias.requires_grad_(False)
    with pytest.raises(groktrace.GroktraceError, match="was imported with another network"):
        groktrace.import_checkpoints(folder / "saved", task=task(model), out=folder / "run")


def test_a_folder_that_cannot_be_written(folder, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(write, "write_snapshot", full)
        with pytest.raises(
            groktrace.GroktraceError, match=r"cannot be written \(No space left on device\); what is there is kept"
        ):
            groktrace.import_checkpoints(folder / "saved", task=task(), out=folder / "run")
    assert len(groktrace.import_checkpoints(folder / "saved", task=task(), out=folder / "run").snapshots) == 5


def test_other_data_and_models_that_cannot_be_traced(folder):
    groktrace.import_checkpoints(folder / "saved", task=task(), out=folder / "run")
    x = torch.randn(6, 3)
    other = groktrace.Task.from_model(network(), train=(x, x[:, :2]), loss="mse")
    with pytest.warns(RuntimeWarning, match="held other data than these"):
        groktrace.import_checkpoints(folder / "saved", task=other, out=folder / "run")

    class Branching(nn.Sequential):
        def forward(self, x):
            return super().forward(x if x.sum() > 0 else -x)

    with pytest.warns(RuntimeWarning, match=r"analysis will need `--task my:task`"):
        groktrace.import_checkpoints(
            folder / "saved", task=task(Branching(*network())), out=folder / "branching", task_name="my:task"
        )
    assert json.loads((folder / "branching" / "run.json").read_text())["task"] == "my:task"


def test_validation_data_of_which_some_are_kept(folder):
    x = torch.randn(9000, 3)
    run = groktrace.import_checkpoints(folder / "saved", task=task(val=(x, x[:, :2])), out=folder / "run")
    assert run.info["data"]["val"] | {"structure": None} == {"samples": 9000, "stored": 8192, "structure": None}


def test_a_loss_with_weights_of_its_own(folder):
    class ScaleChanged(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, outputs, targets):
            return (self.scale * (outputs - targets)).square().mean()

    x = torch.randn(8, 3)
    loss = ScaleChanged()
    own = groktrace.Task.from_model(network(), train=(x, x[:, :2]), loss=loss)
    with pytest.raises(groktrace.GroktraceError, match=r"it lacks 'loss.scale'"):
        groktrace.import_checkpoints(folder / "saved", task=own, out=folder / "run")
    loss.requires_grad_(False)
    own = groktrace.Task.from_model(network(), train=(x, x[:, :2]), loss=loss)
    run = groktrace.import_checkpoints(folder / "saved", task=own, out=folder / "run")
    assert run.snapshots[0].load(with_loss=True)["loss.scale"].item() == 1


def test_a_remote_run(folder):
    fsspec = pytest.importorskip("fsspec")
    url = "memory://groktrace-import/run"
    groktrace.import_checkpoints(folder / "saved" / "[01].pt", task=task(), out=url)
    run = groktrace.import_checkpoints(folder / "saved", task=task(), out=url)
    assert [snapshot.step for snapshot in run.snapshots] == [0, 1, 2, 3, 4]
    assert torch.equal(run.snapshots[0].load()["0.weight"], network()[0].weight)
    assert run.closed
    fsspec.filesystem("memory").rm("/groktrace-import", recursive=True)
