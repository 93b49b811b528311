"""What evaluates the snapshots of one run; any process can rebuild it from names and settings."""

import copy
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from groktrace.analysis.estimate import estimate_stack, weight_layout
from groktrace.analysis.evaluation import Survey, chance_losses, curvature_loss, survey, training_loss
from groktrace.analysis.identity import Identity, identify, noise_key, recorded_digest
from groktrace.analysis.llc import LLCEstimate
from groktrace.analysis.sharpness import Sharpness, measure_sharpness
from groktrace.analysis.trajectory import Point
from groktrace.errors import RunError, SnapshotError, TaskError
from groktrace.run.factory import load_factory
from groktrace.run.store import Run, Snapshot, open_run
from groktrace.run.task import Task, failures_in_words
from groktrace.sampling.calibration import Scale, settle
from groktrace.sampling.chains import rows_per_stack
from groktrace.sampling.network import as_float
from groktrace.sampling.posterior import WeightLayout
from groktrace.sampling.settings import SamplingSettings

Result = Survey | Point | Sharpness
Group = list[tuple[Snapshot, dict[str, Tensor]]]


@dataclass(frozen=True)
class Chunk:
    """Snapshots that are evaluated as one stack, and what is to be found out of them.

    Attributes:
        phase: "survey" (losses and curvature), "sample" (λ̂) or "sharpen" (trace and top eigenvalue of the Hessian).
        steps: of the snapshots.
        surveys: of the same snapshots, for "sample".
        scale: nβ and γ, for "sample".
        fingerprints: of the same snapshots; others under the same names are not evaluated.
    """

    phase: Literal["survey", "sample", "sharpen"]
    steps: tuple[int, ...]
    surveys: tuple[Survey, ...] = ()
    scale: Scale | None = None
    fingerprints: tuple[str, ...] = ()


@dataclass(frozen=True)
class Recipe:
    """What another process needs to evaluate the same snapshots in the same way.

    Attributes:
        run: absolute path or URL.
        task_name: "package.module:factory", where the recording could not keep model and loss.
        settings: of the sampling.
        device: where to compute.
        first: the snapshot at which the loss is tried.
        identity: of data, program, and the factory's task, which it has to find there.
    """

    run: str
    task_name: str | None
    settings: SamplingSettings
    device: str
    first: int
    identity: Identity


class ReplacedError(RunError):
    """A snapshot is another one than that whose evaluation was asked for."""


