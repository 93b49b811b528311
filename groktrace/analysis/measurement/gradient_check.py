"""Whether the gradient that chains follow is that of the loss."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from groktrace.analysis.tuning import MEASUREMENT
from groktrace.run.task import Task
from groktrace.sampling.weights import WeightLayout


def wrong_gradient(task: Task, layout: WeightLayout, weights: Mapping[str, Tensor], device: torch.device) -> str:
    """What is wrong with ∇L: by how much it is off the differences of L, and of which weights; empty where nothing is.

    It is off where a loss stops gradients on their way (`detach`, `no_grad`), and where an operation's backward is not
    its derivative (`padding_idx`, `scale_grad_by_freq`, rounding that is straight-through). Differences along random
    directions are taken in double precision, near the weights, on a few samples. Nothing is said where they do not
    tell: differences over two distances have to agree.

    Args:
        task: loss and data.
        layout: the sampled weights.
        weights: tensors by name, of any snapshot.
        device: where to compute.
    """
    if layout.size > MEASUREMENT.max_differentiated:
        return ""
    try:
        check = _Differences(task, layout, weights, device)
        off = check.off(layout.names)
        if off is None or off <= MEASUREMENT.gradient_rtol:
            return ""
        shares = {name: check.off([name]) or 0.0 for name in layout.names}
    except Exception:  # some programs take one number of samples or one precision only
        return ""
    worst = [name for name, share in shares.items() if share > MEASUREMENT.gradient_rtol] or list(layout.names)
    return f"by {100 * min(off, 1.0):.0f} %, that of {', '.join(worst[:3])}{', ...' if len(worst) > 3 else ''}"


class _Differences:
    """A loss and its gradient near some weights, in double precision."""

    def __init__(self, task: Task, layout: WeightLayout, weights: Mapping[str, Tensor], device: torch.device) -> None:
        count = len(task.train)
        some = torch.arange(0, count, max(1, count // MEASUREMENT.differentiated_samples))
        batch = task.train.take(some[: MEASUREMENT.differentiated_samples]).to(device)
        self._tensors = tuple(_in_double(tensor) for tensor in batch.tensors)
        self._forward, self._random = task.forward, torch.Generator().manual_seed(0)
        self._weights = {name: _in_double(tensor.detach().to(device)) for name, tensor in weights.items()}
        sampled = {name: self._weights[name] for name in layout.names}
        norm = math.sqrt(sum(float(tensor.abs().square().sum()) for tensor in sampled.values()))
        self._scale = norm / math.sqrt(layout.size) or 1.0
        self._weights |= self._moved(self._direction(layout.names), MEASUREMENT.differentiated_distance)
        sampled = {name: self._weights[name].detach().requires_grad_() for name in layout.names}
        loss = self._loss(sampled)
        found = torch.autograd.grad(loss, list(sampled.values()), allow_unused=True)
        self._gradients = {
            name: torch.zeros_like(tensor) if gradient is None else gradient
            for (name, tensor), gradient in zip(sampled.items(), found, strict=True)
        }

    def off(self, names: Sequence[str]) -> float | None:
        """How far ∇L is off along these weights, relative to the larger of it and the differences; None: not told."""
        near, far, slopes = [], [], []
        for _ in range(MEASUREMENT.differences):
            direction = self._direction(names)
            near.append(self._difference(direction, MEASUREMENT.difference_distance))
            far.append(self._difference(direction, 3 * MEASUREMENT.difference_distance))
            slopes.append(self._slope(direction))
        nearer, farther, slope = (torch.tensor(values, dtype=torch.float64) for values in (near, far, slopes))
        wrong, unsure = (nearer - slope).norm(), (nearer - farther).norm()
        if not bool(wrong > 4 * unsure):  # nor where any is NaN
            return None
        return float(wrong / max(nearer.norm(), slope.norm()))

    def _direction(self, names: Sequence[str]) -> dict[str, Tensor]:
        return {
            name: torch.randn(self._weights[name].shape, generator=self._random, dtype=self._weights[name].dtype).to(
                self._weights[name].device
            )
            for name in names
        }

    def _moved(self, direction: Mapping[str, Tensor], distance: float) -> dict[str, Tensor]:
        """Weights that are so far away, relative to those of all sampled ones in the root mean square."""
        return {name: self._weights[name] + distance * self._scale * step for name, step in direction.items()}

    def _loss(self, weights: Mapping[str, Tensor]) -> Tensor:
        return self._forward({**self._weights, **weights}, self._tensors)[0]

    @torch.no_grad()
    def _difference(self, direction: Mapping[str, Tensor], distance: float) -> float:
        up, down = (float(self._loss(self._moved(direction, sign * distance))) for sign in (1, -1))
        return (up - down) / (2 * distance)

    def _slope(self, direction: Mapping[str, Tensor]) -> float:
        return self._scale * sum(
            float((self._gradients[name].conj() * step).real.sum()) for name, step in direction.items()
        )


def _in_double(tensor: Tensor) -> Tensor:
    if tensor.is_complex():
        return tensor.to(torch.complex128)
    return tensor.double() if tensor.is_floating_point() else tensor
