"""The networks that are measured: the reference example's, and small transformers."""

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn import functional

import groktrace
from groktrace.analysis.measure import Objective, stack_weights
from groktrace.analysis.setup import weight_layout
from groktrace.run.task import Task
from groktrace.sampling.posterior import StackedLoss
from groktrace.sampling.settings import SamplingSettings

Pairs = tuple[Tensor, Tensor]


def load_example() -> ModuleType:
    """The module examples/modular_addition.py."""
    path = Path(__file__).parents[2] / "examples" / "modular_addition.py"
    spec = importlib.util.spec_from_file_location("modular_addition", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def record_example(out: Path, steps: int) -> None:
    """Train the reference example as its script does by default (seed 0), with a snapshot every 50 steps."""
    example = load_example()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        train, val = example.modular_pairs(23, 0.6, False)
        model = example.QuadraticNetwork(46, 128, 23)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1.0)
        with groktrace.watch(model, optimizer, train=train, loss=example.centred_loss, val=val, out=str(out), every=50):
            for _ in range(steps):
                loss = example.centred_loss(model(train[0]), train[1])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()


def quadratic_network(p: int, width: int, seed: int) -> tuple[nn.Module, Pairs]:
    """The example's network as initialised, and 60 % of all pairs."""
    example = load_example()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        train, _ = example.modular_pairs(p, 0.6, False)
        return example.QuadraticNetwork(2 * p, width, p), train


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


def stacked_loss(
    model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor] | str, data: Pairs
) -> tuple[StackedLoss, dict[str, Tensor]]:
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
