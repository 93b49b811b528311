"""Minibatches of the chains: which samples each row's next gradient is of."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Minibatches:
    """Random minibatches, one sequence a row, so that a chain's batches do not depend on what it is stacked with.

    With a `partition` a row takes its batches in a random order, each once before any comes again. Their gradients at
    w* can then be kept, and what their noise does to directions slower than one pass cancels.

    Attributes:
        index: [R, B] samples of the current batches; overwritten by `draw`.
        samples: how many there are.
        generators: one a row.
        partition: [K, B] the samples of each batch; None for batches drawn anew from all samples.
        order: [R, K] the order of the current pass, for a partition.
        number: [R] which batch of the partition is current.
        made: batches drawn since the start of the pass.
    """

    index: Tensor
    samples: int
    generators: list[torch.Generator]
    partition: Tensor | None = None
    order: Tensor | None = None
    number: Tensor | None = None
    made: Tensor | None = None

    @classmethod
    def begin(
        cls, samples: int, size: int, generators: Sequence[torch.Generator], device: torch.device, parts: bool
    ) -> "Minibatches":
        """Before the first batch.

        Args:
            samples: how many there are.
            size: B, samples a batch.
            generators: one a row.
            device: of the samples.
            parts: whether batches are the parts of a partition, of which a multiple of B samples is needed.
        """
        rows = len(generators)
        index = torch.arange(size, device=device).repeat(rows, 1)
        if not parts:
            return cls(index, samples, list(generators))
        count = samples // size
        partition = torch.arange(count * size, device=device).view(count, size)
        number = torch.zeros(rows, dtype=torch.long, device=device)
        order = number[:, None].expand(-1, count).clone()
        return cls(index, samples, list(generators), partition, order, number, torch.full((rows,), count))

    @property
    def spread(self) -> float:
        """Variance of one batch over half the mean square of the difference between one and the next."""
        return 1.0 if self.partition is None else 1 - 1 / len(self.partition)

    def draw(self) -> None:
        """Go on to each row's next batch."""
        if self.partition is None:
            # Without replacement: the noise of a batch is then smaller, and none where it holds everything.
            for row, generator in zip(self.index, self.generators, strict=True):
                row.copy_(torch.randperm(self.samples, generator=generator, device=row.device)[: len(row)])
            return
        count = len(self.partition)
        for r in (self.made == count).nonzero()[:, 0].tolist():
            device = self.order.device
            self.order[r] = torch.randperm(count, generator=self.generators[r], device=device)
            self.made[r] = 0
        rows = torch.arange(len(self.number), device=self.number.device)
        self.number.copy_(self.order[rows, self.made.to(self.number.device)])
        self.index.copy_(self.partition[self.number])
        self.made += 1

    def select(self, rows: Tensor) -> "Minibatches":
        """The batches of some of the rows."""
        chosen = [self.generators[r] for r in rows.tolist()]
        if self.partition is None:
            return Minibatches(self.index[rows], self.samples, chosen)
        order, number, made = self.order[rows], self.number[rows], self.made[rows.cpu()]
        return Minibatches(self.index[rows], self.samples, chosen, self.partition, order, number, made)

    def saved(self, rows: Tensor) -> "Minibatches":
        """A copy of some of the rows as they are."""
        saved = self.select(rows)
        saved.generators = [torch.Generator(each.device).set_state(each.get_state()) for each in saved.generators]
        return saved

    def restore(self, rows: Tensor, saved: "Minibatches") -> None:
        """Put rows back to what `saved` returned."""
        for r, generator in zip(rows.tolist(), saved.generators, strict=True):
            self.generators[r] = generator
        self.index[rows] = saved.index
        if self.partition is not None:
            self.order[rows], self.number[rows], self.made[rows.cpu()] = saved.order, saved.number, saved.made
