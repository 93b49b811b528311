"""Control variates: what the gradients of minibatches are at w*, and where their noise goes."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from groktrace.sampling.batches import Minibatches
from groktrace.sampling.curvature import difference_product, lanczos
from groktrace.sampling.kernels.base import Dynamics
from groktrace.sampling.network import shuffled
from groktrace.sampling.noise import generator_for
from groktrace.sampling.posterior import StackedLoss
from groktrace.sampling.settings import ResolvedSettings
from groktrace.sampling.tuning import MEMORY, MINIBATCH_NOISE


@dataclass(frozen=True)
class ControlVariates:
    """What control variates need of the parts that batches are, at each snapshot (Baker et al. 2019).

    Attributes:
        losses: L_k(w*) of each batch, [S, K].
        shifts: ∇L(w*) − ∇L_k(w*), [S, K, D].
        gradients: ∇L(w*), the mean over the batches, [S, D].
        snapshot: of each row, [R].
    """

    losses: Tensor
    shifts: Tensor
    gradients: Tensor
    snapshot: Tensor

    @classmethod
    def of(cls, loss: StackedLoss, anchors: Tensor, parts: Tensor, snapshot: Tensor) -> "ControlVariates":
        """Those of some batches, from one look at each.

        Args:
            loss: of S rows.
            anchors: w* of each snapshot, [S, D].
            parts: [K, B] the samples of each batch.
            snapshot: of each chain, [R].
        """
        losses = anchors.new_empty(len(anchors), len(parts))
        shifts = anchors.new_empty(len(anchors), len(parts), anchors.shape[1])
        for k, batch in enumerate(parts):
            losses[:, k], shifts[:, k] = loss.gradients(anchors, batch.expand(len(anchors), -1).contiguous())
        gradients = shifts.mean(1)
        torch.sub(gradients[:, None], shifts, out=shifts)
        return cls(losses, shifts, gradients, snapshot)

    def mean(self) -> tuple[Tensor, Tensor]:
        """L(w*) and ∇L(w*) of each row, [R] and [R, D]."""
        return self.losses.mean(1)[self.snapshot], self.gradients[self.snapshot]

    def select(self, rows: Tensor) -> "ControlVariates":
        """That of some of the rows."""
        return replace(self, snapshot=self.snapshot[rows])


def begin_batches(
    loss: StackedLoss, anchors: Tensor, snapshot: Tensor, keys: Sequence[tuple[int, int]], settings: ResolvedSettings
) -> tuple[Minibatches | None, ControlVariates | None]:
    """What draws the minibatches of chains, and their control variates where these can be kept.

    Args:
        loss: of S rows.
        anchors: w* of each snapshot, [S, D].
        snapshot: of each chain, [R].
        keys: of each chain's noise: its snapshot's, and its number there.
        settings: batch size, kernel and seed.

    Returns:
        None for both where all samples are used at once.
    """
    samples, size = len(loss.tensors[0]), settings.batch_size
    if size is None or size >= samples:
        return None, None
    generators = [generator_for(settings.seed, step, chain, "batch", anchors.device) for step, chain in keys]
    # Else some samples would never be seen.
    whole = samples % size == 0
    kept_bytes = len(anchors) * (samples // size) * anchors[0].nbytes
    if whole and not settings.kernel.vanilla and kept_bytes <= MEMORY.control_bytes:
        parts = shuffled(samples).to(anchors.device).view(-1, size)
        return Minibatches.of_parts(parts, samples, generators), ControlVariates.of(loss, anchors, parts, snapshot)
    return Minibatches.begin(samples, size, generators, anchors.device), None


def with_kept_control(
    here: Callable[[], Tensor], gradients: Tensor, batches: Minibatches, control: ControlVariates
) -> Callable[[], Tensor]:
    """L(w) − L(w*) of each row, [R], on its next batch, as a function of what tensors hold when it is called.

    Args:
        here: gives L(w) on the current batches, [R], and leaves ∇L(w) in `gradients`.
        gradients: [R, D]; those of the batches, to which what all samples have more at w* is added.
        batches: of parts; one is drawn at each call.
        control: of the same rows.
    """
    rows = list(zip(gradients, control.snapshot.tolist(), strict=True))

    def evaluate() -> Tensor:
        batches.draw()
        delta_loss = here() - control.losses[control.snapshot, batches.number]
        for (row, s), number in zip(rows, batches.number.tolist(), strict=True):
            row.add_(control.shifts[s, number])
        return delta_loss

    return evaluate


def stiff_share(
    loss: StackedLoss,
    weights: Tensor,
    batches: Minibatches,
    control: ControlVariates,
    displacement: Tensor,
    rows: Tensor,
    dynamics: Dynamics,
) -> Tensor:
    """What the noise of minibatches adds to λ̂, over what it would if all directions were stiff; see `share_of_stiff`.

    Args:
        loss: of R rows.
        weights: where the chains are, [R, D].
        batches: theirs, of parts; some are drawn.
        control: of the same rows.
        displacement: w − w*, [R, D]; its direction is taken where there is no noise.
        rows: those that are looked at, [S].
        dynamics: of the chains.

    Returns:
        [S]; NaN where it cannot be told.
    """
    loss, weights, snapshots = loss.select(rows), weights[rows], control.snapshot[rows]
    noise = torch.zeros_like(weights)
    for sign in (1.0, -1.0):
        batches.draw()
        gradients = loss.gradients(weights, batches.index[rows])[1]
        noise.add_(gradients, alpha=sign).add_(control.shifts[snapshots, batches.number[rows]], alpha=sign)
    silent = noise.norm(dim=1) == 0  # twice the same batch, or a loss without any
    noise[silent] = displacement[rows][silent]

    # A batch is steeper along its own noise than all samples are: of others, and of enough that they stand for all.
    some = []
    for _ in range(math.ceil(MINIBATCH_NOISE.share_samples / batches.index.shape[1])):
        batches.draw()
        some.append(batches.index[rows])
    index = torch.cat(some, 1)
    product = partial(difference_product, loss, weights, loss.gradients(weights, index)[1], index=index)
    return share_of_stiff(product, noise, dynamics.select(rows))


def share_of_stiff(product: Callable[[Tensor], Tensor], noise: Tensor, dynamics: Dynamics) -> Tensor:
    """What noise in the gradients adds to λ̂, over what `Kernel.noise_gain` tells of stiff directions and small steps.

    In a direction where U has the curvature a = nβh + γ it adds nβh/a of that, and 1/(1 − εa/4) times as much where a
    step ε is not small (of all three kernels, from their stationary variance in a bowl). The quadratic form of that
    function of the Hessian in a sample of the noise comes from the noise's Krylov space (Golub & Meurant 2010).

    Args:
        product: v → ∇²L·v, [R, D] each.
        noise: a sample of it, [R, D].
        dynamics: of the rows.

    Returns:
        [R]; NaN where a product is not finite.
    """
    tridiagonal, _, _ = lanczos(product, noise, MINIBATCH_NOISE.share_products)
    values, vectors = torch.linalg.eigh(tridiagonal.nan_to_num())
    stiff = dynamics.nbeta * values.clamp(min=0)
    total = stiff + dynamics.localization
    large = 1 - 0.25 * dynamics.step_size[:, None] * total
    share = (vectors[:, 0].square() * stiff / (total * large.clamp(min=MINIBATCH_NOISE.min_stability))).sum(1)
    return torch.where(torch.isfinite(tridiagonal).all(dim=(1, 2)), share, torch.nan).to(noise.dtype)
