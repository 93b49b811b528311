"""What evaluates the snapshots of one run; any process can rebuild it from names and settings."""

import math
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from groktrace.analysis.measurement.hessian import HessianMetrics, measure_hessian
from groktrace.analysis.measurement.llc import LLCEstimate
from groktrace.analysis.measurement.measure import Objective, SnapshotMetrics
from groktrace.analysis.results.draws import Draws, Keep
from groktrace.analysis.results.identity import Identity, identify, noise_key, recorded_digest
from groktrace.analysis.results.trajectory import Point
from groktrace.analysis.running.setup import OtherData, choose_task, run_layout
from groktrace.analysis.tuning import PASSES
from groktrace.errors import RunError, SnapshotError
from groktrace.run.factory import load_factory
from groktrace.run.layout import ANALYSIS_FOLDER, DATA_FILE
from groktrace.run.store import Run, Snapshot, open_run
from groktrace.run.task import Task, failures_in_words
from groktrace.sampling.calibration import Scale
from groktrace.sampling.interruption import TimeUpError, give_up_at
from groktrace.sampling.network import as_float
from groktrace.sampling.settings import ResolvedSettings, SamplingSettings

Result = SnapshotMetrics | Point | HessianMetrics | tuple[Point, Draws | None]
Phase = Literal["metrics", "llc", "hessian"]


@dataclass(frozen=True)
class WorkItem:
    """Snapshots that are evaluated as one stack, and what is to be found out of them.

    Attributes:
        phase: "metrics" (losses and curvature), "llc" (λ̂) or "hessian" (its trace and top eigenvalue).
        steps: of the snapshots.
        fingerprints: of the same snapshots; others under the same names are not evaluated.
        metrics: of the same snapshots, for "llc".
        scale: nβ and γ, for "llc".
        keep: what of the draws comes with each point, for "llc".
    """

    phase: Phase
    steps: tuple[int, ...]
    fingerprints: tuple[str, ...]
    metrics: tuple[SnapshotMetrics, ...] = ()
    scale: Scale | None = None
    keep: Keep | None = None


@dataclass(frozen=True)
class EvaluatorSpec:
    """What another process needs to evaluate the same snapshots in the same way.

    Attributes:
        run: absolute path or URL.
        task_name: "package.module:factory", where the recording could not keep model and loss.
        settings: of the sampling.
        device: where to compute.
        first: the snapshot at which the loss is tried.
        identity: of data, program, and the factory's task, which it has to find there.
        data: the folder of results that holds the samples; None for the run's own, or the task's.
    """

    run: str
    task_name: str | None
    settings: ResolvedSettings
    device: str
    first: int
    identity: Identity
    data: str | None = None


class ReplacedError(RunError):
    """A snapshot is another one than that whose evaluation was asked for."""


@dataclass(frozen=True)
class Evaluator:
    """Evaluates the snapshots of one run.

    Attributes:
        objective: what they are measured by.
        identity: what results depend on besides settings and snapshots.
    """

    objective: Objective
    identity: Identity

    @classmethod
    def of(
        cls,
        run: Run,
        given: Task | None,
        settings: SamplingSettings,
        device: torch.device,
        first: dict[str, Tensor],
        other: OtherData | None = None,
    ) -> "Evaluator":
        """Prepare what evaluates the snapshots of a run.

        Args:
            run: opened.
            given: the task in place of the recorded one, if any.
            settings: of the sampling.
            device: where to compute.
            first: the weights of the run's first snapshot, to try the loss at.
            other: samples in place of the task's.

        Raises:
            RunError: files of the run are damaged.
            TaskError: there is no loss to evaluate, no data, or they do not fit the network.
        """
        task, layout = choose_task(run, given, other), run_layout(run, settings.parameters)
        task, first = replace(task, forward=layout.joined(task.forward)), layout.split(first)
        advice = "it has to be of the network that was recorded."
        if other is not None:
            advice = "the samples have to be such as the network takes; some programs take one number of them only."
        with failures_in_words("the task's loss cannot be evaluated on the recorded weights", advice), torch.no_grad():
            named = {name: as_float(tensor) for name, tensor in first.items()}
            try:
                task.forward(named, task.train.take(slice(0, 2)).tensors)
            except Exception:  # some take one batch size only
                task.forward(named, task.train.tensors)
        objective = Objective.of(task, layout, settings, first, device)
        return cls(objective, identify(run, given, task, layout, first, other is not None))

    def fork(self) -> "Evaluator":
        """The same for another thread."""
        return replace(self, objective=self.objective.fork())

    def key(self, fingerprint: str) -> int:
        """What a snapshot's noise is keyed by beside the seed."""
        return noise_key(self.identity, fingerprint)

    def evaluate(self, item: WorkItem, snapshots: Mapping[int, Snapshot]) -> list[Result | SnapshotError]:
        """A result for each snapshot of a work item, or what is wrong with its file.

        Args:
            item: what to do.
            snapshots: the run's, by step.

        Raises:
            ReplacedError: a snapshot is missing, or is not the one whose fingerprint the item has.
        """
        results: dict[int, Result | SnapshotError] = {}
        weights: dict[int, dict[str, Tensor]] = {}
        for step, fingerprint in zip(item.steps, item.fingerprints, strict=True):
            try:
                if step not in snapshots or snapshots[step].fingerprint() != fingerprint:
                    raise ReplacedError(
                        f"the snapshot of step {step} is not the one that was there when the analysis began: the run "
                        "was recorded anew, or a worker sees another copy of it. Run the analysis again."
                    )
                weights[step] = self.objective.layout.split(snapshots[step].load(with_loss=True))
            except SnapshotError as failure:
                results[step] = failure
        if weights:
            results |= zip(weights, self._evaluate(item, snapshots, weights), strict=True)
        return [results[step] for step in item.steps]

    def _evaluate(
        self, item: WorkItem, snapshots: Mapping[int, Snapshot], weights: Mapping[int, dict[str, Tensor]]
    ) -> list[Result]:
        """Results of the snapshots that were read."""
        steps, tensors = list(weights), list(weights.values())
        keys = [self.key(item.fingerprints[item.steps.index(step)]) for step in steps]
        if item.phase == "metrics":
            return list(self.objective.metrics(tensors, steps, keys))
        if item.phase == "hessian":
            return list(measure_hessian(self.objective, tensors, steps, keys))
        metrics = [known for known in item.metrics if known.step in weights]
        sampled = self.objective.sample(tensors, metrics, item.scale, keys, item.keep == "losses")
        results: list[Result] = []
        for known, (estimate, traces) in zip(metrics, sampled, strict=True):
            point = _point(snapshots[known.step], known, estimate)
            kept = item.keep and (point, Draws.of(self.objective, known.step, estimate, traces))
            results.append(kept or point)
        return results


