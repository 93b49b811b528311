"""Curvature of the loss at a point, by Hessian-vector products."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import zip_longest

import torch
from torch import Tensor
from torch.nn.functional import pad

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
    tridiagonal, basis = _checked_lanczos(loss, weights, gradients, start, iterations, index, rtol, max_iterations)
    finite = torch.isfinite(tridiagonal).all(dim=(1, 2))
    sizes = _largest(tridiagonal).to(weights.dtype)
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
    rtol: float = 0.0,
    max_iterations: int | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """See `lanczos`: by differences, and by exact products in those rows where smaller differences disagree.

    Differences tell of the curvature some way off: that of a classifier with large margins is a hundred times as large
    there. Across kinks, as of a ReLU, they grow as they shrink, and are not linear in their direction: along the
    stiffest one they are neither what those along others told, nor the same over an eighth of the way.
    """
    lengths = iterations, rtol, max_iterations
    step = CURVATURE.relative_step if loss.sample_bytes is None else CURVATURE.short_step
    by_difference = partial(difference_product, loss, weights, gradients, index=index)
    differences = partial(lanczos, partial(by_difference, relative_step=step), start, *lengths)
    tridiagonal, basis, asymmetry = differences(max_asymmetry=CURVATURE.agreement)
    off = asymmetry > CURVATURE.agreement
    if not off.all():
        stiffest, value = _stiffest(tridiagonal, basis)
        again, closer = (by_difference(stiffest, relative_step=share * step) for share in (1, 1 / 8))
        change = (torch.linalg.vecdot(closer, stiffest) - value).abs()
        off |= ~(torch.maximum(change, (again - closer).norm(dim=1)) <= CURVATURE.agreement * value.abs())
    if off.any() and loss.has_second_derivatives(weights):
        exact, exact_basis, _ = lanczos(partial(loss.hessian_products, weights, index=index), start, *lengths)
        size = max(len(basis), len(exact_basis))
        padded = [pad(own, (0, size - own.shape[1]) * 2) for own in (exact, tridiagonal)]
        tridiagonal = torch.where(off[:, None, None], *padded)
        pairs = zip_longest(exact_basis, basis, fillvalue=torch.zeros_like(start))
        basis = [torch.where(off[:, None], *pair) for pair in pairs]
    elif len(basis) < iterations:  # given up for nothing
        return differences()[:2]
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
) -> tuple[Tensor, Tensor]:
    """Displacements from w* that are nearly distributed as the posterior of the quadratic loss with the same Hessian H.

    (nβH + γ)^{−½}·z has the covariance (nβH + γ)⁻¹; it is approximated in the Krylov space of z and H (Chow & Saad
    2014, SIAM J. Sci. Comput. 36, A588). A chain that starts there has little left to forget. Where the loss climbs
    more than its curvature at w* tells, chains would come down by few steps at a time, and meet curvatures on the way
    that throw them out: the start descends, by Polyak's steps, which leave it as far from w* along flat directions as
    it was. What is still too high is drawn nearer to w*.

    Args:
        loss: of R rows.
        weights: w* of each row, [R, D].
        base: L and ∇L there, [R] and [R, D].
        normal: z, [R, D].
        nbeta: nβ.
        localization: γ.
        index: [R, B] samples for each row; None for all of them.

    Returns:
        Displacements, [R, D], zero where the Hessian is not finite; and whether they were drawn nearer, so that flat
        directions are not filled, [R].
    """
    losses, gradients = base
    if loss.sample_bytes is None:
        tridiagonal, basis = _checked_lanczos(loss, weights, gradients, normal, CURVATURE.start_products, index)
    else:  # gradients take long: a start that is off is forgotten sooner
        product = partial(difference_product, loss, weights, gradients, index=index, relative_step=CURVATURE.short_step)
        tridiagonal, basis, _ = lanczos(product, normal, CURVATURE.start_products)
    finite = torch.isfinite(tridiagonal).all(dim=(1, 2))
    values, vectors = torch.linalg.eigh(tridiagonal.nan_to_num())
    shrunk = (nbeta * values.clamp(min=0) + localization).rsqrt()
    coefficients = torch.einsum("rij,rj,rj->ri", vectors, shrunk, vectors[:, 0]).to(weights.dtype)
    coefficients *= torch.where(finite, normal.norm(dim=1), 0)[:, None]
    displacement = torch.where(finite[:, None], _combined(basis, coefficients), 0)
    # What the loss climbs by its curvature alone.
    bowl = torch.einsum("ri,rij,rj->r", coefficients.double(), tridiagonal.nan_to_num(), coefficients.double())
    bowl = 0.5 * nbeta * bowl.clamp(min=0)
    rounding = 1 + nbeta * CURVATURE.loss_rounding * losses.abs()

    def climb_and_slope() -> tuple[Tensor, Tensor]:
        there, slope = loss.gradients(weights + displacement, index)
        return nbeta * (there - losses - torch.linalg.vecdot(gradients, displacement)), slope - gradients

    climb, slope = climb_and_slope()
    lowest, lowest_climb = displacement, climb
    for _ in range(CURVATURE.start_descents):
        steep = ~(lowest_climb <= CURVATURE.start_climb * bowl + 3 * bowl.sqrt() + rounding)
        if not steep.any():
            break
        # Polyak's step towards what the curvature tells; half of the way to w* at most.
        down = (climb - bowl) / (nbeta * slope.square().sum(1))
        down = torch.minimum(down, 0.5 * displacement.norm(dim=1) / slope.norm(dim=1)).to(slope.dtype)
        moves = steep & torch.isfinite(down)
        displacement = torch.where(moves[:, None], displacement - down[:, None] * slope, displacement)
        climb, slope = climb_and_slope()
        lower = climb < lowest_climb
        lowest = torch.where(lower[:, None], displacement, lowest)
        lowest_climb = torch.where(lower, climb, lowest_climb)
    displacement, nearer = lowest, torch.zeros_like(finite)
    slack = rounding + CURVATURE.start_slack * weights.shape[1]
    for _ in range(CURVATURE.start_halvings):
        steep = ~(lowest_climb <= CURVATURE.start_climb * bowl + 3 * bowl.sqrt() + slack)
        if not steep.any():
            break
        displacement = torch.where(steep[:, None], 0.5 * displacement, displacement)
        bowl, nearer = torch.where(steep, 0.25 * bowl, bowl), nearer | steep
        lowest_climb = torch.where(steep, climb_and_slope()[0], lowest_climb)
    return displacement, nearer


def lanczos(
    product: Callable[[Tensor], Tensor],
    start: Tensor,
    iterations: int,
    rtol: float = 0.0,
    max_iterations: int | None = None,
    max_asymmetry: float = math.inf,
) -> tuple[Tensor, list[Tensor], Tensor]:
    """The Hessian of each row in the Krylov space of a vector (Golub & Van Loan, ch. 10): H ≈ V·T·Vᵀ.

    Args:
        product: v → ∇²L·v, [R, D] each; its result may be written to.
        start: [R, D].
        iterations: products at least.
        rtol: a row has more of them while the last two add more than this share to its largest |eigenvalue|.
        max_iterations: products at most; None for `iterations`.
        max_asymmetry: it ends, before those `iterations`, once no row is as symmetric as this.

    Returns:
        T, [R, m, m] in float64, zero beyond the products of a row; the m columns of V, [R, D] each; and by how much
        u·Hv and v·Hu of the first `iterations` products, one after the other, differ at most, relative to the largest
        |eigenvalue| so far, [R].
    """
    direction = start / start.norm(dim=1, keepdim=True)
    before = torch.zeros_like(direction)
    overlap = start.new_zeros(len(start))
    diagonal, off_diagonal, basis = [], [], []
    most = max_iterations or iterations
    lengths = torch.full((len(start),), most, device=start.device)
    asymmetry = torch.zeros(len(start), dtype=torch.float64, device=start.device)
    for made in range(1, most + 1):
        basis.append(direction)
        image = product(direction)
        difference = (torch.linalg.vecdot(image, before) - overlap).abs()
        diagonal.append(torch.linalg.vecdot(image, direction))
        image.addcmul_(diagonal[-1][:, None], direction, value=-1).addcmul_(overlap[:, None], before, value=-1)
        overlap = image.norm(dim=1)
        off_diagonal.append(overlap)
        # Where the space is exhausted, or the loss flat, nothing remains: keep the direction, at weight zero.
        before, direction = direction, torch.where(overlap[:, None] > 0, image / overlap[:, None], direction)
        if 1 < made <= iterations:
            largest = _largest(_tridiagonal(diagonal, off_diagonal))
            asymmetry = torch.maximum(asymmetry, difference / largest.clamp(min=torch.finfo(start.dtype).tiny))
            if (asymmetry > max_asymmetry).all():
                break
        if iterations <= made < most:
            so_far = _tridiagonal(diagonal, off_diagonal)
            largest, smaller = _largest(so_far), _largest(so_far[:, :-2, :-2])
            lengths = torch.where(largest - smaller <= rtol * largest, lengths.clamp(max=made), lengths)
            if (lengths <= made).all():
                break
    inside = torch.arange(len(basis), device=start.device) < lengths[:, None]
    of_all = _tridiagonal(diagonal, off_diagonal)
    return torch.where(inside[:, :, None] & inside[:, None, :], of_all, 0), basis, asymmetry


def _tridiagonal(diagonal: Sequence[Tensor], off_diagonal: Sequence[Tensor]) -> Tensor:
    """T of each row, [R, m, m] in float64, from m diagonals [R] and as many beside them, the last unused."""
    matrix = torch.diag_embed(torch.stack(tuple(diagonal), 1).double())
    for offset in (1, -1):
        matrix += torch.diag_embed(torch.stack(tuple(off_diagonal[:-1]), 1).double(), offset=offset)
    return matrix
