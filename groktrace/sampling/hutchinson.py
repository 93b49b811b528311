"""The trace of the Hessian from random directions."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from groktrace.sampling.curvature import hessian_operator
from groktrace.sampling.interruption import check_interruption
from groktrace.sampling.posterior import StackedLoss


def hessian_trace(
    loss: StackedLoss, weights: Tensor, generators: Sequence[torch.Generator], vectors: int
) -> tuple[Tensor, Tensor]:
    """The Hessian's trace of each row, as the mean of vᵀ∇²L·v over random signs v (Hutchinson 1990).

    One such product has variance 2·Σ_{i≠j} H_ij²; the standard error is taken from their scatter.

    Args:
        loss: of R rows.
        weights: [R, D].
        generators: one a row, so that a row's result does not depend on what it is stacked with.
        vectors: m, at least 2; each costs about three gradients.

    Returns:
        The traces and their standard errors, [R] each.
    """
    dimension = weights.shape[1]
    product = hessian_operator(loss, weights)
    direction = torch.empty_like(weights)
    found = []
    for _ in range(vectors):
        check_interruption()
        for row, generator in zip(direction, generators, strict=True):
            row.bernoulli_(0.5, generator=generator)
        direction.mul_(2).sub_(1).div_(math.sqrt(dimension))
        found.append(dimension * torch.linalg.vecdot(product(direction), direction))
    values = torch.stack(found).double()
    return values.mean(0), values.std(0) / math.sqrt(vectors)
