"""Curvature of the loss at a point, by Hessian-vector products."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from groktrace.sampling.posterior import StackedLoss
from groktrace.sampling.tuning import CURVATURE


def difference_product(
    loss: StackedLoss,
    weights: Tensor,
    gradients: Tensor,
    direction: Tensor,
    index: Tensor | None = None,
    relative_step: float = CURVATURE.relative_step,
) -> Tensor:
    """∇²L·v of each row by a difference of gradients.

    One gradient a product; it needs no second derivative, which fused kernels lack. Where the loss is smooth within a
    thousandth of the weights' norm it agrees with the exact product to about 1e-3; along the stiffest directions of a
    classifier with large margins it is a hundred times too large and more.

    Args:
        loss: of R rows.
        weights: [R, D].
        gradients: ∇L there, [R, D].
        direction: [R, D], unit rows.
        index: [R, B] samples for each row; None for all of them.
        relative_step: of the difference, to ‖w‖.

    Returns:
        [R, D].
    """
    norm = weights.norm(dim=1, keepdim=True)
    delta = relative_step * torch.where(norm > 0, norm, torch.ones_like(norm))
    _, moved = loss.gradients(torch.addcmul(weights, delta, direction), index)
    return moved.sub_(gradients).div_(delta)


def hessian_operator(loss: StackedLoss, weights: Tensor) -> Callable[[Tensor], Tensor]:
    """The Hessian as a function of unit rows, exact or by differences where the loss has no second derivatives.

    Args:
        loss: of R rows.
        weights: [R, D].

    Returns:
        v → ∇²L·v, [R, D] each.
    """
    if loss.has_second_derivatives(weights):
        return partial(loss.hessian_products, weights)
    return partial(difference_product, loss, weights, loss.gradients(weights)[1])


def top_eigenvalue(
    loss: StackedLoss,
    weights: Tensor,
    start: Tensor,
    iterations: int = 8,
    index: Tensor | None = None,
    rtol: float = 0.0,
    max_iterations: int | None = None,
) -> Tensor:
    """Largest |eigenvalue| of the Hessian of each row, from below; zero where it is no more than rounding.

    Args:
        loss: of R rows.
        weights: [R, D].
        start: [R, D] random directions.
        iterations: products; eight come within 6 % on networks (1 % in the median), ten power iterations within 11 %.
        index: [R, B] samples for each row; None for all of them.
        rtol: more products are made while the last two add more than this share: one alone can miss an eigenvalue.
        max_iterations: largest number of products; None for `iterations`.

    Returns:
        [R]; NaN where the loss is not finite.
    """
    losses, gradients = loss.gradients(weights, index)
    kept: dict[int, float] = {}  # of rows that have settled, so that no row depends on the others

    def goes_on(tridiagonal: Tensor) -> bool:
        now, before = _largest(tridiagonal), _largest(tridiagonal[:, :-2, :-2])
        for row, (one, other) in enumerate(zip(now.tolist(), before.tolist(), strict=True)):
            if row not in kept and (one - other <= rtol * one or tridiagonal.shape[1] >= max_iterations):
                kept[row] = one
        return len(kept) < len(now)

    goes_on_to = None if max_iterations is None else goes_on
    tridiagonal, basis = _checked_lanczos(loss, weights, gradients, start, iterations, index, goes_on_to)
    finite = torch.isfinite(tridiagonal).all(dim=(1, 2))
    sizes = _largest(tridiagonal).to(weights.dtype)
    if kept:
        sizes = sizes.new_tensor([kept[row] for row in range(len(sizes))])
    flat = (sizes > 0) & (sizes * weights.square().sum(1) < CURVATURE.flat * losses.abs())
    if flat.any():
        stiffest, value = _stiffest(tridiagonal, basis)
        far = difference_product(loss, weights, gradients, stiffest, index, CURVATURE.far_step)
        off = far.addcmul(value[:, None].to(far.dtype), stiffest, value=-1).norm(dim=1)
        sizes = torch.where(flat & ~(off <= CURVATURE.far_agreement * sizes), 0, sizes)
    return torch.where(finite, sizes, torch.nan)


def _largest(tridiagonal: Tensor) -> Tensor:
    """Of each row the largest |eigenvalue|, [R]."""
    return torch.linalg.eigvalsh(tridiagonal.nan_to_num()).abs().amax(1)


def _stiffest(tridiagonal: Tensor, basis: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Of each row the unit direction of the largest |eigenvalue| in a Krylov space, [R, D], and that value, [R]."""
    values, vectors = torch.linalg.eigh(tridiagonal.nan_to_num())
    best = values.abs().argmax(1)[:, None]
    direction = _combined(basis, vectors.gather(2, best[:, None].expand(-1, len(basis), 1))[:, :, 0])
    # Rounding makes the basis less than orthonormal.
    return direction / direction.norm(dim=1, keepdim=True), values.gather(1, best)[:, 0]


