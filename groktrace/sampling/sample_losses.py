"""Per-sample losses at every draw."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from groktrace.sampling.network import LargeNetwork
from groktrace.sampling.posterior import FACTOR, StackedLoss
from groktrace.sampling.tuning import MEMORY


class DrawnSampleLosses:
    """When all samples' losses are taken, which is at every draw, and what they were.

    Args:
        lengths: burn-in and draws of each snapshot.
    """

    def __init__(self, lengths: Sequence[tuple[int, int]]) -> None:
        self._lengths = lengths
        self._seen: list[list[Tensor]] = [[] for _ in lengths]

    def due(self, t: int) -> list[int]:
        """The snapshots that draw at step t."""
        return [s for s, (burn_in, draws) in enumerate(self._lengths) if burn_in <= t < burn_in + draws]

    def keep(self, snapshots: Sequence[int], losses: Tensor) -> None:
        """Take the losses of some snapshots' chains, [snapshots · chains, N]."""
        for s, own in zip(snapshots, losses.cpu().chunk(len(snapshots)), strict=True):
            self._seen[s].append(own)

    def of(self, s: int) -> Tensor | None:
        """Those of one snapshot, [draws, chains, N]; None where it made no draw."""
        return torch.stack(self._seen[s]) if self._seen[s] else None


def stacked_sample_losses(loss: StackedLoss, weights: Tensor) -> Tensor:
    """The loss of every sample at each row's weights, [R, N], without a factor of the row.

    Args:
        loss: of R rows; a mean over samples.
        weights: [R, D].
    """
    loss = replace(loss, fixed={name: tensor for name, tensor in loss.fixed.items() if name != FACTOR})
    size = min(MEMORY.single_samples, max(1, MEMORY.part_bytes // (len(weights) * (loss.sample_bytes or 1))))
    starts = range(0, len(loss.tensors[0]), size)
    parts = (replace(loss, tensors=tuple(tensor[i : i + size] for tensor in loss.tensors)) for i in starts)
    return torch.cat([part.sample_losses(weights) for part in parts], 1)


def network_sample_losses(network: LargeNetwork, at: Tensor | None = None) -> Tensor:
    """The same of one large network, [N].

    Args:
        network: whose loss is a mean over samples.
        at: a flat vector, [D]; None for w*.
    """
    tensors, size = network.loss.tensors, network.loss.micro_batch or 1
    with torch.no_grad():
        one = network.of_one_sample(at)
        parts = []
        for start in range(0, network.samples, size):
            part = tuple(tensor[start : start + size] for tensor in tensors)
            try:
                parts.append(torch.func.vmap(one)(*part))
            except (RuntimeError, ValueError):  # some operations cannot be stacked
                parts.append(torch.stack([one(*sample) for sample in zip(*part, strict=True)]))
    return torch.cat(parts)
