"""λ̂ of a model as it stands, without a recording."""

import contextlib
import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, nn

from groktrace.analysis.measurement.limit import LearningCoefficient
from groktrace.analysis.measurement.limit_by_chains import limit_by_chains
from groktrace.analysis.measurement.limit_by_particles import limit_by_particles
from groktrace.analysis.measurement.llc import LLCEstimate
from groktrace.analysis.measurement.measure import Objective, SnapshotMetrics
from groktrace.analysis.measurement.pilot import choose_sampling
from groktrace.analysis.progress import ProgressCallback, shown
from groktrace.analysis.running.backends import one_thread
from groktrace.analysis.running.setup import choose_device, make_settings, weight_layout
from groktrace.analysis.tuning import LIMIT
from groktrace.errors import TaskError
from groktrace.run.task import Task
from groktrace.sampling.settings import SamplingOptions, SamplingSettings
from groktrace.sampling.tuning import MEMORY

if TYPE_CHECKING:
    from typing_extensions import Unpack


@overload
def estimate_llc(
    model: nn.Module,
    loss: Callable[..., Tensor] | str | None,
    train: Any,
    *,
    limit: Literal[False] = False,
    batch_loss: Callable[..., Tensor] | None = None,
    n: int | None = None,
    noise: str | None = None,
    device: str | torch.device | None = None,
    progress: ProgressCallback | bool | None = None,
    settings: SamplingSettings | None = None,
    **options: "Unpack[SamplingOptions]",
) -> LLCEstimate: ...


@overload
def estimate_llc(
    model: nn.Module,
    loss: Callable[..., Tensor] | str | None,
    train: Any,
    *,
    limit: Literal[True],
    batch_loss: Callable[..., Tensor] | None = None,
    n: int | None = None,
    noise: str | None = None,
    device: str | torch.device | None = None,
    progress: ProgressCallback | bool | None = None,
    settings: SamplingSettings | None = None,
    **options: "Unpack[SamplingOptions]",
) -> LearningCoefficient: ...


def estimate_llc(
    model: nn.Module,
    loss: Callable[..., Tensor] | str | None,
    train: Any,
    *,
    limit: bool = False,
    batch_loss: Callable[..., Tensor] | None = None,
    n: int | None = None,
    noise: str | None = None,
    device: str | torch.device | None = None,
    progress: ProgressCallback | bool | None = None,
    settings: SamplingSettings | None = None,
    **options: "Unpack[SamplingOptions]",
) -> LLCEstimate | LearningCoefficient:
    """Local learning coefficient of a model as it stands, without a recording.

    Args:
        model: the network at w*; it is not changed.
        loss: loss(outputs, targets) as a mean over the batch, "cross_entropy", "mse", or None with `batch_loss`. Its
            own parameters are sampled with the model's.
        train: (inputs, targets), a dict of tensors, a list of batches, a Dataset or a DataLoader.
        limit: whether to follow λ̂ to so large an nβ that it no longer depends on it: λ itself, of the minimum next to
            the model. Of the settings it takes `localization`, `locality`, `parameters`, `rtol` and `seed`. Beyond 500
            weights it takes 50 000 gradients and more.
        batch_loss: batch_loss(model, batch) for models that compute their own loss.
        n: the number of training samples, where `train` is a stream without an end or a length, or a sample of them.
        noise: "fixed" draws the random numbers of the loss once for each sample.
        device: where to compute; a GPU where there is one. On a processor each operation takes one thread, but for
            networks of 17 million weights and more.
        progress: called with (phase, done, in all); see `groktrace.analyze`.
        settings: of the sampling; None for the defaults.
        **options: fields of `groktrace.SamplingSettings`, in place of those of `settings`.

    Returns:
        The estimate, with its diagnostics; with `limit`, the learning coefficient, its interval and λ̂ on the way.

    Raises:
        SettingsError: a setting is outside what it may be.
        TaskError: model, loss and data do not fit together, or are not finite.
    """
    chosen = make_settings(settings, options)
    place = choose_device(device)
    # On a busy machine threads that share an operation wait for each other: 7 to 18 times as long, measured on small
    # networks and on large sets; on two idle cores they are 1.6 times as fast. Large networks need them.
    small = place.type == "cpu" and isinstance(model, nn.Module) and _weights(model) < MEMORY.large_weights
    with shown(progress) as report, one_thread() if small else contextlib.nullcontext():
        report("losses, curvature", 0, 1)
        objective, weights, metrics = prepare_point(model, loss, train, batch_loss, chosen, place, n, noise)
        report("losses, curvature", 1, 1)
        if limit:
            if objective.layout.size > LIMIT.max_weights:
                return limit_by_chains(objective, weights, metrics, progress=report)
            return limit_by_particles(objective, weights, metrics.norm_squared, progress=report)
        report("locality, samples, batches", 0, 1)
        scale = choose_sampling(objective, lambda step: weights, [metrics])
        report("locality, samples, batches", 1, 1)
        report("sampling", 0, 1)
        estimate = objective.estimate([weights], [metrics], scale)[0]
        report("sampling", 1, 1)
    return estimate


def _weights(model: nn.Module) -> int:
    """How many there are; those of lazy modules are not known yet, and count for none."""
    return sum(p.numel() for p in model.parameters() if not nn.parameter.is_lazy(p))


def prepare_point(
    model: nn.Module,
    loss: Callable[..., Tensor] | str | None,
    train: Any,
    batch_loss: Callable[..., Tensor] | None,
    settings: SamplingSettings,
    device: torch.device,
    n: int | None = None,
    noise: str | None = None,
) -> tuple[Objective, dict[str, Tensor], SnapshotMetrics]:
    """What sampling around a live model needs: what it is measured by, all tensors by name, and their metrics.

    Args:
        model: the network at w*.
        loss: see `estimate_llc`.
        train: see `estimate_llc`.
        batch_loss: see `estimate_llc`.
        settings: of the sampling.
        device: where to compute.
        n: see `estimate_llc`.
        noise: see `estimate_llc`.

    Raises:
        TaskError: model, loss and data do not fit together, or are not finite.
        SettingsError: `settings.parameters` fits no weights.
    """
    if train is None:
        raise TaskError("train: expected the training data, got None.")
    # The seed of the sampling does not choose the samples: with another one, the same loss is measured again.
    task = Task.from_model(model, loss=loss, batch_loss=batch_loss, train=train, n=n, noise=noise)
    weights = {name: tensor.detach() for name, tensor in {**task.parameters, **task.buffers}.items()}
    moving = {name for name, tensor in task.parameters.items() if tensor.requires_grad}
    moving = {task.follow.get(name, name) for name in moving}  # what lies in the memory of another counts with that
    specs = {name: (tuple(t.shape), t.dtype, name in moving) for name, t in task.parameters.items()}
    layout = weight_layout(specs, settings.parameters)
    task, weights = replace(task, forward=layout.joined(task.forward)), layout.split(weights)
    objective = Objective.of(task, layout, settings, weights, device, untrained=False)
    (metrics,) = objective.metrics([weights], [0])
    if not math.isfinite(metrics.train_loss):
        raise TaskError(f"loss: expected a finite loss at the weights given, got {metrics.train_loss}.")
    return objective, weights, metrics