# A rebuilt evaluator writes into buffers of its own, so that one process evaluates one item at a time.
_one_at_a_time = threading.Lock()


def evaluate_elsewhere(
    spec: EvaluatorSpec, item: WorkItem, until: float = math.inf
) -> tuple[bool, list[Result | SnapshotError] | None]:
    """Evaluate an item in whatever process this is called; what it needs is read once and kept for the next one.

    Args:
        spec: how.
        item: what.
        until: when to begin it at the latest, of `time.time`; soon after that it is given up.

    Returns:
        Whether it was begun, and its results; None where it was not, or was given up.
    """
    with _one_at_a_time:
        left = until - time.time()
        if left < 0:
            return False, None
        try:
            with give_up_at(time.monotonic() + left + PASSES.grace_seconds):
                return True, _evaluate_here(spec, item)
        except TimeUpError:
            return True, None


def _evaluate_here(spec: EvaluatorSpec, item: WorkItem) -> list[Result | SnapshotError]:
    evaluator, snapshots = _rebuild(spec)
    try:
        return evaluator.evaluate(item, snapshots)
    except ReplacedError:  # the recording goes on, or there is another one since
        run = open_run(spec.run)
        if recorded_digest(run) != spec.identity.recorded:
            _rebuild.cache_clear()
            evaluator, snapshots = _rebuild(spec)
        snapshots.clear()
        snapshots.update((snapshot.step, snapshot) for snapshot in run.snapshots)
        return evaluator.evaluate(item, snapshots)


@lru_cache(maxsize=1)
def _rebuild(spec: EvaluatorSpec) -> tuple[Evaluator, dict[int, Snapshot]]:
    run = open_run(spec.run)
    snapshots = {snapshot.step: snapshot for snapshot in run.snapshots}
    if spec.first not in snapshots:
        raise ReplacedError(f"{spec.run}: a worker finds no snapshot of step {spec.first} there; see that it can.")
    first = snapshots[spec.first].load(with_loss=True)
    task = None if spec.task_name is None else load_factory(spec.task_name)
    other = None
    if spec.data is not None:
        other = OtherData.of(run, task, run.root / ANALYSIS_FOLDER / spec.data / DATA_FILE, None)
    evaluator = Evaluator.of(run, task, spec.settings, torch.device(spec.device), first, other)
    evaluator.identity.check(spec.identity, spec.run, spec.task_name)
    return evaluator, snapshots


def _point(snapshot: Snapshot, metrics: SnapshotMetrics, estimate: LLCEstimate) -> Point:
    errors = {"train_loss_stderr": metrics.train_loss_stderr, "val_loss_stderr": metrics.val_loss_stderr}
    return Point(
        snapshot.step,
        estimate.llc,
        estimate.stderr,
        estimate.llc_centred,
        estimate.stderr_centred,
        estimate.reliable,
        estimate.reasons,
        metrics.train_loss,
        metrics.train_accuracy,
        metrics.val_loss,
        metrics.val_accuracy,
        snapshot.metrics(),
        {
            **estimate.diagnostics,
            "top_curvature": metrics.top_curvature,
            "norm": metrics.norm_squared**0.5,
            "nbeta": estimate.nbeta,
            **{name: error for name, error in errors.items() if error is not None},
        },
    )
