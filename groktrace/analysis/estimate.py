"""λ̂ of one or of several stacked points of weight space."""

import fnmatch
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from groktrace.analysis.evaluation import Survey, stack_weights
from groktrace.analysis.llc import LLCEstimate, centred_error, off_minimum, summarise, unusable
from groktrace.errors import SettingsError, TaskError
from groktrace.sampling.calibration import Scale, posterior_scale, step_size
from groktrace.sampling.chains import sample
from groktrace.sampling.engine import MAX_GROWTH
from groktrace.sampling.diagnostics import standard_error
from groktrace.sampling.large import sample_large
from groktrace.sampling.posterior import FACTOR, StackedLoss, WeightLayout
from groktrace.sampling.settings import SamplingOptions, SamplingSettings
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
        chance: training losses of networks that know nothing, see `chance_losses`.
        keys: what the noise of each is keyed by beside the seed; by default its step.
    """
    nbeta, localization, curvature = scale.nbeta, scale.localization, scale.curvature
    whole: StackedLoss | None = None
    if loss.sample_bytes is not None:
        if settings.batch_size is None and scale.batch_size is not None:
            whole = loss.subset(scale.samples)
        loss = loss.subset(scale.samples, scale.batch_size)
        settings = replace(settings, batch_size=scale.batch_size)
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

        # Off a minimum, where snapshots of large sets trained on minibatches nearly always are, λ_c is the measure too.
        centred = curvature is not None or loss.sample_bytes is not None
        needed = partial(_needed_centred if centred and settings.chains > 1 else _needed, rtol=settings.rtol)
        if loss.sample_bytes is not None:
            needed = partial(_needed_by_the_dear, needed=needed)
        if loss.micro_batch is None:
            stacked, anchors = stack_weights(loss, weights)
            if whole is not None:
                whole = replace(whole, fixed=stacked.fixed)
            traces = sample(stacked, anchors, keys, settings, nbeta, localization, sizes, needed, whole)
        else:
            traces = [
                sample_large(loss, each, key, settings, nbeta, localization, size, needed)
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
                by_centred=centred,
            )
    return estimates


def make_settings(settings: SamplingSettings | None, options: SamplingOptions) -> SamplingSettings:
    """Settings, with what keywords say in place of their own.

    Args:
        settings: None for the defaults.
        options: fields of `SamplingSettings`.

    Raises:
        SettingsError: one is unknown or outside what it may be.
    """
    known = SamplingSettings.__dataclass_fields__
    unknown = sorted(options.keys() - known.keys())
    if unknown:
        raise SettingsError(f"settings: unknown {', '.join(unknown)}; expected some of {', '.join(known)}.")
    return replace(settings or SamplingSettings(), **options)


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
    among = fitted(finite)
    norm_squared = statistics.median(each.norm_squared for each in among)
    tops = [each.top_curvature for each in among]
    top_curvature = statistics.median(tops)
    # Under cross-entropy all curvatures shrink as margins grow: at one nβ, λ̂ would fall in every run.
    follow = settings.nbeta == "curvature" or (settings.nbeta is None and max(tops) > FALLEN * min(tops) > 0)
    return posterior_scale(settings, n, layout.size, norm_squared, top_curvature, follow)


def fitted(surveys: Sequence[Survey]) -> list[Survey]:
    """Those of snapshots that have fitted the training set, among those whose loss and curvature are finite.

    Args:
        surveys: of the snapshots.
    """
    finite = [each for each in surveys if math.isfinite(each.train_loss) and math.isfinite(each.top_curvature)]
    losses = [each.train_loss for each in finite]
    return [each for each in finite if each.train_loss <= min(losses) + FITTED * (max(losses) - min(losses))]


def _needed_by_the_dear(traces: Traces, needed: Callable[[Traces], float]) -> float:
    """The same where draws are dear: what is off a minimum cannot become reliable."""
    return 1.0 if off_minimum(traces) else needed(traces)


def _needed(traces: Traces, rtol: float) -> float:
    """How many times as many draws give λ̂ to `rtol`; 1 off a minimum, where it is no measure of the basin."""
    if off_minimum(traces):
        return 1.0
    return _times(standard_error(traces.excess), abs(float(traces.excess.mean())), rtol)


def _needed_centred(traces: Traces, rtol: float) -> float:
    """How many times as many draws give λ_c to `rtol`; 1 where so many would be needed that none are spent."""
    times = _times(centred_error(traces.paired), float(traces.paired.mean()), rtol)
    return times if times <= MAX_GROWTH else 1.0


def _times(error: float, value: float, rtol: float) -> float:
    """The factor on the number of draws that brings a standard error down to `rtol` of a value."""
    if not value > 0:
        return math.inf if error > 0 else 1.0
    return (error / (rtol * value)) ** 2
