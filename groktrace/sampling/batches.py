"""Minibatches of the chains: which samples each row's next gradient is of."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from groktrace.sampling.noise import copy_generator
from groktrace.sampling.tuning import MINIBATCH_NOISE


@dataclass
class Minibatches:
    """Random minibatches, one sequence a row, so that a chain's batches do not depend on what it is stacked with.

    With `parts` a row draws one of its K parts at each step, whichever came before: their gradients at w* can be kept,
    and the noise of a step tells nothing of the next. (Parts that take turns have less noise, but it then correlates
    with what the earlier ones did to the chain, and E[(w − w*)·∇L] comes out too large: by 7 % for a perceptron where
    independent ones heat by 2 %.)

    Attributes:
        index: [R, B] samples of the current batches; overwritten by `draw`.
        samples: how many there are.
        generators: one a row.
        number: [R] which part is current; 0 without parts.
        parts: [K, B] the samples of each part; None for batches drawn anew from all samples.
    """

    index: Tensor
    samples: int
    generators: list[torch.Generator]
    number: Tensor
    parts: Tensor | None = None

    @classmethod
    def begin(
        cls, samples: int, size: int, generators: Sequence[torch.Generator], device: torch.device
    ) -> "Minibatches":
        """Before the first of batches that are drawn anew.

        Args:
            samples: how many there are.
            size: B, samples a batch.
            generators: one a row.
            device: of the samples.
        """
        index = torch.arange(size, device=device).repeat(len(generators), 1)
        return cls(index, samples, list(generators), torch.zeros(len(generators), dtype=torch.long, device=device))

    @classmethod
    def of_parts(cls, parts: Tensor, samples: int, generators: Sequence[torch.Generator]) -> "Minibatches":
        """Before the first of batches that are one of K parts.

        Args:
            parts: [K, B].
            samples: how many there are.
            generators: one a row.
        """
        number = torch.zeros(len(generators), dtype=torch.long, device=parts.device)
        return cls(parts[number], samples, list(generators), number, parts)

    def draw(self) -> None:
        """Go on to each row's next batch."""
        if self.parts is None:
            # Without replacement: the noise of a batch is then smaller, and none where it holds everything.
            for row, generator in zip(self.index, self.generators, strict=True):
                row.copy_(torch.randperm(self.samples, generator=generator, device=row.device)[: len(row)])
            return
        for row, generator in zip(self.number, self.generators, strict=True):
            row.random_(len(self.parts), generator=generator)
        self.index.copy_(self.parts[self.number])

    def select(self, rows: Tensor) -> "Minibatches":
        """The batches of some of the rows."""
        chosen = [self.generators[r] for r in rows.tolist()]
        return Minibatches(self.index[rows], self.samples, chosen, self.number[rows], self.parts)

    def saved(self, rows: Tensor) -> "Minibatches":
        """A copy of some of the rows as they are."""
        saved = self.select(rows)
        saved.generators = list(map(copy_generator, saved.generators))
        return saved

    def restore(self, rows: Tensor, saved: "Minibatches") -> None:
        """Put rows back to what `saved` returned."""
        for r, generator in zip(rows.tolist(), saved.generators, strict=True):
            self.generators[r] = generator
        self.index[rows] = saved.index
        self.number[rows] = saved.number


def spread_ranks(order: Tensor, heavy: int, count: int) -> Tensor:
    """Indices of some samples: the first of an order, then evenly spaced ones of the rest.

    Args:
        order: [N] sample numbers, those of the largest losses first.
        heavy: how many are taken from its beginning.
        count: how many are taken in all.
    """
    rest = order[heavy:]
    places = (torch.arange(count - heavy, device=order.device) + 0.5) * (len(rest) / (count - heavy))
    return torch.cat([order[:heavy], rest[places.long()]])


@dataclass(frozen=True)
class NoiseProfile:
    """How noisy the gradients of few samples are at a snapshot.

    Attributes:
        heating: what the noise of single samples adds to λ̂, relative to it: that of B is B times less.
        curvature_variance: variance of the curvature of single samples along a stiff direction, relative to its
            squared mean.
    """

    heating: float
    curvature_variance: float

    def batch(self, samples: int, wanted: float) -> int | None:
        """The smallest batches whose noise does no harm, a multiple of 8; None where all samples are as cheap.

        Args:
            samples: N, how many there are.
            wanted: what the noise may add to λ̂, relative to it.
        """
        tuned = MINIBATCH_NOISE
        # Drawn without replacement, a batch has the variance of single samples times 1/B − 1/N.
        # NaN where a chain was thrown out.
        needed = float(np.max([self.heating / wanted, self.curvature_variance / tuned.max_curvature_variation**2]))
        least = needed / (1 + needed / samples) if math.isfinite(needed) else samples
        size = tuned.batch_multiple * math.ceil(max(least, tuned.min_batch) / tuned.batch_multiple)
        return size if tuned.min_batches * size <= samples else None
