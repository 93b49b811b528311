"""λ̂ of one or of several stacked points of weight space."""

import fnmatch
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from groktrace.analysis.evaluation import Survey, chance_losses, stack_weights, survey, training_loss
from groktrace.analysis.llc import LLCEstimate, centred_error, off_minimum, summarise, unusable
from groktrace.errors import SettingsError, TaskError
from groktrace.run.task import Task
from groktrace.sampling.calibration import Scale, posterior_scale, settle, step_size
from groktrace.sampling.chains import MAX_GROWTH, sample
from groktrace.sampling.diagnostics import standard_error
from groktrace.sampling.large import sample_large
from groktrace.sampling.posterior import FACTOR, StackedLoss, WeightLayout
from groktrace.sampling.settings import SamplingSettings
from groktrace.sampling.traces import Traces

# A snapshot counts as fitted once its training loss has fallen to this fraction of the run's range.
FITTED = 0.05
# nβ follows the curvature where that of fitted snapshots ranges over more than this factor.
FALLEN = 10.0


def choose_device(device: str | torch.device | None) -> torch.device:
    """The device named, or a GPU where there is one, or the CPU.

    Raises:
        SettingsError: there is no such device here.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as failure:
        raise SettingsError(f"device: '{device}' cannot be used here ({str(failure).splitlines()[0]}).") from failure
    return chosen


def weight_layout(
    specs: dict[str, tuple[tuple[int, ...], torch.dtype, bool]], patterns: Sequence[str] | None = None
) -> WeightLayout:
    """The sampled weights among all tensors of a network and its loss.

    Those that train at some time are sampled at every snapshot, so that all are measured by one posterior.

    Args:
        specs: (shape, dtype, whether it ever trains) by name.
        patterns: shell-style patterns of the names to sample; None for all.

    Raises:
        TaskError: there is nothing to sample.
        SettingsError: a pattern fits none of the trainable weights.
    """
    chosen = {
        name: shape
        for name, (shape, dtype, trainable) in specs.items()
        if trainable and (dtype.is_floating_point or dtype.is_complex)
    }
    if not sum(math.prod(shape) for shape in chosen.values()):
        raise TaskError("weights: expected at least one trainable parameter of real or complex numbers, found none.")
    for pattern in patterns or ():
        if not fnmatch.filter(chosen, pattern):
            raise SettingsError(f"parameters: '{pattern}' fits none of the trainable weights: {', '.join(chosen)}.")
    if patterns is not None:
        chosen = {name: s for name, s in chosen.items() if any(fnmatch.fnmatchcase(name, p) for p in patterns)}
    return WeightLayout(
        tuple(chosen), tuple(chosen.values()), tuple(name for name in chosen if specs[name][1].is_complex)
    )


def estimate_stack(
    loss: StackedLoss,
    weights: Sequence[dict[str, Tensor]],
    surveys: Sequence[Survey],
    settings: SamplingSettings,
    scale: Scale,
    n: int,
    keys: Sequence[int] | None = None,
    chance: Sequence[float] = (),
) -> list[LLCEstimate]:
    """λ̂ of several snapshots at once.

    Args:
        loss: the task's training loss.
        weights: tensors by name, of each snapshot.
        surveys: of the same snapshots.
        settings: of the sampling.
        scale: nβ and γ.
        n: number of training samples.
        keys: what the noise of each is keyed by beside the seed; by default its step.
        chance: training losses of networks that know nothing, see `chance_losses`.
    """
    nbeta, localization, curvature = scale
    estimates: list[LLCEstimate | None] = [None] * len(weights)
    usable = []
    for s, about in enumerate(surveys):
        if not (math.isfinite(about.train_loss) and math.isfinite(about.top_curvature)):
            reason = "the weights, the loss or its curvature at the snapshot are not finite"
            estimates[s] = unusable(reason, settings, nbeta, localization)
        elif curvature is not None and not about.top_curvature > 0:
            reason = "the loss has no curvature at the snapshot, which nβ could follow"
            estimates[s] = unusable(reason, settings, nbeta, localization)
        else:
            usable.append(s)
    if usable:
        keys = [surveys[s].step if keys is None else keys[s] for s in usable]
        surveys, weights = [surveys[s] for s in usable], [weights[s] for s in usable]
        tops = [about.top_curvature for about in surveys]
        factors = [1.0] * len(usable)
        if curvature is not None:
            # λ̂ = nβ·(E[L] − L*) stays what it is when the loss is multiplied and nβ divided by the same factor.
            factors = [curvature / top for top in tops]
            weights = [{**each, FACTOR: torch.tensor(f)} for each, f in zip(weights, factors, strict=True)]
            tops = [curvature] * len(usable)
        sizes = [settings.step_size or step_size(nbeta, localization, top) for top in tops]

        known = _precise if curvature is None or settings.chains == 1 else _precise_centred
        enough = partial(known, rtol=settings.rtol)
        if loss.micro_batch is None:
            stacked, anchors = stack_weights(loss, weights)
            traces = sample(stacked, anchors, keys, settings, nbeta, localization, sizes, enough)
        else:
            traces = [
                sample_large(loss, each, key, settings, nbeta, localization, size, enough)
                for each, key, size in zip(weights, keys, sizes, strict=True)
            ]
        for s, about, trace, factor in zip(usable, surveys, traces, factors, strict=True):
            if trace.fluctuation is not None:
                # ½nβ·Var ℓ is quadratic in the loss, but linear in nβ.
                trace = replace(trace, fluctuation=trace.fluctuation / factor)
            estimates[s] = summarise(
                trace,
                settings,
                n=n,
                loss=about.train_loss,
                norm=math.sqrt(about.norm_squared),
                dimension=loss.layout.size,
                nbeta=nbeta * factor,
                localization=localization,
                chance=chance,
            )
    return estimates


def estimate_llc(
    model: nn.Module,
    loss: Callable[..., Tensor] | str | None,
    train: Any,
    *,
    batch_loss: Callable[..., Tensor] | None = None,
    device: str | torch.device | None = None,
    **settings: Any,
) -> LLCEstimate:
    """Local learning coefficient of a model as it stands, without a recording.

    Args:
        model: the network at w*; it is not changed.
        loss: loss(outputs, targets) as a mean over the batch, "cross_entropy", "mse", or None with `batch_loss`. Its
            own parameters are sampled with the model's.
        train: (inputs, targets), a dict of tensors, a list of batches, a Dataset or a DataLoader.
        batch_loss: batch_loss(model, batch) for models that compute their own loss.
        device: where to compute; a GPU where there is one.
        **settings: see `groktrace.SamplingSettings`.

    Returns:
        The estimate, with its diagnostics.

    Raises:
        SettingsError: a setting is outside what it may be.
        TaskError: model, loss and data do not fit together, or are not finite.
    """
    chosen = make_settings(settings)
    place = choose_device(device)
    n, training, weights, surveyed, chance = prepare_point(model, loss, train, batch_loss, chosen, place)
    chosen = settle(chosen, training.layout.size, training.micro_batch is None)
    scale = choose_scale(chosen, n, training.layout, [surveyed])
    return estimate_stack(training, [weights], [surveyed], chosen, scale, n, chance=chance)[0]


def prepare_point(
    model: nn.Module,
    loss: Callable[..., Tensor] | str | None,
    train: Any,
    batch_loss: Callable[..., Tensor] | None,
    settings: SamplingSettings,
    device: torch.device,
) -> tuple[int, StackedLoss, dict[str, Tensor], Survey, tuple[float, ...]]:
    """What sampling around a live model needs.

    That is n, the training loss, all tensors by name, their survey, and the losses of networks that know nothing.

    Args:
        model: the network at w*.
        loss: see `estimate_llc`.
        train: see `estimate_llc`.
        batch_loss: see `estimate_llc`.
        settings: of the sampling.
        device: where to compute.

    Raises:
        TaskError: model, loss and data do not fit together, or are not finite.
        SettingsError: `settings.parameters` fits no weights.
    """
    if train is None:
        raise TaskError("train: expected the training data, got None.")
    # The seed of the sampling does not choose the samples: with another one, the same loss is measured again.
    task = Task.from_model(model, loss=loss, batch_loss=batch_loss, train=train)
    weights = {name: tensor.detach() for name, tensor in {**task.parameters, **task.buffers}.items()}
    moving = {name for name, tensor in task.parameters.items() if tensor.requires_grad}
    moving = {task.follow.get(name, name) for name in moving}  # what lies in the memory of another counts with that
    specs = {name: (tuple(t.shape), t.dtype, name in moving) for name, t in task.parameters.items()}
    layout = weight_layout(specs, settings.parameters)
    training = training_loss(task, layout, weights, device)
    (surveyed,) = survey(task, training, [weights], [0], settings.seed)
    if not math.isfinite(surveyed.train_loss):
        raise TaskError(f"loss: expected a finite loss at the weights given, got {surveyed.train_loss}.")
    return task.n, training, weights, surveyed, chance_losses(task, weights, device, training.micro_batch)


def make_settings(settings: dict[str, Any]) -> SamplingSettings:
    """Settings from keywords.

    Raises:
        SettingsError: one is unknown or outside what it may be.
    """
    known = SamplingSettings.__dataclass_fields__
    unknown = sorted(settings.keys() - known.keys())
    if unknown:
        raise SettingsError(f"settings: unknown {', '.join(unknown)}; expected some of {', '.join(known)}.")
    return SamplingSettings(**settings)


def choose_scale(settings: SamplingSettings, n: int, layout: WeightLayout, surveys: Sequence[Survey]) -> Scale:
    """nβ and γ for a whole run, from its typical snapshots once the training set is fitted.

    Args:
        settings: of the sampling.
        n: number of training samples.
        layout: the sampled weights.
        surveys: of all snapshots.

    Raises:
        SettingsError: they have to be derived and no snapshot is finite.
    """
    finite = [each for each in surveys if math.isfinite(each.train_loss) and math.isfinite(each.top_curvature)]
    if not finite:
        if isinstance(settings.nbeta, float | int) and settings.localization is not None:
            return posterior_scale(settings, n, layout.size, math.nan, math.nan)
        raise SettingsError("nbeta: cannot be derived, as no snapshot has a finite loss; give nbeta and localization.")
    losses = [each.train_loss for each in finite]
    fitted = [each for each in finite if each.train_loss <= min(losses) + FITTED * (max(losses) - min(losses))]
    norm_squared = statistics.median(each.norm_squared for each in fitted)
    top_curvature = statistics.median(each.top_curvature for each in fitted)
    tops = [each.top_curvature for each in fitted]
    # Under cross-entropy all curvatures shrink as margins grow: at one nβ, λ̂ would fall in every run.
    follow = settings.nbeta == "curvature" or (settings.nbeta is None and max(tops) > FALLEN * min(tops) > 0)
    return posterior_scale(settings, n, layout.size, norm_squared, top_curvature, follow)


def _precise(traces: Traces, rtol: float) -> bool:
    """Whether λ̂ is known to `rtol`; off a minimum, where it is no measure of the basin, no more draws are spent."""
    llc = float(traces.excess.mean())
    return standard_error(traces.excess) <= rtol * abs(llc) or off_minimum(traces)


def _precise_centred(traces: Traces, rtol: float) -> bool:
    """Whether λ_c is known to `rtol`, or so badly that no more draws are spent: where nβ follows, it is the measure."""
    value, error = float(traces.paired.mean()), centred_error(traces.paired)
    return not rtol * value < error <= math.sqrt(MAX_GROWTH) * rtol * value
