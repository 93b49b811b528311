"""What results depend on besides settings and snapshots: known by content, never by a name, a path or a time."""

import contextlib
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from groktrace.errors import RunError, TaskError
from groktrace.run import layout as names
from groktrace.run.batch import Batch
from groktrace.run.files import digest, read_json, read_metadata
from groktrace.run.store import Run
from groktrace.run.task import Task
from groktrace.sampling.network import as_float
from groktrace.sampling.tuning import MEMORY
from groktrace.sampling.weights import WeightLayout

# Numbers of two evaluations of one loss agree to this fraction, on whatever machine; the second, in single precision.
_TOLERANCE, _TOLERANCE_SINGLE = 1e-5, 1e-3
# A loss is known by what it does on so many batches of so many samples: of a network of ordinary size, and of a large
# one, which is evaluated at one point only.
_BATCHES, _BATCHES_LARGE = (8, 128), (2, 8)
# Digits that stand above the rounding of double precision, and of single.
_DIGITS, _DIGITS_SINGLE = 8, 4
_LEAST = 1e-250
# A loss below this fraction of the loss at nearby weights is rounding, and counts as zero.
_ROUNDING = 1e-6
# The gradient is taken by the smallest sampled tensors, of so many elements together.
_GRADIENT_ELEMENTS = 2**20


@dataclass(frozen=True)
class Behaviour:
    """What a loss gives on a few samples, at the weights of a snapshot and at others far from it.

    Attributes:
        numbers: (name, value, size against which a difference counts) of each.
        digits: how many digits of that size stand above rounding.
    """

    numbers: tuple[tuple[str, float, float], ...]
    digits: int

    def rounded(self) -> list[Any]:
        """The same for any number of threads, but for a value that lies just between two."""
        found: list[Any] = [self.digits]
        for what, value, size in self.numbers:
            quantum = 10.0 ** (math.floor(math.log10(size)) + 1 - self.digits) if size > _LEAST else 1.0
            found.append([what, round(value / quantum) if math.isfinite(value) else None])
        return found

    def difference(self, other: "Behaviour") -> tuple[str, float, float] | None:
        """The first number of both that differs by more than rounding, and its two values; None where none does.

        Args:
            other: of another evaluation at the same weights.
        """
        theirs = {what: (value, size) for what, value, size in other.numbers}
        tolerance = _TOLERANCE if self.digits == other.digits == _DIGITS else _TOLERANCE_SINGLE
        for what, value, size in self.numbers:
            there, size_there = theirs.get(what, (value, size))
            if value != there and not abs(value - there) <= tolerance * max(size, size_there):
                return what, value, there
        return None


@dataclass(frozen=True)
class Identity:
    """What an analysis depends on besides settings and snapshots.

    Attributes:
        recorded: digest of what the run holds beside its snapshots.
        content: digest of that, of the sampled weights, of when the recording began (one that is resumed keeps it, and
            so does a copy), and of the data of a task that was given, or of data that were.
        behaviour: of a task that was given, for which there is no program.
    """

    recorded: str
    content: str
    behaviour: Behaviour | None = None

    @property
    def key(self) -> str:
        """A digest of all of it."""
        return _digest([self.content, self.behaviour and self.behaviour.rounded()])

    def check(self, asked: "Identity", run: str, task_name: str | None) -> None:
        """Refuse to work for a process that has something else before it.

        Args:
            asked: of that process.
            run: path or URL of the run, for the message.
            task_name: the factory's name, for the message.

        Raises:
            RunError: data, program or sampled weights are others.
            TaskError: the factory's loss is another.
        """
        if self.content != asked.content:
            given = "" if task_name is None else f", or --task {task_name} makes others at each call"
            raise RunError(
                f"{run}: a worker finds other data or another program there than the process that asked{given}; "
                "it may see an older copy. Run the analysis again, with new workers."
            )
        if self.behaviour is not None and self.behaviour.difference(asked.behaviour) is not None:
            raise TaskError(
                f"--task {task_name}: computes another loss in a worker than in the process that asked; workers keep "
                "the code that they imported first. Run the analysis again, with new workers."
            )