class Evaluator:
    """Loss, data and settings of one analysis.

    Args:
        run: opened.
        given: the task in place of the recorded one, if any.
        task: the one that is evaluated, see `choose_task`.
        settings: of the sampling.
        device: where to compute.
        first: the weights of the run's first snapshot, to try the loss at.

    Raises:
        TaskError: the loss cannot be evaluated on them.
    """

    def __init__(
        self,
        run: Run,
        given: Task | None,
        task: Task,
        settings: SamplingSettings,
        device: torch.device,
        first: dict[str, Tensor],
    ) -> None:
        _check_task(task, first)
        self.task, self.device = task, device
        self.layout = layout = run_layout(run, settings.parameters)
        self.loss = training_loss(task, layout, first, device)
        self.settings = settle(settings, layout.size, self.loss.micro_batch is None)
        self.identity = identify(run, given, task, layout, first)
        # At the first snapshot, the same whichever process evaluates and whatever it is asked first.
        self.chance = chance_losses(task, first, device, self.loss.micro_batch)

    @property
    def rows(self) -> int:
        """How many snapshots without chains make a stack."""
        return rows_per_stack(curvature_loss(self.loss))

    @property
    def together(self) -> int:
        """How many snapshots are sampled as one stack, before it is known how."""
        return max(1, rows_per_stack(self.loss, self.settings.batch_size) // self.settings.chains)

    def stack(self, scale: Scale) -> int:
        """How many snapshots are sampled as one stack.

        Args:
            scale: samples and batches.
        """
        if self.loss.sample_bytes is None:
            return self.together
        loss = self.loss.subset(scale.samples, scale.batch_size)
        return max(1, rows_per_stack(loss, scale.batch_size) // self.settings.chains)

    def fork(self) -> "Evaluator":
        """The same for another thread: recorded gradients have buffers that one thread at a time can use."""
        twin = copy.copy(self)
        twin.loss = replace(self.loss, plans={})
        return twin

    def evaluate(self, chunk: Chunk, snapshots: Mapping[int, Snapshot]) -> list[Result | SnapshotError]:
        """A result for each snapshot of a chunk, or what is wrong with its file.

        Args:
            chunk: what to do.
            snapshots: the run's, by step.

        Raises:
            ReplacedError: a snapshot is missing, or is not the one whose fingerprint the chunk has.
        """
        results: dict[int, Result | SnapshotError] = {}
        group: Group = []
        for step, fingerprint in zip(chunk.steps, chunk.fingerprints, strict=True):
            try:
                if step not in snapshots or snapshots[step].fingerprint() != fingerprint:
                    raise ReplacedError(
                        f"the snapshot of step {step} is not the one that was there when the analysis began: the run "
                        "was recorded anew, or a worker sees another copy of it. Run the analysis again."
                    )
                group.append((snapshots[step], snapshots[step].load(with_loss=True)))
            except SnapshotError as failure:
                results[step] = failure
        if group:
            found = getattr(self, f"_{chunk.phase}")(group, chunk)
            results |= {snapshot.step: each for (snapshot, _), each in zip(group, found, strict=True)}
        return [results[step] for step in chunk.steps]

    def _keys(self, group: Group, chunk: Chunk) -> list[int]:
        """What the noise of each snapshot is keyed by."""
        fingerprints = dict(zip(chunk.steps, chunk.fingerprints, strict=True))
        return [noise_key(self.identity, fingerprints[snapshot.step]) for snapshot, _ in group]

    def _survey(self, group: Group, chunk: Chunk) -> list[Survey]:
        weights, steps = [weights for _, weights in group], [snapshot.step for snapshot, _ in group]
        return survey(self.task, self.loss, weights, steps, self.settings.seed, self._keys(group, chunk))

    def _sample(self, group: Group, chunk: Chunk) -> list[Point]:
        known = {each.step: each for each in chunk.surveys}
        about = [known[snapshot.step] for snapshot, _ in group]
        weights = [weights for _, weights in group]
        keys = self._keys(group, chunk)
        estimates = estimate_stack(
            self.loss, weights, about, self.settings, chunk.scale, self.task.n, keys, self.chance
        )
        return [
            _point(snapshot, each, estimate)
            for (snapshot, _), each, estimate in zip(group, about, estimates, strict=True)
        ]

    def _sharpen(self, group: Group, chunk: Chunk) -> list[Sharpness]:
        weights, steps = [weights for _, weights in group], [snapshot.step for snapshot, _ in group]
        return measure_sharpness(self.loss, weights, steps, self.settings.seed, self._keys(group, chunk))


def choose_task(run: Run, given: Task | None) -> Task:
    """The task that is evaluated: the one that was given, on the run's data if it has none, or the one recorded.

    Args:
        run: opened.
        given: in place of the one that was recorded.

    Raises:
        TaskError: there is none, or no data for it.
        RunError: the files that hold loss or data are damaged.
    """
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


# A rebuilt evaluator writes into buffers of its own, so that one process evaluates one chunk at a time.
_one_at_a_time = threading.Lock()


def evaluate_elsewhere(recipe: Recipe, chunk: Chunk) -> list[Result | SnapshotError]:
    """Evaluate a chunk in whatever process this is called; what it needs is read once and kept for the next chunk.

    Args:
        recipe: how.
        chunk: what.
    """
    with _one_at_a_time:
        evaluator, snapshots = _rebuild(recipe)
        try:
            return evaluator.evaluate(chunk, snapshots)
        except ReplacedError:  # the recording goes on, or there is another one since
            run = open_run(recipe.run)
            if recorded_digest(run) != recipe.identity.recorded:
                _rebuild.cache_clear()
                evaluator, snapshots = _rebuild(recipe)
            snapshots.clear()
            snapshots.update((each.step, each) for each in run.snapshots)
            return evaluator.evaluate(chunk, snapshots)


@lru_cache(maxsize=1)
def _rebuild(recipe: Recipe) -> tuple[Evaluator, dict[int, Snapshot]]:
    run = open_run(recipe.run)
    snapshots = {each.step: each for each in run.snapshots}
    if recipe.first not in snapshots:
        raise ReplacedError(f"{recipe.run}: a worker finds no snapshot of step {recipe.first} there; see that it can.")
    first = snapshots[recipe.first].load(with_loss=True)
    task = None if recipe.task_name is None else load_factory(recipe.task_name)
    evaluated = choose_task(run, task)
    evaluator = Evaluator(run, task, evaluated, recipe.settings, torch.device(recipe.device), first)
    evaluator.identity.check(recipe.identity, recipe.run, recipe.task_name)
    return evaluator, snapshots


def _check_task(task: Task, weights: dict[str, Tensor]) -> None:
    """Evaluate the loss once, so that a task of another network is refused in plain words."""
    advice = "it has to be of the network that was recorded."
    with failures_in_words("the task's loss cannot be evaluated on the recorded weights", advice), torch.no_grad():
        named = {name: as_float(tensor) for name, tensor in weights.items()}
        try:
            task.forward(named, task.train.take(slice(0, 2)).tensors)
        except Exception:  # some take one batch size only
            task.forward(named, task.train.tensors)


def _point(snapshot: Snapshot, about: Survey, estimate: LLCEstimate) -> Point:
    return Point(
        snapshot.step,
        estimate.llc,
        estimate.stderr,
        estimate.llc_centred,
        estimate.stderr_centred,
        estimate.reliable,
        estimate.reasons,
        about.train_loss,
        about.train_accuracy,
        about.val_loss,
        about.val_accuracy,
        snapshot.metrics(),
        {
            **estimate.diagnostics,
            "top_curvature": about.top_curvature,
            "norm": about.norm_squared**0.5,
            "nbeta": estimate.nbeta,
        },
    )
