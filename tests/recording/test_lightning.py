import copy
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader, TensorDataset

import groktrace
from groktrace.run import layout

pl = pytest.importorskip("lightning.pytorch")
from torchmetrics.classification import MulticlassAccuracy  # noqa: E402

from groktrace.recording.lightning import GroktraceCallback  # noqa: E402

# Lightning's own warnings are not this project's.
pytestmark = pytest.mark.filterwarnings("ignore:(?!groktrace)")
FEW = {"chains": 1, "burn_in": 4, "draws": 8}


@pytest.fixture(autouse=True)
def program():
    """The real one, not the stand-in of the neighbouring tests."""


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.2), nn.Linear(6, 3))
        self.accuracy = MulticlassAccuracy(3)
        self.seen = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        outputs = self.net(x)
        loss = F.cross_entropy(outputs, y)
        self.accuracy(outputs, y)
        self.log_dict({"train_loss": loss, "accuracy": self.accuracy})
        return {"loss": loss}

    def on_train_epoch_end(self):
        self.seen.append(self.accuracy.compute().item())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def data():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(24, 4, generator=generator), torch.randint(0, 3, (24,), generator=generator)


def loader():
    return DataLoader(TensorDataset(*data()), batch_size=6, shuffle=True)


def fit(module, *callbacks, ckpt_path=None, **settings):
    torch.manual_seed(0)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    settings = {"accelerator": "cpu", "enable_checkpointing": False, "max_steps": 7} | quiet | settings
    trainer = pl.Trainer(callbacks=list(callbacks), **settings)
    trainer.fit(module, loader(), ckpt_path=ckpt_path)
    return trainer


def make(kind=Module):
    torch.manual_seed(0)
    return kind()


def test_the_trainers_own_data_and_loss(tmp_path):
    alone, module = make(), make()
    fit(alone)
    after = torch.get_rng_state()
    callback = GroktraceCallback(every=2)
    fit(module, callback, default_root_dir=tmp_path)
    assert torch.equal(torch.get_rng_state(), after)
    assert all(
        torch.equal(a, b) for a, b in zip(alone.state_dict().values(), module.state_dict().values(), strict=True)
    )
    assert module.seen == alone.seen
    assert "closed: 7 steps, 5 snapshots" in repr(callback.recorder)
    run = groktrace.open_run(tmp_path / "snapshots")
    assert run.doubts == ()
    assert [snapshot.step for snapshot in run.snapshots] == [0, 2, 4, 6, 7]
    assert all(snapshot.metrics().keys() == {"lr", "train_loss", "accuracy"} for snapshot in run.snapshots[1:])
    last, x, y = run.snapshots[-1].load(), *data()
    assert all(torch.equal(value, last[name]) for name, value in module.state_dict().items())
    trajectory = groktrace.analyze(run, **FEW)
    expected = F.cross_entropy(module.eval().net(x), y).item()
    assert trajectory.points[-1].train_loss == pytest.approx(expected, rel=1e-5)


class Validated(Module):
    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))


def fit_validated(folder, *sets):
    torch.manual_seed(0)
    module = make(Validated)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    callback = GroktraceCallback(every=4, out=folder)
    trainer = pl.Trainer(callbacks=[callback], max_steps=8, enable_checkpointing=False, **quiet)
    trainer.fit(module, loader(), [DataLoader(TensorDataset(*tensors), batch_size=5) for tensors in sets])
    return module, groktrace.analyze(folder, **FEW).points


def test_the_trainers_own_validation_set(tmp_path):
    x, y = (tensor.flip(0)[:10] for tensor in data())
    module, points = fit_validated(tmp_path / "one", (x, y))
    expected = F.cross_entropy(module.eval().net(x), y).item()
    assert points[-1].val_loss == pytest.approx(expected, rel=1e-5)
    assert points[-1].val_loss != pytest.approx(points[-1].train_loss, rel=1e-3)


def test_validation_data_that_the_user_gives(tmp_path):
    x, y = (tensor.flip(0)[:10] for tensor in data())
    for name, val in (("loader", DataLoader(TensorDataset(x, y), batch_size=4)), ("tensors", (x, y))):
        module = make()
        fit(module, GroktraceCallback(every=4, out=tmp_path / name, val=val))
        points = groktrace.analyze(tmp_path / name, **FEW).points
        expected = F.cross_entropy(module.eval().net(x), y).item()
        assert points[-1].val_loss == pytest.approx(expected, rel=1e-5)


class Noisy(Module):
    def training_step(self, batch, batch_idx):
        x, y = batch
        return super().training_step((x + 0.1 * torch.randn_like(x), y), batch_idx)


def test_noise_in_the_loss(tmp_path):
    module, alone = make(Noisy), make(Noisy)
    fit(module, GroktraceCallback(every=4, out=tmp_path / "run", noise="fixed"))
    fit(alone)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), alone.parameters(), strict=True))
    run = groktrace.open_run(tmp_path / "run")
    x, y, noise = run.data.train.tensors
    expected = F.cross_entropy(module.eval().net(x + 0.1 * noise), y).item()
    assert groktrace.analyze(run, **FEW).points[-1].train_loss == pytest.approx(expected, rel=1e-5)


