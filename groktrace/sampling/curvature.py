"""Curvature of the loss at a point, by Hessian-vector products."""

import torch
from torch import Tensor

from groktrace.sampling.posterior import StackedLoss

_RELATIVE_STEP = 5e-3


def hessian_product(loss: StackedLoss, weights: Tensor, direction: Tensor) -> Tensor:
    """∇²L·v of each row by a central difference of gradients.

    Two gradients a product; it needs no second derivative, which fused kernels lack. In float32 it agrees with the
    exact product to about 1e-4.

    Args:
        loss: of R rows.
        weights: [R, D].
        direction: [R, D], unit rows.

    Returns:
        [R, D].
    """
    norm = weights.norm(dim=1, keepdim=True)
    delta = _RELATIVE_STEP * torch.where(norm > 0, norm, torch.ones_like(norm))
    _, above = loss.gradients(weights + delta * direction)
    _, below = loss.gradients(weights - delta * direction)
    return (above - below) / (2 * delta)


def top_eigenvalue(loss: StackedLoss, weights: Tensor, start: Tensor, iterations: int = 8) -> Tensor:
    """Largest |eigenvalue| of the Hessian of each row, from below, by Lanczos iteration (Golub & Van Loan, ch. 10).

    Args:
        loss: of R rows.
        weights: [R, D].
        start: [R, D] random directions.
        iterations: products; eight come within 6 % on networks (1 % in the median), ten power iterations within 11 %.

    Returns:
        [R].
    """
    direction = start / start.norm(dim=1, keepdim=True)
    before = torch.zeros_like(direction)
    overlap = weights.new_zeros(len(weights))
    diagonal, off_diagonal = [], []
    for _ in range(iterations):
        product = hessian_product(loss, weights, direction)
        diagonal.append(torch.linalg.vecdot(product, direction))
        product.sub_(diagonal[-1][:, None] * direction).sub_(overlap[:, None] * before)
        overlap = product.norm(dim=1)
        off_diagonal.append(overlap)
        # Where the space is exhausted, or the loss flat, nothing remains: keep the direction, at weight zero.
        before, direction = direction, torch.where(overlap[:, None] > 0, product / overlap[:, None], direction)
    tridiagonal = torch.diag_embed(torch.stack(diagonal, 1).double())
    for offset in (1, -1):
        tridiagonal += torch.diag_embed(torch.stack(off_diagonal[:-1], 1).double(), offset=offset)
    finite = torch.isfinite(tridiagonal).all(dim=(1, 2))
    sizes = torch.linalg.eigvalsh(tridiagonal.nan_to_num()).abs().amax(1).to(weights.dtype)
    return torch.where(finite, sizes, torch.nan)
