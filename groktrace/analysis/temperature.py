"""λ̂ against temperature: what is resolved at each nβ, and the limit that is an absolute value."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from groktrace.analysis.measurement.limit import LearningCoefficient
from groktrace.analysis.measurement.limit_by_particles import limit_by_particles
from groktrace.analysis.measurement.llc import LLCEstimate
from groktrace.analysis.measurement.measure import Objective, SnapshotMetrics
from groktrace.analysis.measurement.pilot import choose_sampling, choose_scale
from groktrace.analysis.point import prepare_point
from groktrace.analysis.progress import ProgressCallback, shown
from groktrace.analysis.running.backends import one_thread
from groktrace.analysis.running.passes import spread
from groktrace.analysis.running.session import Session, open_session
from groktrace.analysis.running.setup import choose_device, make_settings
from groktrace.analysis.tuning import LIMIT
from groktrace.errors import SettingsError
from groktrace.records import Record
from groktrace.run.store import Run, open_run
from groktrace.run.task import Task
from groktrace.sampling.settings import ResolvedSettings, SamplingOptions, SamplingSettings
from groktrace.sampling.tuning import CALIBRATION, MEMORY

if TYPE_CHECKING:
    from typing_extensions import Unpack


# Snapshots from which γ is taken where no analysis has chosen it.
_LOCALIZING = 16
_RUNGS = "sampling at each nβ"
RESOLUTIONS = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


@dataclass(frozen=True)
class TemperatureCurve(Record):
    """λ̂(nβ) at one point of weight space and one γ.

    Attributes:
        estimates: one a temperature, nβ ascending.
        limit: λ itself; None where nβ were given, and of networks of more than 500 weights.
    """

    estimates: tuple[LLCEstimate, ...]
    limit: LearningCoefficient | None


def temperature_curve(
    model: nn.Module,
    loss: Callable[..., Tensor] | str | None,
    train: Any,
    nbetas: Sequence[float] | None = None,
    *,
    batch_loss: Callable[..., Tensor] | None = None,
    n: int | None = None,
    noise: str | None = None,
    device: str | torch.device | None = None,
    progress: ProgressCallback | bool | None = None,
    settings: SamplingSettings | None = None,
    **options: "Unpack[SamplingOptions]",
) -> TemperatureCurve:
    """λ̂ of a model at several nβ and one γ.

    Near a minimum λ̂(nβ) = ½Σ nβh/(nβh + γ): it grows by half for every direction that comes into sight, and stands
    still between the curvatures that count and those that do not. Only its limit is an absolute learning coefficient.

    Args:
        model: the network at w*; it is not changed.
        loss: loss(outputs, targets) as a mean over the batch, "cross_entropy", "mse", or None with `batch_loss`.
        train: (inputs, targets), a dict of tensors, a list of batches, a Dataset or a DataLoader.
        nbetas: the temperatures; by default those of resolution 1 to 300, and the limit beyond, of networks of up to
            500 weights.
        batch_loss: batch_loss(model, batch) for models that compute their own loss.
        n: see `groktrace.estimate_llc`.
        noise: see `groktrace.estimate_llc`.
        device: where to compute; a GPU where there is one. On a processor each operation takes one thread, but for
            networks of 17 million weights and more.
        progress: called with (phase, done, in all); see `groktrace.analyze`.
        settings: of the sampling, without `nbeta`; None for the defaults.
        **options: fields of `groktrace.SamplingSettings`, in place of those of `settings`.

    Raises:
        SettingsError: a setting is outside what it may be.
        TaskError: model, loss and data do not fit together, or are not finite.
    """
    chosen = _curve_settings(settings, options)
    objective, weights, metrics = prepare_point(model, loss, train, batch_loss, chosen, choose_device(device), n, noise)
    return _measure_curve(objective, weights, metrics, nbetas, chosen, progress)


def temperature_curve_at(
    run: Run | str | Path,
    step: int,
    nbetas: Sequence[float] | None = None,
    *,
    train: Any = None,
    n: int | None = None,
    task: Task | None = None,
    device: str | torch.device | None = None,
    progress: ProgressCallback | bool | None = None,
    settings: SamplingSettings | None = None,
    **options: "Unpack[SamplingOptions]",
) -> TemperatureCurve:
    """λ̂ of one recorded snapshot at several nβ and one γ, see `temperature_curve`.

    γ is the run's: the one that an analysis at the same settings has kept, or else the one that snapshots spread over
    the run call for, 16 of them or all, so that the curve belongs to the trajectory. nβ follows from it and from the
    snapshot's own curvature.

    Args:
        run: a run directory, its path or its URL.
        step: the snapshot's training step.
        nbetas: the temperatures; by default those of resolution 1 to 300, and the limit beyond, of networks of up to
            500 weights.
        train: see `analyze`; γ is then that of the run's own analysis, if there is one.
        n: see `analyze`.
        task: see `analyze`.
        device: where to compute; a GPU where there is one. On a processor each operation takes one thread, but for
            networks of 17 million weights and more.
        progress: called with (phase, done, in all); see `groktrace.analyze`.
        settings: of the sampling, without `nbeta`; None for the defaults.
        **options: fields of `groktrace.SamplingSettings`, in place of those of `settings`.

    Raises:
        SettingsError: there is no such snapshot, or a setting is outside what it may be.
        SnapshotError: the snapshot is damaged.
        TaskError: the recording holds no loss to evaluate, or it is not finite at the snapshot.
    """
    chosen = _curve_settings(settings, options)
    run = run if isinstance(run, Run) else open_run(run)
    found = [snapshot for snapshot in run.snapshots if snapshot.step == step]
    if not found:
        nearest = min((snapshot.step for snapshot in run.snapshots), key=lambda other: abs(other - step))
        raise SettingsError(f"step: there is no snapshot of step {step}; the nearest is of step {nearest}.")
    weights = found[0].load(with_loss=True)
    with open_session(run, chosen, task=task, device=device, threads=1, persist=False, train=train, n=n) as session:
        metrics = session.metrics([step])[step]
        objective = replace(session.objective, settings=_with_localization(session, metrics))
        own = objective.layout.split(weights)
        return _measure_curve(objective, own, metrics, nbetas, chosen, progress, session.key(step))


def _with_localization(session: Session, metrics: SnapshotMetrics) -> ResolvedSettings:
    """The settings with the run's γ."""
    settings = session.objective.settings
    if settings.localization is not None:
        return settings
    scale = session.kept_scale() or session.own_scale()
    if scale is None:
        some = session.metrics([session.steps[i] for i in spread(session.steps, _LOCALIZING)])
        # nβ is the snapshot's own, whatever curvature the others have.
        scale = choose_scale(session.objective, list((some | {metrics.step: metrics}).values()), nbeta=1.0)
    return replace(settings, localization=scale.localization)


