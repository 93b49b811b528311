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
from groktrace.sampling.tuning import EQUILIBRIUM, MINIBATCH_NOISE

# Stacks beyond the processor's cache gain nothing (measured); a GPU wants more at once.
WORKING_SET_BYTES = {"cpu": 12 * 2**20}
WORKING_SET_BYTES_ELSEWHERE = 2**31
_STATE_VECTORS = 10


def rows_per_stack(loss: StackedLoss, batch_size: int | None = None) -> int:
    """How many chains are advanced at once: as many as fit the working set.

    Args:
        loss: probed.
        batch_size: samples a gradient; None for all.
    """
    row = loss.gradient_bytes(batch_size) + _STATE_VECTORS * loss.layout.size * 4
    budget = WORKING_SET_BYTES.get(loss.device.type, WORKING_SET_BYTES_ELSEWHERE)
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
    whole: StackedLoss,
    anchor: Tensor,
    key: int,
    settings: ResolvedSettings,
    nbeta: float,
    localization: float,
    epsilon: float,
) -> NoiseProfile:
    """How noisy gradients of samples are where a chain is; of 512 of them at most.

    It starts too far along stiff directions, which it forgets in a few steps. What counts is the place after these; the
    start tells of losses that are far from quadratic, where chains come by such places now and then.

    Args:
        loss: of one row.
        whole: the same of all samples that will be used, or of many: along its own noise the curvature of a sample is
            larger, and among few samples it counts for too much.
        anchor: w*, [1, D].
        key: of the snapshot's noise.
        settings: of the sampling.
        nbeta: nβ.
        localization: γ.
        epsilon: ε.
    """
    group, batch = MINIBATCH_NOISE.group, MINIBATCH_NOISE.profile_batch
    stored = len(loss.tensors[0]) // batch * batch
    loss = replace(loss, tensors=tuple(tensor[:stored] for tensor in loss.tensors))
    settings = replace(settings, chains=1, batch_size=batch)
    target = Target(settings, nbeta, localization, anchor.shape[1], loss.sample_bytes is not None)
    chains = StackedChains(loss, anchor, [key], target, [epsilon], [0], [epsilon])
    start = chains.state.displacement.clone()
    chains.advance([(EQUILIBRIUM.least_burn_in, 0)])
    displacements = torch.cat([start, chains.state.displacement])
    positions = anchor + displacements
    groups = torch.arange(min(stored, MINIBATCH_NOISE.profiled), device=anchor.device).view(-1, 1, group)
    change, noise, squares = torch.zeros_like(positions), torch.zeros_like(positions), torch.zeros(2).double()
    for number, samples in enumerate(groups):
        there = loss.gradients(anchor, samples)[1]
        for place, position in enumerate(positions):
            own = loss.gradients(position[None], samples)[1].sub_(there)[0]
            change[place] += own
            # With alternating signs, of an even number, the sum has the directions of a group's noise.
            noise[place].add_(own, alpha=(-1.0) ** number)
            squares[place] += own.double().square().sum().cpu()
    change /= len(groups)
    squares /= len(groups)
    gain, heatings = float(chains.dynamics.noise_gain[0]) * nbeta**2, []
    for place in range(2):
        variance = group * float(squares[place] - change[place].double().square().sum().cpu())
        # About the mean, as λ_c: twice that in a bowl.
        virial = nbeta * abs(float(displacements[place] @ change[place]))
        position = positions[place : place + 1]
        curvature = partial(difference_product, whole, position, whole.gradients(position)[1])
        share = float(share_of_stiff(curvature, noise[place : place + 1], chains.dynamics))
        heatings.append(gain * share * variance / max(virial, 1e-300))
    stiff = change[1:] / change[1:].norm().clamp(min=torch.finfo(change.dtype).tiny)  # H(w − w*)
    products = [
        difference_product(loss, anchor, loss.gradients(anchor, samples)[1], stiff, samples) for samples in groups
    ]
    curvatures = torch.stack([torch.linalg.vecdot(product, stiff)[0] for product in products]).double()
    bending = group * float(curvatures.var(correction=0) / curvatures.mean().square())
    at_start, settled = heatings
    return NoiseProfile(float(np.maximum(settled, at_start / MINIBATCH_NOISE.far)), bending)
