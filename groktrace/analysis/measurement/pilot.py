"""What a few fitted snapshots say of how to sample a run: how far from w*, on how many samples, in what batches."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from groktrace.analysis.measurement.chance import level_of_chance
from groktrace.analysis.measurement.llc import LLCEstimate
from groktrace.analysis.measurement.measure import Objective, SnapshotMetrics, stack_weights
from groktrace.analysis.tuning import PILOT
from groktrace.errors import SettingsError
from groktrace.sampling.batches import NoiseProfile
from groktrace.sampling.calibration import Scale, posterior_scale, step_size
from groktrace.sampling.chains import profile_noise
from groktrace.sampling.interruption import interruption
from groktrace.sampling.posterior import FACTOR
from groktrace.sampling.tuning import CALIBRATION, MINIBATCH_NOISE


def choose_scale(objective: Objective, metrics: Sequence[SnapshotMetrics], **other: Any) -> Scale:
    """nβ and γ for a whole run, from its typical snapshots once the training set is fitted.

    Args:
        objective: with what was asked for.
        metrics: of all snapshots.
        **other: settings in place of the objective's.

    Raises:
        SettingsError: nβ or γ have to be derived and no snapshot is finite.
    """
    settings, n, dimension = replace(objective.settings, **other), objective.task.n, objective.layout.size
    among = fitted(metrics)
    if not among:
        if isinstance(settings.nbeta, float | int) and settings.localization is not None:
            return posterior_scale(settings, n, dimension, math.nan, math.nan)
        raise SettingsError("nbeta: cannot be derived, as no snapshot has a finite loss; give nbeta and localization.")
    norm_squared = statistics.median(known.norm_squared for known in among)
    tops = [known.top_curvature for known in among if known.top_curvature > 0] or [0.0]
    # Under cross-entropy all curvatures shrink as margins grow: at one nβ, λ̂ would fall in every run.
    follow = settings.nbeta == "curvature" or (settings.nbeta is None and max(tops) > PILOT.fallen * min(tops))
    return posterior_scale(settings, n, dimension, norm_squared, statistics.median(tops), follow)


def fitted(metrics: Sequence[SnapshotMetrics]) -> list[SnapshotMetrics]:
    """Those of snapshots that have fitted the training set, and whose curvature is known and finite.

    Args:
        metrics: of the snapshots.
    """
    few = fitted_losses({known.step: known.train_loss for known in metrics})
    return [known for known in metrics if known.step in few and known.finite]


def fitted_losses(losses: Mapping[int, float]) -> list[int]:
    """Steps of the snapshots that have fitted the training set, among those whose loss is finite.

    Args:
        losses: of the training, by step.
    """
    finite = {step: loss for step, loss in losses.items() if math.isfinite(loss)}
    least, largest = min(finite.values(), default=0.0), max(finite.values(), default=0.0)
    return [step for step, loss in finite.items() if loss <= least + PILOT.fitted * (largest - least)]


def choose_sampling(
    objective: Objective,
    load: Callable[[int], dict[str, Tensor] | None],
    metrics: Sequence[SnapshotMetrics],
    key: Callable[[int], int] = lambda step: step,
    threads: int = 1,
) -> Scale:
    """nβ, γ and, of large sets, samples and batch size, for all snapshots of a run.

    Args:
        objective: with what was asked for.
        load: gives a snapshot's weights by step.
        metrics: of the snapshots from which the choice is made.
        key: gives what the noise of a snapshot is keyed by beside the seed, by its step; by default the step.
        threads: how many may work at once; no result depends on it.

    Raises:
        SettingsError: nβ or γ have to be derived and cannot be, or samples are asked for of a set that is used whole.
    """
    settings, large_set = objective.settings, objective.large_set
    stored = len(objective.loss.tensors[0])
    if settings.samples is not None and settings.samples < stored and not large_set:
        raise SettingsError(
            f"samples: expected none of a set that is used whole, got {settings.samples} of {stored}; a gradient on "
            "all is cheap, or the loss is no mean over samples."
        )
    scale = choose_scale(objective, metrics)
    if settings.kernel.vanilla and large_set:  # as published: batches of all samples
        return scale._replace(samples=settings.samples, batch_size=settings.batch_size)
    among = [known for known in fitted(metrics) if scale.curvature is None or known.top_curvature > 0]
    tried = [among[round(i * (len(among) - 1) / PILOT.tried)] for i in range(PILOT.tried, 0, -1)]
    snapshots = [(known, weights) for known in dict.fromkeys(tried) if (weights := load(known.step)) is not None]
    free = settings.localization is None and settings.locality is None
    if not snapshots or (not large_set and not free):
        return scale
    trial = _Trial(objective, key)
    at_once = threads if large_set else 1  # of small sets a trial takes a moment
    if large_set:
        scale = trial.sized(scale)
        if not free and settings.samples is not None and settings.batch_size is not None:
            return scale  # nothing is left to be found out
    scales = [scale]
    if free:
        sized = {"samples": scale.samples, "batch_size": scale.batch_size}
        scales = [choose_scale(objective, metrics, locality=at)._replace(**sized) for at in PILOT.localities]
    scale, stays = trial.first_that_stays(scales, snapshots, at_once)
    if not large_set:
        return scale
    found = []
    if stays:
        found = [trial.run(*snapshot, scale) for snapshot in snapshots]  # as they have been
    elif stored > PILOT.unknown_samples:  # batches may have kept the chains up there, and λ_c would be far too large
        found = [trial.run(*snapshot, trial.in_batches(scale, None)) for snapshot in snapshots]
    scale = trial.enlarged(scale, found)
    return trial.in_batches(scale, trial.profiles(scale, snapshots, at_once))


class _Trial:
    """Short chains at a few snapshots."""

    def __init__(self, objective: Objective, key: Callable[[int], int]) -> None:
        self._objective, self._loss, self._settings = objective, objective.loss, objective.settings
        self._key = key
        self._estimated: dict[tuple[Any, ...], tuple[LLCEstimate, float | None]] = {}

    def sized(self, scale: Scale) -> Scale:
        """The scale with samples and batches to begin with."""
        # With one target each, λ_c of the fewest that are ever used would be far too small.
        samples = PILOT.min_samples if self._objective.targets >= 2 else 2 * PILOT.min_samples
        samples = min(self._settings.samples or samples, len(self._loss.tensors[0]))
        return _in_batches(scale, samples, self._settings.batch_size or PILOT.batch_size)

    def profiles(
        self, scale: Scale, snapshots: Sequence[tuple[SnapshotMetrics, dict[str, Tensor]]], threads: int
    ) -> list[NoiseProfile] | None:
        """How noisy gradients of few samples are; None where batches are given or have to be all samples."""
        # Of large networks the batches' gradients are not kept.
        if not self._objective.large_set or self._settings.batch_size or self._loss.micro_batch is not None:
            return None
        if scale.samples is not None and scale.samples < MINIBATCH_NOISE.profiled_multiple:
            return None
        return run_threads(partial(self._profile, scale=scale), snapshots, threads)

    def in_batches(self, scale: Scale, profiles: Sequence[NoiseProfile] | None) -> Scale:
        """The scale with batches so large that their noise does no harm."""
        if profiles is None:
            return _in_batches(scale, scale.samples, self._settings.batch_size)
        sizes = [profile.batch(scale.samples, PILOT.aimed * MINIBATCH_NOISE.heating) for profile in profiles]
        return _in_batches(scale, scale.samples, None if None in sizes else max(sizes))

    def _step_size(self, known: SnapshotMetrics, scale: Scale) -> float:
        top = known.top_curvature if scale.curvature is None else scale.curvature
        return self._settings.step_size or step_size(scale.nbeta, scale.localization, top)

    def _profile(self, known: SnapshotMetrics, weights: Mapping[str, Tensor], scale: Scale) -> NoiseProfile:
        """How noisy gradients of few samples are at one snapshot."""
        loss = self._objective.fork().loss.subset(scale.samples, MINIBATCH_NOISE.profile_batch)
        factor = 1.0 if scale.curvature is None else scale.curvature / known.top_curvature
        stacked, anchor = stack_weights(loss, [{**weights, FACTOR: torch.tensor(factor)}])
        key, size = self._key(known.step), self._step_size(known, scale)
        return profile_noise(stacked, anchor, key, self._settings, scale.nbeta, scale.localization, size)

    def first_that_stays(
        self, scales: Sequence[Scale], snapshots: Sequence[tuple[SnapshotMetrics, dict[str, Tensor]]], threads: int
    ) -> tuple[Scale, bool]:
        """The first scale at which chains stay in each snapshot's basin, or else the last.

        Args:
            scales: to be tried, in this order.
            snapshots: metrics and weights.
            threads: how many trials are made at once, of later scales too where there are fewer snapshots.

        Returns:
            The scale, and whether chains stay there.
        """
        stayed: dict[Scale, set[int]] = {scale: set() for scale in scales}
        suspect: int | None = None
        while stayed and len(next(iter(stayed.values()))) < len(snapshots):
            ahead = [(i, scale) for scale in stayed for i in range(len(snapshots)) if i not in stayed[scale]]
            # Chains that left one basin will do so again, where they are not held much closer: others can wait.
            if suspect is not None and suspect not in next(iter(stayed.values())):
                ahead.sort(key=lambda one: one[0] != suspect)
            some = ahead[:threads]
            arguments = [(*snapshots[i], scale) for i, scale in some]
            for (i, scale), estimate in zip(some, run_threads(self.run, arguments, threads), strict=True):
                if self.left(snapshots[i][0], estimate):
                    suspect = i
                    stayed.pop(scale, None)
                elif scale in stayed:
                    stayed[scale].add(i)
        return next(iter(stayed), scales[-1]), bool(stayed)

    def run(self, known: SnapshotMetrics, weights: Mapping[str, Tensor], scale: Scale) -> LLCEstimate:
        """A short estimate."""
        if not self._objective.large_set:
            few = min(self._settings.draws or PILOT.few_draws, PILOT.few_draws)
            return self._estimate(known, weights, scale, draws=few)[0]
        size = self._step_size(known, scale)
        short = {"burn_in": PILOT.burn_in, "draws": PILOT.draws}
        estimate, curvature = self._estimate(known, weights, scale, step_size=size, **short)
        whole = self.in_batches(scale, None)
        if estimate.llc is None and whole != scale:  # small batches throw some chains out
            scale = whole
            estimate, curvature = self._estimate(known, weights, scale, step_size=size, **short)
        # So may a step for the curvature at w*, where chains meet a larger one.
        fitting = step_size(scale.nbeta, scale.localization, curvature) if curvature else size
        free = self._settings.step_size is None and scale == whole
        if free and fitting < size and self.left(known, estimate):
            slow = min(size / fitting, CALIBRATION.max_reduction)
            longer = {name: round(slow * count) for name, count in short.items()}
            estimate, _ = self._estimate(known, weights, scale, step_size=size / slow, **longer)
        return estimate

    def _estimate(
        self, known: SnapshotMetrics, weights: Mapping[str, Tensor], scale: Scale, **settings: Any
    ) -> tuple[LLCEstimate, float | None]:
        """An estimate, and h_max where its chains began, if that was looked at; made once."""
        asked = known.step, scale, *settings.items()
        if asked not in self._estimated:
            objective = replace(self._objective.fork(), settings=replace(self._settings, **settings))
            estimate, traces = objective.sample([weights], [known], scale, [self._key(known.step)])[0]
            self._estimated[asked] = estimate, None if traces is None else traces.curvature
        return self._estimated[asked]

    def left(self, known: SnapshotMetrics, estimate: LLCEstimate) -> bool:
        """Whether the chains have gone so far up that they are hardly in the snapshot's basin any more."""
        if estimate.llc is None:
            return True
        chance = level_of_chance(self._objective.chance, known.train_loss)
        return estimate.llc / estimate.nbeta > PILOT.max_climb * (chance - known.train_loss)

    def enlarged(self, scale: Scale, found: Sequence[LLCEstimate]) -> Scale:
        """The scale with so many samples that the posterior of all would hardly be another one."""
        stored = len(self._loss.tensors[0])
        if self._settings.samples is not None:
            return scale._replace(samples=min(self._settings.samples, stored))
        values = [estimate.llc_centred or estimate.llc for estimate in found]
        known = [value for value in values if value is not None]
        wanted = max(known) / (PILOT.max_bias * self._objective.targets) if known else PILOT.unknown_samples
        samples = PILOT.min_samples
        while samples < min(wanted, stored):
            samples *= 2
        # Where few are left, they cost little, and nothing is missed with them.
        return scale._replace(samples=stored if stored <= PILOT.nearly_all * samples else samples)


def run_threads(function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], threads: int) -> list[Any]:
    """A function's values, several found at once.

    Args:
        function: safe to be called by several threads.
        arguments: of each call.
        threads: how many.
    """
    if min(len(arguments), threads) <= 1:
        return [function(*one) for one in arguments]
    with ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(copy_context().run, function, *one) for one in arguments]
        try:
            return [future.result() for future in futures]
        except BaseException as failure:
            pool.shutdown(wait=False, cancel_futures=True)
            if isinstance(failure, KeyboardInterrupt):
                interruption.set()
            raise


def _in_batches(scale: Scale, samples: int, batch: int | None) -> Scale:
    """The scale with so many samples, of which batches take equal parts."""
    if batch is None or batch >= samples:
        return scale._replace(samples=samples, batch_size=None)
    return scale._replace(samples=samples - samples % batch, batch_size=batch)
