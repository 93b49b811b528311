"""A LightningModule recorded by a callback: a small classifier of handwritten digits.

pip install 'groktrace[lightning]' scikit-learn
python examples/lightning_digits.py --out runs/digits
groktrace analyze runs/digits
tensorboard --logdir runs/digits
"""

import argparse

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from groktrace.recording.lightning import GroktraceCallback


class Classifier(pl.LightningModule):
    """A perceptron with one hidden layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Cross entropy of one batch."""
        x, y = batch
        loss = cross_entropy(self.network(x), y)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main() -> None:
    """Train; the one groktrace line is marked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=32, help="hidden neurons")
    parser.add_argument("--steps", type=int, default=500, help="optimizer steps")
    parser.add_argument("--out", default="snapshots", help="where the snapshots go")
    options = parser.parse_args()

    pl.seed_everything(0)
    digits = load_digits()
    data = TensorDataset(torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target))
    trainer = pl.Trainer(
        max_steps=options.steps,
        # The one line:
        callbacks=[GroktraceCallback(out=options.out, schedule="log")],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(Classifier(options.width), DataLoader(data, batch_size=128, shuffle=True))


if __name__ == "__main__":
    main()