def identify(
    run: Run,
    given: Task | None,
    task: Task,
    layout: WeightLayout,
    weights: Mapping[str, Tensor],
    other_data: bool = False,
) -> Identity:
    """What an analysis of a run depends on.

    Args:
        run: opened.
        given: the task that was given in place of the recorded one, if any.
        task: the one that is evaluated.
        layout: the sampled weights.
        weights: tensors by name, of the run's first snapshot.
        other_data: whether the task has other training samples than it came with.

    Raises:
        TaskError: the given task's loss cannot be evaluated.
    """
    recorded = recorded_digest(run)
    content = [recorded, repr(layout), run.info.get("created")]
    if given is None and not other_data:
        return Identity(recorded, _digest(content))
    data = [None if batch is None else _describe(batch) for batch in (task.train, task.val)]
    behaviour = None if given is None else measure_behaviour(task, layout, weights)
    return Identity(recorded, _digest([*content, data, task.n, task.shift_invariant]), behaviour)


def data_digest(batch: Batch) -> str:
    """What samples are known by.

    Args:
        batch: the samples.
    """
    return _digest(_describe(batch))[:16]


def recorded_parts(run: Run) -> dict[str, str]:
    """Digests of what a run holds beside its snapshots, by file; what is missing or damaged is left out."""
    found: dict[str, str] = {}
    for name in (names.DATA_FILE, names.FROZEN_FILE):
        with contextlib.suppress(RunError):
            found[name] = _digest(read_metadata(run.root / name).get("digests"))
    if names.DATA_FILE in found:
        found[names.DATA_FILE] = _digest([found[names.DATA_FILE], run.info["data"], run.info["n"]])
    with contextlib.suppress(RunError):
        found[names.PROGRAM_FILE] = _digest(read_json(run.root / names.PROGRAM_FILE))
    return found


def recorded_digest(run: Run) -> str:
    """One digest of `recorded_parts`."""
    return _digest(recorded_parts(run))


def noise_key(identity: Identity, fingerprint: str) -> int:
    """What a snapshot's random numbers are keyed by: its weights, and what its run holds; copies have the same.

    Args:
        identity: of the analysis.
        fingerprint: of the snapshot.
    """
    return int(_digest([identity.recorded, fingerprint])[:15], 16)


def measure_behaviour(task: Task, layout: WeightLayout, weights: Mapping[str, Tensor]) -> Behaviour:
    """What the loss of a task does at given weights.

    Args:
        task: with data.
        layout: the sampled weights.
        weights: tensors by name.

    Raises:
        TaskError: it cannot be evaluated.
    """
    large = sum(tensor.numel() for tensor in weights.values()) >= MEMORY.large_weights
    batches = _batches(task.train, *(_BATCHES_LARGE if large else _BATCHES))
    failure: Exception | None = None
    # Some networks take one precision only, some losses one number of samples.
    for double in (False,) if large else (True, False):
        for some in (batches, [task.train]):
            try:
                return _measure(task, layout, weights, some, double, large)
            except Exception as found:
                failure = found
    raise TaskError(f"the task's loss cannot be evaluated ({type(failure).__name__}: {failure}).") from failure


def _measure(
    task: Task, layout: WeightLayout, weights: Mapping[str, Tensor], batches: list[Batch], double: bool, large: bool
) -> Behaviour:
    batches = [Batch(tuple(_cast(tensor, double) for tensor in batch.tensors), batch.structure) for batch in batches]
    by = _some(layout, weights)
    found: list[tuple[str, str, float, float]] = []  # kind, what, value, size
    near: dict[str, float] = {}
    for point, here in _points(weights, layout, double, large):
        leaves = {name: tensor.requires_grad_(name in by) for name, tensor in here.items()}
        losses: dict[str, float] = {}
        for number, batch in enumerate(batches):
            with torch.set_grad_enabled(number == 0), _same_random_numbers():
                loss, outputs = task.forward(leaves, batch.tensors)
            losses[f"loss of {len(batch)} samples" + (f", batch {number + 1}" if number else "")] = float(loss.detach())
            if number == 0 and loss.requires_grad:
                parts = torch.autograd.grad(loss, [leaves[name] for name in by], allow_unused=True)
                found += _two_numbers("gradient", point, [part for part in parts if part is not None])
            if number == 0 and isinstance(outputs, Tensor):
                found += _two_numbers(f"outputs {list(outputs.shape)}", point, [outputs.detach()])
        size = max((abs(value) for value in losses.values() if math.isfinite(value)), default=0.0)
        found += [("loss", f"{what} {point}", value, size) for what, value in losses.items()]
        near = near or {kind: _ROUNDING * size for kind, _, _, size in found if math.isfinite(size)}
    numbers = [
        (what, value, max(size, near.get(kind, 0.0))) if math.isfinite(value + size) else (what, math.inf, 0.0)
        for kind, what, value, size in found
    ]
    return Behaviour(tuple(sorted(numbers, key=_by_interest)), _DIGITS if double else _DIGITS_SINGLE)


