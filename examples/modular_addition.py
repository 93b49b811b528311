"""Grokking modular addition with a quadratic network: the reference example.

A network f(x) = V (Wᵀx)² learns a + b mod p from a fraction of all pairs. It fits its training pairs at once and
generalises only hundreds of steps later.

    python examples/modular_addition.py --out runs/modular_addition
    groktrace analyze runs/modular_addition
    tensorboard --logdir runs/modular_addition
"""

import argparse

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

import groktrace


class QuadraticNetwork(nn.Module):
    """f(x) = V (Wᵀx)², no biases (Gromov 2023, arXiv 2301.02679)."""

    def __init__(self, inputs: int, width: int, outputs: int) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.randn(inputs, width) / inputs**0.5)
        self.V = nn.Parameter(torch.randn(outputs, width) / width**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs [n, p] for inputs [n, 2p]."""
        return (x @ self.W).square() @ self.V.T


def centred_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """½‖(Y − Ŷ)P⊥‖²/n: squared error after removing the residuals' mean over the batch."""
    residuals = targets - outputs
    return 0.5 * (residuals - residuals.mean(0)).square().sum() / len(residuals)


def modular_pairs(p: int, fraction: float, random_labels: bool) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Training and validation (inputs, targets): one-hot pairs [n, 2p] and one-hot sums [n, p]."""
    a, b = torch.cartesian_prod(torch.arange(p), torch.arange(p)).T
    inputs = torch.cat([one_hot(a, p), one_hot(b, p)], dim=1).float()
    sums = torch.randint(0, p, (p * p,)) if random_labels else (a + b) % p
    targets = one_hot(sums, p).float()
    order = torch.randperm(p * p)
    kept, rest = order[: int(fraction * p * p)], order[int(fraction * p * p) :]
    return (inputs[kept], targets[kept]), (inputs[rest], targets[rest])


def main() -> None:
    """Train; the one groktrace line is marked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--p", type=int, default=23, help="modulus")
    parser.add_argument("--width", type=int, default=128, help="hidden neurons K")
    parser.add_argument("--fraction", type=float, default=0.6, help="fraction of all pairs that is trained on")
    parser.add_argument("--steps", type=int, default=3000, help="optimizer steps, full batch")
    parser.add_argument("--every", type=int, default=50, help="steps between snapshots")
    parser.add_argument("--lr", type=float, default=3e-3, help="AdamW's learning rate")
    parser.add_argument("--weight-decay", type=float, default=1.0, help="AdamW's weight decay")
    parser.add_argument("--random-labels", action="store_true", help="labels that can only be memorised (a control)")
    parser.add_argument("--seed", type=int, default=0, help="of data, initial weights")
    parser.add_argument("--out", default="snapshots", help="where the snapshots go")
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    train, val = modular_pairs(options.p, options.fraction, options.random_labels)
    model = QuadraticNetwork(2 * options.p, options.width, options.p)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=options.weight_decay)

    # The one line:
    groktrace.watch(model, optimizer, train=train, loss=centred_loss, val=val, out=options.out, every=options.every)

    for step in range(options.steps):
        loss = centred_loss(model(train[0]), train[1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 500 == 0 or step == options.steps - 1:
            print(f"step {step:5d}  training loss {loss.item():.6f}")


if __name__ == "__main__":
    main()
