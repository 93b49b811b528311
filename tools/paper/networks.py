"""The networks of the reproduced paper: the example's at the published size, and its accuracy."""

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import groktrace
from tools.common.networks import EXAMPLE, Pairs, modular_network


def accuracy(model: nn.Module, train: Pairs, pairs: Pairs) -> float:
    """Fraction of right predictions on `pairs`, the outputs' mean error on the training pairs removed."""
    with torch.no_grad():
        offset = (model(train[0]) - train[1]).mean(0)
        found = (model(pairs[0]) - offset).argmax(1)
    return float((found == pairs[1].argmax(1)).double().mean())


EPOCHS_KEPT = (10, 20, 50, 100, 200, 300, 500, 700, *range(1000, 2001, 200), 2300, 2600, 3000, 3500, 4000)
EPOCHS_KEPT += tuple(range(6000, 100_001, 2000))


@dataclass(frozen=True)
class LargeTraining:
    """The published protocol: minibatches.

    Attributes:
        optimizer: "Adam", whose weight decay is part of the gradient, or "AdamW", whose is not; 1e-5 is much for the
            first and next to nothing for the second.
        p, width, fraction, learning_rate, weight_decay, batch: as published.
        kept: epochs after which a snapshot is kept.
        piece: epochs between states that an interrupted training goes on from.
        seed: of data, initial weights and batches.
    """

    optimizer: str = "Adam"
    p: int = 53
    width: int = 1024
    fraction: float = 0.4
    learning_rate: float = 1e-4
    weight_decay: float = 1e-5
    batch: int = 128
    kept: tuple[int, ...] = EPOCHS_KEPT
    piece: int = 500
    seed: int = 0

    @property
    def steps_an_epoch(self) -> int:
        """Batches, the last one smaller."""
        return -(-int(self.fraction * self.p**2) // self.batch)


def train_large(large: LargeTraining, out: Path, epochs: int, seconds: float) -> int:
    """Train on, for so many seconds or up to so many epochs; epochs done in all.

    The first layer sums rows of W instead of multiplying one-hot inputs: the same function at half the cost.
    """
    model, train, val = modular_network(large.p, large.width, large.fraction, seed=large.seed)
    kind = {"Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW}[large.optimizer]
    optimizer = kind(model.parameters(), lr=large.learning_rate, weight_decay=large.weight_decay, fused=True)
    symbols = train[0].nonzero()[:, 1].view(-1, 2)
    shuffle = torch.Generator().manual_seed(large.seed)
    out.mkdir(parents=True, exist_ok=True)
    done, state_file = 0, out / "state.pt"
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        shuffle.set_state(state["shuffle"])
        done = state["epochs"]
    if done >= epochs:
        return done
    n = len(symbols)
    began = time.monotonic()
    recorder = groktrace.watch(
        model,
        optimizer,
        train=train,
        loss=EXAMPLE.centred_loss,
        val=val,
        out=out / "run",
        schedule=[epoch * large.steps_an_epoch for epoch in large.kept],
    )
    with recorder:
        while done < epochs and time.monotonic() - began < seconds:
            for _ in range(large.piece):
                for batch in torch.randperm(n, generator=shuffle).split(large.batch):
                    loss = EXAMPLE.centred_loss(_gathered(model, symbols[batch]), train[1][batch])
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
            done += large.piece
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({**state, "shuffle": shuffle.get_state(), "epochs": done}, state_file.with_suffix(".tmp"))
            state_file.with_suffix(".tmp").replace(state_file)
    return done


def _gathered(model: nn.Module, symbols: Tensor) -> Tensor:
    """The outputs for pairs given by the positions of their two ones, [n, 2]."""
    hidden = model.W.index_select(0, symbols[:, 0]) + model.W.index_select(0, symbols[:, 1])
    return hidden.square() @ model.V.T
