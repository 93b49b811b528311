"""Losses of networks that know nothing: how far a network can climb out of its basin."""

import contextlib
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from groktrace.analysis.tuning import MEASUREMENT
from groktrace.run.task import Task
from groktrace.sampling.network import as_float


def chance_losses(
    task: Task,
    weights: Mapping[str, Tensor],
    device: torch.device,
    together: int | None = None,
    untrained: bool = True,
) -> tuple[float, ...]:
    """Training losses of networks that know nothing, the better one first; those that are not finite are left out.

    They are that of a network whose weights are all zero, so that it says the same of every sample, and that of a run's
    first snapshot.

    Args:
        task: loss and data.
        weights: tensors by name, of a snapshot.
        device: where to compute.
        together: samples that may be evaluated at once; None for all.
        untrained: whether it is a run's first. Another has learned, and its loss here may lie just above that on all
            samples, as if it could hardly climb.
    """
    count = min(MEASUREMENT.chance_samples, together or MEASUREMENT.chance_samples)
    some = task.train.take(torch.arange(0, len(task.train), math.ceil(len(task.train) / count), device="cpu"))
    own = {name: as_float(tensor).to(device) for name, tensor in weights.items()}
    # A single zero that is seen as many takes no memory.
    none = {name: t.new_zeros(()).expand(t.shape) if t.is_floating_point() else t for name, t in own.items()}
    losses = []
    for tensors in (none, own) if untrained else (none,):
        for batch in (some, task.train) if together is None else (some,):  # some programs take one batch size only
            with contextlib.suppress(Exception), torch.no_grad():
                losses.append(float(task.forward(tensors, batch.to(device).tensors)[0]))
                break
    return tuple(loss for loss in losses if math.isfinite(loss))


def level_of_chance(levels: Sequence[float], loss: float) -> float:
    """The loss of a network that knows nothing, to which one with the given loss can climb; infinite if there is none.

    Args:
        levels: losses of such networks, the better one first: one that is below the given loss knows something.
        loss: at the snapshot.
    """
    return next((level for level in levels if level > loss), math.inf)