def _curve_settings(settings: SamplingSettings | None, options: SamplingOptions) -> SamplingSettings:
    chosen = make_settings(settings, options)
    if chosen.nbeta is not None:
        raise SettingsError("nbeta: a temperature curve takes several; give them as nbetas.")
    return chosen


def _measure_curve(
    objective: Objective,
    weights: dict[str, Tensor],
    metrics: SnapshotMetrics,
    nbetas: Sequence[float] | None,
    chosen: SamplingSettings,
    progress: ProgressCallback | bool | None,
    key: int = 0,
) -> TemperatureCurve:
    for nbeta in nbetas or ():
        make_settings(None, {"nbeta": nbeta})
    # Threads that share an operation wait for each other, see `estimate_llc`.
    small = objective.loss.device.type == "cpu" and objective.layout.size < MEMORY.large_weights
    with shown(progress) as report, one_thread() if small else contextlib.nullcontext():
        limit = None
        if nbetas is None and objective.layout.size <= LIMIT.max_weights:
            asked = replace(objective.settings, localization=chosen.localization, resolution=None, step_size=None)
            limited = replace(objective, settings=asked)
            limit = limit_by_particles(limited, weights, metrics.norm_squared, key, report)
        scale = choose_sampling(objective, lambda step: weights, [metrics], lambda step: key)
        if nbetas is None:
            own = objective.settings.resolution or CALIBRATION.resolution
            nbetas = [scale.nbeta * resolution / own for resolution in RESOLUTIONS]
        estimates = []
        for done, nbeta in enumerate(sorted(nbetas)):
            report(_RUNGS, done, len(nbetas))
            at = scale._replace(nbeta=float(nbeta), curvature=None)
            estimates += objective.estimate([weights], [metrics], at, [key])
        report(_RUNGS, len(nbetas), len(nbetas))
    return TemperatureCurve(tuple(estimates), limit)
