"""What an analysis is set up with, from what it was asked for: settings, device, task and the weights to sample."""

import fnmatch
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from groktrace.errors import SettingsError, TaskError
from groktrace.run.batch import Batch
from groktrace.run.data import take_data
from groktrace.run.store import Run
from groktrace.run.task import Task
from groktrace.sampling.parts import FORM, Part, cut, parse_part, part_name, part_shape
from groktrace.sampling.settings import SamplingOptions, SamplingSettings
from groktrace.sampling.weights import WeightLayout


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


@dataclass(frozen=True)
class OtherData:
    """Samples to measure a run on in place of its own training samples.

    Attributes:
        train: the samples, nested as the run's.
        n: how many they stand for.
        name: what they are called; None where nothing says so.
    """

    train: Batch
    n: int
    name: str | None = None

    @classmethod
    def of(cls, run: Run, given: Task | None, data: Any, n: int | None) -> "OtherData":
        """Data in any of the forms that `analyze` takes.

        Args:
            run: opened.
            given: the task in place of the recorded one, if any.
            data: see `analyze`.
            n: the same.

        Raises:
            TaskError: they are not of the form of the run's, or there is nothing to evaluate on them.
            RunError: files are damaged.
            SettingsError: `n` is less than there are.
        """
        if given is not None and given.train is not None:
            recorded: Batch | None = given.train
        elif given is None:
            recorded = run.task.train
        else:
            recorded = None if run.data is None else run.data.train
        path = isinstance(data, str | Path)
        train, found = take_data(data, str(data) if path else "train", recorded, n)
        return cls(train, found, Path(data).name if path else None)


def choose_task(run: Run, given: Task | None, other: OtherData | None = None) -> Task:
    """The task that is evaluated: the one that was given, on the run's data if it has none, or the one recorded.

    Args:
        run: opened.
        given: in place of the one that was recorded.
        other: training samples in place of those that it has.

    Raises:
        TaskError: there is none, or no data for it.
        RunError: the files that hold loss or data are damaged.
    """
    if other is not None:
        if given is not None and given.train is None and run.data is None:
            return given.with_data(other.train, None, other.n)
        return replace(choose_task(run, given), train=other.train, n=other.n)
    if given is None:
        return run.task
    if given.train is not None:
        return given
    if run.data is None:
        raise TaskError(f"{run.name}: holds no data; give the task its own: groktrace.Task.from_model(..., train=...).")
    return given.with_data(run.data.train, run.data.val, run.data.n)


def run_layout(run: Run, patterns: Sequence[str] | None) -> WeightLayout:
    """The sampled weights of a run, see `weight_layout`.

    Args:
        run: opened.
        patterns: of the names to sample; None for all.
    """
    return weight_layout({name: (spec.shape, spec.dtype, spec.trainable) for name, spec in run.specs.items()}, patterns)


def weight_layout(
    specs: dict[str, tuple[tuple[int, ...], torch.dtype, bool]], patterns: Sequence[str] | None = None
) -> WeightLayout:
    """The sampled weights among all tensors of a network and its loss.

    Those that train at some time are sampled at every snapshot, so that all are measured by one posterior.

    Args:
        specs: (shape, dtype, whether it ever trains) by name.
        patterns: shell-style patterns of the names to sample, or of parts of tensors; None for all.

    Raises:
        TaskError: there is nothing to sample.
        SettingsError: a pattern fits none of the trainable weights, or a tensor has no such part.
    """
    chosen = {
        name: shape
        for name, (shape, dtype, trainable) in specs.items()
        if trainable and (dtype.is_floating_point or dtype.is_complex)
    }
    if not sum(math.prod(shape) for shape in chosen.values()):
        raise TaskError("weights: expected at least one trainable parameter of real or complex numbers, found none.")
    sampled = [Part(name, ()) for name in chosen] if patterns is None else _parts(chosen, patterns)
    names = [part_name(part, chosen[part.tensor]) for part in sampled]
    return WeightLayout(
        tuple(names),
        tuple(part_shape(part, chosen[part.tensor]) for part in sampled),
        tuple(name for name, part in zip(names, sampled, strict=True) if specs[part.tensor][1].is_complex),
        tuple((name, part) for name, part in zip(names, sampled, strict=True) if part.ranges),
    )


def _parts(shapes: dict[str, tuple[int, ...]], patterns: Sequence[str]) -> list[Part]:
    """What patterns choose of tensors: all that any of them does, each weight once.

    Brackets at the end of a pattern cut a part out of what the pattern before them fits. Where the whole fits names as
    it stands (`layers.*.[01]`), it is a pattern of names, unless what is before the brackets is a tensor's own name.

    Raises:
        SettingsError: one fits nothing, a tensor has no such part, or two parts overlap without being one.
    """
    found: dict[str, list[Part]] = {name: [] for name in shapes}
    for pattern in patterns:
        tensor, fits, ranges = pattern.partition("[")[0], _fits(shapes, pattern), None
        if pattern not in shapes and (not fits or (tensor in shapes and pattern.endswith("]"))):
            tensor, ranges = parse_part(pattern) or (tensor, None)
            fits = _fits(shapes, tensor)
            if fits and ranges is None:
                raise SettingsError(f"parameters: '{pattern}' is no part of a tensor; expected {FORM}.")
        if not fits:
            raise SettingsError(f"parameters: '{pattern}' fits none of the trainable weights: {', '.join(shapes)}.")
        for name in fits:
            found[name].append(Part(name, ()) if ranges is None else cut(name, shapes[name], ranges))
    chosen = []
    for name, parts in found.items():
        whole = Part(name, ())
        parts = [whole] if whole in parts else sorted(set(parts), key=lambda part: part.ranges)
        for one, other in itertools.combinations(parts, 2):
            if one.overlaps(other):
                both = " and ".join(f"'{part_name(part, shapes[name])}'" for part in (one, other))
                raise SettingsError(f"parameters: {both} overlap; give each weight once.")
        chosen += parts
    return chosen


def _fits(names: Iterable[str], pattern: str) -> list[str]:
    """The names that a pattern fits; a name fits itself, whatever it has in it."""
    return [name for name in names if name == pattern or fnmatch.fnmatchcase(name, pattern)]