def test_a_validation_set_of_another_form_is_left_out_and_its_logged_loss_taken(tmp_path):
    x, y = (tensor.flip(0)[:10] for tensor in data())
    with pytest.warns(RuntimeWarning, match="trainer's own validation data are left out"):
        module, points = fit_validated(tmp_path / "run", (x, y, y))
    assert groktrace.open_run(tmp_path / "run").info["data"]["val"] is None
    expected = F.cross_entropy(module.eval().net(x), y).item()
    assert points[-1].val_loss == pytest.approx(expected, rel=1e-5)


def test_what_is_logged_is_of_the_snapshots_own_step(tmp_path):
    class Counting(Module):
        def training_step(self, batch, batch_idx):
            self.log("batch", float(self.global_step))
            return super().training_step(batch, batch_idx)

    fit(make(Counting), GroktraceCallback(every=2, out=tmp_path / "run"), accumulate_grad_batches=2, max_steps=5)
    snapshots = groktrace.open_run(tmp_path / "run").snapshots
    assert [snapshot.step for snapshot in snapshots] == [0, 2, 4, 5]
    assert [snapshot.metrics().get("batch") for snapshot in snapshots] == [None, 1.0, 3.0, 4.0]


def test_a_training_that_is_resumed_goes_on_counting(tmp_path):
    trainer = fit(make(), GroktraceCallback(every=2, out=tmp_path / "run"), max_steps=4)
    trainer.save_checkpoint(tmp_path / "checkpoint")
    with pytest.raises(groktrace.GroktraceError, match=r"holds a recording up to step 4\. To continue"):
        fit(make(), GroktraceCallback(every=2, if_exists="error", out=tmp_path / "run"))
    fit(make(), GroktraceCallback(every=2, out=tmp_path / "run"), ckpt_path=tmp_path / "checkpoint")
    assert layout.snapshot_steps(tmp_path / "run") == [0, 2, 4, 6, 7]


def test_a_training_that_breaks_off_keeps_its_last_step(tmp_path):
    class Breaking(Module):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            if self.global_step == 3:
                raise ArithmeticError("mine")

    with pytest.raises(ArithmeticError, match="mine"):
        fit(make(Breaking), GroktraceCallback(every=2, out=tmp_path / "run"))
    assert layout.snapshot_steps(tmp_path / "run") == [0, 2, 3]


class Adversaries(pl.LightningModule):
    """Steps its two optimizers by hand, the second twice as often."""

    automatic_optimization = False

    def __init__(self):
        super().__init__()
        self.maker, self.critic = nn.Linear(4, 4), nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        for_maker, for_critic = self.optimizers()
        for optimizer, sign in ((for_critic, 1), (for_critic, 1), (for_maker, -1)):
            optimizer.zero_grad()
            self.manual_backward(sign * (self.critic(self.maker(batch[0])) - self.critic(batch[0])).mean())
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(net.parameters(), lr=0.01) for net in (self.maker, self.critic)]


def test_modules_that_step_by_hand(tmp_path):
    alone, module = make(Adversaries), make(Adversaries)
    fit(alone, max_epochs=1, max_steps=-1)
    with pytest.warns(
        RuntimeWarning, match=r"groktrace: the trainer's own data and loss cannot be used .*only weights"
    ):
        fit(module, GroktraceCallback(every=2, out=tmp_path / "a", optimizer=0), max_epochs=1, max_steps=-1)
    assert all(torch.equal(a, b) for a, b in zip(alone.parameters(), module.parameters(), strict=True))
    assert layout.snapshot_steps(tmp_path / "a") == [0, 2, 4]
    critic = GroktraceCallback(
        out=tmp_path / "b",
        every=4,
        batch_loss=lambda module, batch: module.critic(module.maker(batch[0])).square().mean(),
    )
    fit(make(Adversaries), critic, max_epochs=1, max_steps=-1)
    assert layout.snapshot_steps(tmp_path / "b") == [0, 4, 8]
    assert len(groktrace.analyze(tmp_path / "b", **FEW).points) == 3
    with pytest.raises(groktrace.GroktraceError, match="optimizer: the module has 2 of them, got 2"):
        fit(make(Adversaries), GroktraceCallback(out=tmp_path / "c", optimizer=2))


def test_what_the_user_gives_must_fit(tmp_path):
    with pytest.raises(groktrace.GroktraceError, match="fail"):
        fit(make(), GroktraceCallback(out=tmp_path / "run", loss="mse"))


def test_callbacks_can_be_copied():
    assert copy.deepcopy(GroktraceCallback(every=3))._given["every"] == 3


def test_without_lightning_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    monkeypatch.delitem(sys.modules, "groktrace.recording.lightning")
    with pytest.raises(ImportError, match=r"pip install 'groktrace\[lightning\]'"):
        import groktrace.recording.lightning  # noqa: F401
