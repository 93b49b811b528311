"""Gradients of a loss by name, and how far apart two are."""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


def gradients(loss: Tensor, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """∇L by name, zero where the loss does not depend on a tensor.

    Args:
        loss: L.
        weights: tensors by name that require a gradient.
    """
    if not weights:
        return {}
    found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(weights, found, strict=True))


def norm(tensors: Iterable[Tensor]) -> float:
    """Norm of the finite elements.

    Args:
        tensors: of any shapes.
    """
    return math.hypot(*(float(tensor.abs().float().nan_to_num(0, 0, 0).norm()) for tensor in tensors))


def distance(one: Iterable[Tensor], other: Iterable[Tensor]) -> float:
    """Norm of the difference; elements that are non-finite alike in both are the user's own, and do not count.

    Args:
        one: tensors of any shapes.
        other: as many of the same shapes.
    """

    def apart(a: Tensor, b: Tensor) -> float:
        same = (a == b) | (a.isnan() & b.isnan())
        return float(torch.where(same, torch.zeros_like(b), a - b).abs().float().norm())

    return math.hypot(*(apart(a, b) for a, b in zip(one, other, strict=True)))
