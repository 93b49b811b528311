import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import groktrace

pl = pytest.importorskip("lightning.pytorch")
from torchmetrics.classification import MulticlassAccuracy  # noqa: E402

from groktrace.recording.lightning import GroktraceCallback  # noqa: E402

# Lightning's own warnings are not this project's.
pytestmark = pytest.mark.filterwarnings("ignore:(?!groktrace)")


class Module(pl.LightningModule):
    def __init__(self, width):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3))
        self.accuracy = MulticlassAccuracy(3)
        self.accuracy.persistent(True)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def data():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(24, 4, generator=generator), torch.randint(0, 3, (24,), generator=generator)


@pytest.fixture
def folder(tmp_path):
    """A training of seven steps, recorded and saved every second."""
    torch.manual_seed(0)
    saving = pl.callbacks.ModelCheckpoint(tmp_path / "saved", every_n_train_steps=2, save_top_k=-1)
    trainer = pl.Trainer(
        callbacks=[GroktraceCallback(schedule=[2, 4, 6], out=tmp_path / "hooked"), saving],
        **{"accelerator": "cpu", "max_steps": 6, "logger": False},
        **{"enable_progress_bar": False, "enable_model_summary": False},
    )
    trainer.fit(Module(6), DataLoader(TensorDataset(*data()), batch_size=6, shuffle=True))
    (tmp_path / "hooked" / "weights" / "000000000000.safetensors").unlink()  # which Lightning does not save
    return tmp_path


def own_loss(module, batch):
    x, y = batch
    return cross_entropy(module.net(x), y)


def test_the_module_itself(folder, same_analysis):
    task = groktrace.Task.from_model(Module(6), train=data(), batch_loss=own_loss)
    run = groktrace.import_checkpoints(folder / "saved", task=task, out=folder / "run")
    same_analysis(folder / "hooked", run.root, unlogged=True)  # the learning rate


def test_the_network_in_it(folder):
    network = Module(6).net
    task = groktrace.Task.from_model(network, train=data(), loss="cross_entropy")
    run = groktrace.import_checkpoints(folder / "saved", task=task, out=folder / "run")
    assert [snapshot.step for snapshot in run.snapshots] == [2, 4, 6]
    hooked = groktrace.open_run(folder / "hooked").snapshots[-1].load()
    assert torch.equal(run.snapshots[-1].load()["2.weight"], hooked["net.2.weight"])
