"""Chains of many snapshots: what they draw, and how noisy their gradients are."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from groktrace.sampling.batches import NoiseProfile
from groktrace.sampling.control import share_of_stiff
from groktrace.sampling.curvature import difference_product
from groktrace.sampling.engine import Attempt, Target, sample_with_restarts
from groktrace.sampling.posterior import StackedLoss
from groktrace.sampling.settings import ResolvedSettings
from groktrace.sampling.stack import StackedChains
from groktrace.sampling.traces import Traces
from groktrace.sampling.tuning import EQUILIBRIUM, MEMORY, MINIBATCH_NOISE

_STATE_VECTORS = 10


def rows_per_stack(loss: StackedLoss, batch_size: int | None = None) -> int:
    """How many chains are advanced at once: as many as fit the working set.

    Args:
        loss: probed.
        batch_size: samples a gradient; None for all.
    """
    row = loss.gradient_bytes(batch_size) + _STATE_VECTORS * loss.layout.size * 4
    budget = MEMORY.stack_bytes if loss.device.type == "cpu" else MEMORY.stack_bytes_elsewhere
    return max(1, budget // row) if loss.vectorised else 1


def sample(
    loss: StackedLoss,
    anchors: Tensor,
    steps: Sequence[int],
    settings: ResolvedSettings,
    nbeta: float,
    localization: float,
    step_sizes: Sequence[float],
    needed: Callable[[Traces], float],
    whole: StackedLoss | None = None,
    sample_losses: bool = False,
    fitting: Sequence[float] | None = None,
) -> list[Traces]:
    """Run all chains of S snapshots.

    Args:
        loss: of S rows.
        anchors: w* of each snapshot, [S, D].
        steps: the key of each one's noise: its training step, or a number of its own.
        settings: kernel, chains, batch size, run length.
        nbeta: nβ.
        localization: γ.
        step_sizes: ε of each snapshot; see `sample_with_restarts`.
        needed: how many times as many draws a snapshot needs, at most 1 where they suffice; asked only where
            `settings.draws` is None.
        whole: the same loss without batches, for snapshots whose chains those throw out; None to reduce ε instead.
        sample_losses: whether to keep the loss of each sample at each draw; for losses that are a mean over samples.
        fitting: the ε that the curvature at w* calls for; None where those are `step_sizes`.

    Returns:
        Traces of each snapshot, those of the last attempt where its chains diverged at every step size tried.
    """
    subsampled = loss.sample_bytes is not None
    target = Target(settings, nbeta, localization, anchors.shape[1], subsampled, sample_losses)

    def begin(attempt: Attempt) -> StackedChains:
        rows = torch.tensor(attempt.snapshots, device=anchors.device)
        chosen = loss if attempt.in_batches or whole is None else whole
        own = settings if attempt.in_batches else replace(settings, batch_size=None)
        keys = [steps[s] for s in attempt.snapshots]
        scales = attempt.step_sizes, attempt.halvings, attempt.fitting
        return StackedChains(chosen.select(rows), anchors[rows], keys, replace(target, settings=own), *scales)

    dearer = None if whole is None or settings.batch_size is None else len(whole.tensors[0]) / settings.batch_size
    return sample_with_restarts(begin, step_sizes, target, needed, dearer, fitting)


def profile_noise(
    loss: StackedLoss,
    anchor: Tensor,
    key: int,
    settings: ResolvedSettings,
    nbeta: float,
    localization: float,
    epsilon: float,
) -> NoiseProfile:
    """How noisy gradients of samples are where two chains are, each with samples of its own.

    They may start too far along stiff directions, which they forget in a few steps. What counts is the place after
    these; the start tells of losses that are far from quadratic, where chains come by such places now and then. Of the
    two starts it is the calmer one: one in six is ten times as noisy as others in a network whose batches do no harm.

    Args:
        loss: of one row, and of 64 samples or more.
        anchor: w*, [1, D].
        key: of the snapshot's noise.
        settings: of the sampling.
        nbeta: nβ.
        localization: γ.
        epsilon: ε.
    """
    group, batch = MINIBATCH_NOISE.group_samples, MINIBATCH_NOISE.profile_batch
    stored = len(loss.tensors[0]) // MINIBATCH_NOISE.profiled_multiple * MINIBATCH_NOISE.profiled_multiple
    loss = replace(loss, tensors=tuple(tensor[:stored] for tensor in loss.tensors))
    settings = replace(settings, chains=2, batch_size=batch)
    target = Target(settings, nbeta, localization, anchor.shape[1], loss.sample_bytes is not None)
    chains = StackedChains(loss, anchor, [key], target, [epsilon], [0], [epsilon])
    start = chains.state.displacement.clone()
    chains.advance([(EQUILIBRIUM.min_burn_in, 0)])
    settled, dynamics = chains.state.displacement, chains.dynamics

    rows = torch.zeros(2, dtype=torch.long, device=anchor.device)
    loss, anchors = loss.select(rows), anchor[rows]
    profiled = MINIBATCH_NOISE.profiled
    if loss.sample_bytes is not None:
        profiled = max(profiled, MINIBATCH_NOISE.profiled_bytes // loss.sample_bytes)
    profiled = min(stored, profiled // MINIBATCH_NOISE.profiled_multiple * MINIBATCH_NOISE.profiled_multiple)
    groups = torch.arange(profiled, device=anchor.device).view(-1, 2, group)  # [G, chains, samples]
    at_anchor = [loss.gradients(anchors, samples)[1].clone() for samples in groups]

    def share(displacement: Tensor, noise: Tensor, row: int) -> float:
        # Along its own noise the curvature of a sample is larger: the other's.
        of_row, position = loss.select(rows[:1]), anchor + displacement[row]
        samples = groups[::2, 1 - row].reshape(1, -1)  # half of these will do
        gradient = of_row.gradients(position, samples)[1]
        curvature = partial(difference_product, of_row, position, gradient, index=samples)
        return float(share_of_stiff(curvature, noise[row : row + 1], dynamics.select(rows[:1] + row)))

    def noise_at(displacement: Tensor) -> tuple[Tensor, Tensor, np.ndarray, np.ndarray]:
        """∇L − ∇L(w*), a sample of its noise, its variance of single samples, and (w − w*)·nβ∇L, each by chain."""
        change, noise, squares = torch.zeros_like(anchors), torch.zeros_like(anchors), torch.zeros(2).double()
        for number, (samples, there) in enumerate(zip(groups, at_anchor, strict=True)):
            own = loss.gradients(anchors + displacement, samples)[1].sub_(there)
            change += own
            # With alternating signs, of an even number, the sum has the directions of a group's noise.
            noise.add_(own, alpha=(-1.0) ** number)
            squares += own.double().square().sum(1).cpu()
        change /= len(groups)
        variance = group * (squares - len(groups) * change.double().square().sum(1).cpu()) / (len(groups) - 1)
        # About the mean, as λ_c: twice that in a bowl.
        virial = nbeta * torch.linalg.vecdot(displacement, change).abs().double().cpu()
        return change, noise, variance.numpy(), virial.clamp(min=1e-300).numpy()

    gain = float(dynamics.noise_gain[0]) * nbeta**2
    _, noise, variance, virial = noise_at(start)
    calm = int(np.argmin(variance / virial))
    at_start = gain * share(start, noise, calm) * variance[calm] / virial[calm]
    change, noise, variance, virial = noise_at(settled)
    stiff_variance = sum(share(settled, noise, row) * variance[row] for row in range(2))
    heating = np.maximum(gain * stiff_variance / virial.sum(), at_start / MINIBATCH_NOISE.start_discount)

    # H(w − w*) of one chain, and the curvature of the other's samples along it.
    stiff = (change / change.norm(dim=1, keepdim=True).clamp(min=torch.finfo(change.dtype).tiny)).flip(0)
    curvatures = torch.stack(
        [
            torch.linalg.vecdot(difference_product(loss, anchors, there, stiff, samples), stiff)
            for samples, there in zip(groups, at_anchor, strict=True)
        ]
    ).double()
    curvature_variance = group * (curvatures.var(0) / curvatures.mean(0).square()).mean()
    return NoiseProfile(float(heating), float(curvature_variance))
