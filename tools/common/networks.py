"""The networks that are measured: the reference example's, and small transformers."""

import importlib.util
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import groktrace
from groktrace.analysis.measurement.measure import Objective, stack_weights
from groktrace.analysis.running.setup import weight_layout
from groktrace.run import layout
from groktrace.run.task import Task
from groktrace.sampling.posterior import StackedLoss
from groktrace.sampling.settings import SamplingSettings
from tools.common.measurements import say

Pairs = tuple[Tensor, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


def load_example() -> ModuleType:
    """The module examples/modular_addition.py."""
    path = Path(__file__).parents[2] / "examples" / "modular_addition.py"
    spec = importlib.util.spec_from_file_location("modular_addition", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


EXAMPLE = load_example()


@dataclass(frozen=True)
class ModularTraining:
    """A training of the example's network, by default as its script does it: full batches, AdamW.

    Attributes:
        p, width, fraction: modulus, hidden neurons K, fraction of all pairs that is trained on.
        random_labels: labels that can only be memorised.
        learning_rate, weight_decay, steps: of the optimizer.
        seed: of data and initial weights.
    """

    p: int = 23
    width: int = 128
    fraction: float = 0.6
    random_labels: bool = False
    learning_rate: float = 3e-3
    weight_decay: float = 1.0
    steps: int = 3000
    seed: int = 0

    def prepare(self) -> tuple[nn.Module, Pairs, Pairs]:
        """The initial network, training and validation pairs, as the example makes them."""
        return modular_network(self.p, self.width, self.fraction, self.random_labels, self.seed)

    def train(self) -> tuple[nn.Module, Pairs, Pairs]:
        """The trained network, training and validation pairs."""
        model, train, val = self.prepare()
        descend(model, self._optimizer(model), train, EXAMPLE.centred_loss, self.steps)
        return model, train, val

    def record(self, out: Path, every: int) -> groktrace.Run:
        """Train with a snapshot every so many steps, or take the recording that is there."""
        if (out / layout.RUN_FILE).exists():
            run = groktrace.open_run(out)
            if run.snapshots and run.snapshots[-1].step == self.steps:
                return run
        shutil.rmtree(out, ignore_errors=True)
        say(f"training: {out}")
        model, train, val = self.prepare()
        record_training(
            model, self._optimizer(model), train, out, self.steps, EXAMPLE.centred_loss, val=val, every=every
        )
        return groktrace.open_run(out)

    def _optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay)


def modular_network(
    p: int, width: int, fraction: float = 0.6, random_labels: bool = False, seed: int = 0
) -> tuple[nn.Module, Pairs, Pairs]:
    """The example's network as initialised, training and validation pairs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        train, val = EXAMPLE.modular_pairs(p, fraction, random_labels)
        return EXAMPLE.QuadraticNetwork(2 * p, width, p), train, val


def descend(model: nn.Module, optimizer: torch.optim.Optimizer, data: Pairs, loss: Loss, steps: int) -> None:
    """Make so many steps on full batches."""
    for _ in range(steps):
        value = loss(model(data[0]), data[1])
        optimizer.zero_grad()
        value.backward()
        optimizer.step()


def record_training(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Pairs,
    out: Path,
    steps: int,
    loss: Loss | str,
    **options: Any,
) -> None:
    """Train on full batches with the hook line.

    Args:
        model: the network.
        optimizer: of its weights.
        data: inputs and targets.
        out: the run directory.
        steps: of the training.
        loss: loss(outputs, targets), or "cross_entropy".
        options: further ones of `groktrace.watch`.
    """
    criterion = functional.cross_entropy if loss == "cross_entropy" else loss
    with groktrace.watch(model, optimizer, train=data, loss=loss, out=out, **options):
        descend(model, optimizer, data, criterion, steps)


class Block(nn.Module):
    """Causal self-attention and a two-layer perceptron, each added to its input."""

    def __init__(self, width: int, heads: int, hidden: int, norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        self.norms = nn.ModuleList(nn.LayerNorm(width) if norm else nn.Identity() for _ in range(2))
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        """[n, length, width] to the same."""
        parts = self.query_key_value(self.norms[0](x)).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.output(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x))


class Transformer(nn.Module):
    """A decoder in the manner of GPT.

    Args:
        tokens: of the input.
        outputs: classes at each position.
        length: of a sequence.
        width, heads, hidden, blocks: of the network.
        norm: layer normalisation before each part.
        last: whether only the last position is read.
    """

    def __init__(
        self,
        *,
        tokens: int,
        outputs: int,
        length: int,
        width: int,
        heads: int,
        hidden: int,
        blocks: int,
        norm: bool,
        last: bool,
    ) -> None:
        super().__init__()
        self.last = last
        self.embedding = nn.Embedding(tokens, width)
        self.positions = nn.Parameter(torch.randn(length, width) / width**0.5)
        self.blocks = nn.Sequential(*(Block(width, heads, hidden, norm) for _ in range(blocks)))
        self.unembedding = nn.Linear(width, outputs, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """[n, length] to [n, outputs] or [n, length, outputs]."""
        x = self.blocks(self.embedding(tokens) + self.positions)
        return self.unembedding(x[:, -1] if self.last else x)


def sequence_cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean over all positions; outputs [n, length, classes], targets [n, length]."""
    return functional.cross_entropy(outputs.flatten(0, 1), targets.flatten())


def modular_transformer(samples: int) -> tuple[nn.Module, Pairs]:
    """One block on (a, b, =) at p = 113, 226 thousand weights, and some of its pairs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pairs = torch.cartesian_prod(torch.arange(113), torch.arange(113))
        pairs = pairs[torch.randperm(len(pairs))[:samples]]
        tokens = torch.cat([pairs, torch.full((len(pairs), 1), 113)], dim=1)
        network = Transformer(
            tokens=114, outputs=113, length=3, width=128, heads=4, hidden=512, blocks=1, norm=False, last=True
        )
    return network, (tokens, pairs.sum(1) % 113)


def language_model(samples: int) -> tuple[nn.Module, Pairs]:
    """Four blocks of width 448, ten million weights, and random sequences of 64 tokens."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokens = torch.randint(512, (samples, 65))
        network = Transformer(
            tokens=512, outputs=512, length=64, width=448, heads=7, hidden=1792, blocks=4, norm=True, last=False
        )
    return network, (tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())


def size(model: nn.Module) -> int:
    """Number of weights."""
    return sum(parameter.numel() for parameter in model.parameters())


def stacked_loss(model: nn.Module, loss: Loss | str, data: Pairs) -> tuple[StackedLoss, dict[str, Tensor]]:
    """The training loss as the analysis evaluates it, and the weights by name.

    Args:
        model: the network.
        loss: loss(outputs, targets).
        data: (inputs, targets).
    """
    task = Task.from_model(model, loss=loss, train=data)
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    layout = weight_layout({name: (tuple(w.shape), w.dtype, True) for name, w in weights.items()})
    return Objective.of(task, layout, SamplingSettings(), weights, torch.device("cpu")).loss, weights


def stack(loss: StackedLoss, weights: dict[str, Tensor], snapshots: int) -> tuple[StackedLoss, Tensor]:
    """The loss of several snapshots, slightly apart, and their anchors [S, D]."""
    generator = torch.Generator().manual_seed(0)
    several: Sequence[dict[str, Tensor]] = [
        {name: w * (1 + 1e-3 * torch.randn(w.shape, generator=generator)) for name, w in weights.items()}
        for _ in range(snapshots)
    ]
    return stack_weights(loss, several)