def _by_interest(number: tuple[str, float, float]) -> tuple[bool, bool, str]:
    """A user is told of the loss rather than the gradient, and of the snapshot rather than of other weights."""
    return not number[0].startswith("loss"), "at the" not in number[0], number[0]


def _batches(data: Batch, count: int, size: int) -> list[Batch]:
    """Batches of samples that are spread evenly over all."""
    index = torch.linspace(0, len(data) - 1, min(len(data), count * size), dtype=torch.float64).long()
    return [data.take(part) for part in index.split(size)]


def _some(layout: WeightLayout, weights: Mapping[str, Tensor]) -> list[str]:
    """The smallest of the sampled tensors, as many as their elements allow, but one at least."""
    chosen, elements = [], 0
    for name in sorted(layout.names, key=lambda name: (weights[name].numel(), name)):
        elements += weights[name].numel()
        if chosen and elements > _GRADIENT_ELEMENTS:
            break
        chosen.append(name)
    return chosen


def _points(
    weights: Mapping[str, Tensor], layout: WeightLayout, double: bool, large: bool
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The snapshot's weights, others near it, and others far away: there, losses part that are alike at a start or end.

    The near ones come first: a loss of all but nothing at the snapshot, beside theirs, is rounding.
    """
    sampled = {name: _cast(weights[name].detach(), double) for name in layout.names}
    fixed = {name: _cast(tensor.detach().clone(), double) for name, tensor in weights.items() if name not in sampled}

    def moved(factor: float, noise: float) -> dict[str, Tensor]:
        return {
            name: factor * tensor + (noise * tensor.abs().square().mean().sqrt() + 0.01) * _wave(tensor).view_as(tensor)
            for name, tensor in sampled.items()
        }

    points = {"at the first snapshot": sampled}
    if not large:
        near, far = {"near the first snapshot": moved(1.0, 0.5)}, {"far from the first snapshot": moved(4.0, 0.5)}
        points = near | points | far
    for point, here in points.items():
        yield point, {name: tensor.detach() for name, tensor in (here | fixed).items()}


def _cast(tensor: Tensor, double: bool) -> Tensor:
    if double and tensor.is_complex():
        return tensor.to(torch.complex128)
    return tensor.double() if double and tensor.is_floating_point() else as_float(tensor)


def _wave(tensor: Tensor) -> Tensor:
    """Numbers that are as good as random, as many as the tensor has."""
    return torch.arange(tensor.numel(), device=tensor.device, dtype=torch.float64).cos().to(tensor.dtype)


def _two_numbers(kind: str, point: str, tensors: Sequence[Tensor]) -> list[tuple[str, str, float, float]]:
    """Norm and a projection of all elements together."""
    flat = [torch.view_as_real(tensor).flatten() if tensor.is_complex() else tensor.flatten() for tensor in tensors]
    whole = torch.cat([tensor.double() for tensor in flat]) if flat else torch.zeros(1, dtype=torch.float64)
    norm = float(whole.norm())
    return [
        (kind, f"{kind} {point}, norm", norm, norm),
        (kind, f"{kind} {point}, projection", float(whole @ _wave(whole)), norm),
    ]


@contextlib.contextmanager
def _same_random_numbers() -> Iterator[None]:
    """A loss that draws is the same loss each time."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        yield


def _describe(batch: Batch) -> list[Any]:
    return [batch.structure, [digest(tensor) for tensor in batch.tensors]]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