def _checked_lanczos(
    loss: StackedLoss,
    weights: Tensor,
    gradients: Tensor,
    start: Tensor,
    iterations: int,
    index: Tensor | None = None,
    goes_on: Callable[[Tensor], bool] | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """See `lanczos`: by differences, and by exact products in those rows where a smaller difference disagrees."""
    by_difference = partial(difference_product, loss, weights, gradients, index=index)
    if loss.sample_bytes is not None:  # where gradients take long, a difference that is short enough for all has to do
        return lanczos(partial(by_difference, relative_step=CURVATURE.short_step), start, iterations, goes_on)
    tridiagonal, basis = lanczos(by_difference, start, iterations)
    stiffest, value = _stiffest(tridiagonal, basis)
    closer = torch.linalg.vecdot(by_difference(stiffest, relative_step=CURVATURE.relative_step / 8), stiffest)
    off = ~((closer - value).abs() <= CURVATURE.agreement * value.abs())
    if off.any() and loss.has_second_derivatives(weights):
        exact, exact_basis = lanczos(partial(loss.hessian_products, weights, index=index), start, iterations)
        tridiagonal = torch.where(off[:, None, None], exact, tridiagonal)
        basis = [torch.where(off[:, None], b, a) for a, b in zip(basis, exact_basis, strict=True)]
    return tridiagonal, basis


def _combined(basis: Sequence[Tensor], coefficients: Tensor) -> Tensor:
    """The sum of m vectors, [R, D] each, with coefficients [R, m]; [R, D]."""
    total = torch.zeros_like(basis[0])
    for number, vector in enumerate(basis):
        total.addcmul_(vector, coefficients[:, number, None].to(total.dtype))
    return total


def gaussian_start(
    loss: StackedLoss,
    weights: Tensor,
    base: tuple[Tensor, Tensor],
    normal: Tensor,
    nbeta: float,
    localization: float,
    index: Tensor | None = None,
) -> Tensor:
    """Displacements from w* that are nearly distributed as the posterior of the quadratic loss with the same Hessian H.

    (nβH + γ)^{−½}·z has the covariance (nβH + γ)⁻¹; it is approximated in the Krylov space of z and H (Chow & Saad
    2014, SIAM J. Sci. Comput. 36, A588). A chain that starts there has little left to forget. Where the loss climbs
    more than its curvature at w* tells, the start is drawn nearer to w*: chains come down from there by few steps at a
    time, and meet curvatures on the way that throw them out.

    Args:
        loss: of R rows.
        weights: w* of each row, [R, D].
        base: L and ∇L there, [R] and [R, D].
        normal: z, [R, D].
        nbeta: nβ.
        localization: γ.
        index: [R, B] samples for each row; None for all of them.

    Returns:
        [R, D]; zero where the Hessian is not finite.
    """
    losses, gradients = base
    tridiagonal, basis = _checked_lanczos(loss, weights, gradients, normal, CURVATURE.start_products, index)
    finite = torch.isfinite(tridiagonal).all(dim=(1, 2))
    values, vectors = torch.linalg.eigh(tridiagonal.nan_to_num())
    shrunk = (nbeta * values.clamp(min=0) + localization).rsqrt()
    coefficients = torch.einsum("rij,rj,rj->ri", vectors, shrunk, vectors[:, 0]).to(weights.dtype)
    coefficients *= torch.where(finite, normal.norm(dim=1), 0)[:, None]
    displacement = torch.where(finite[:, None], _combined(basis, coefficients), 0)
    # What the loss climbs by its curvature alone; of one that is steeper further off, chains would come down slowly.
    bowl = torch.einsum("ri,rij,rj->r", coefficients.double(), tridiagonal.nan_to_num(), coefficients.double())
    bowl = 0.5 * nbeta * bowl.clamp(min=0)
    rounding = nbeta * CURVATURE.loss_rounding * losses.abs()
    for _ in range(CURVATURE.start_halvings):
        straight = losses + torch.linalg.vecdot(gradients, displacement)
        climb = nbeta * (loss.gradients(weights + displacement, index)[0] - straight)
        steep = ~(climb <= CURVATURE.start_climb * bowl + 3 * bowl.sqrt() + 1 + rounding)
        if not steep.any():
            break
        displacement[steep] *= 0.5
        bowl[steep] *= 0.25
    return displacement


def lanczos(
    product: Callable[[Tensor], Tensor],
    start: Tensor,
    iterations: int,
    goes_on: Callable[[Tensor], bool] | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """The Hessian of each row in the Krylov space of a vector (Golub & Van Loan, ch. 10): H ≈ V·T·Vᵀ.

    Args:
        product: v → ∇²L·v, [R, D] each; its result may be written to.
        start: [R, D].
        iterations: m, products.
        goes_on: whether another one is made, from T so far; None for no more.

    Returns:
        T, [R, m, m] in float64, and the m columns of V, [R, D] each.
    """
    direction = start / start.norm(dim=1, keepdim=True)
    before = torch.zeros_like(direction)
    overlap = start.new_zeros(len(start))
    diagonal, off_diagonal, basis = [], [], []
    while True:
        basis.append(direction)
        image = product(direction)
        diagonal.append(torch.linalg.vecdot(image, direction))
        image.addcmul_(diagonal[-1][:, None], direction, value=-1).addcmul_(overlap[:, None], before, value=-1)
        overlap = image.norm(dim=1)
        off_diagonal.append(overlap)
        # Where the space is exhausted, or the loss flat, nothing remains: keep the direction, at weight zero.
        before, direction = direction, torch.where(overlap[:, None] > 0, image / overlap[:, None], direction)
        if len(basis) >= iterations:
            tridiagonal = torch.diag_embed(torch.stack(diagonal, 1).double())
            for offset in (1, -1):
                tridiagonal += torch.diag_embed(torch.stack(off_diagonal[:-1], 1).double(), offset=offset)
            if goes_on is None or not goes_on(tridiagonal):
                return tridiagonal, basis
