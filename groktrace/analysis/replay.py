"""A run directory in, a trajectory out; the only place where files and sampling meet."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from groktrace.analysis.estimate import (
    choose_device,
    choose_scale,
    estimate_stack,
    make_settings,
    weight_layout,
)
from groktrace.analysis.evaluation import Survey, survey, training_loss
from groktrace.analysis.journal import append_lines, exclusive, read_lines
from groktrace.analysis.llc import LLCEstimate
from groktrace.analysis.reference import Reference, check_reference, jacobian_reference
from groktrace.analysis.sharpness import Sharpness, measure_sharpness
from groktrace.analysis.trajectory import Point, Trajectory
from groktrace.errors import RunError, SnapshotError, TaskError
from groktrace.run import layout
from groktrace.run.files import read_json, read_metadata, write_json
from groktrace.run.store import Run, Snapshot, open_run
from groktrace.run.task import Task
from groktrace.sampling.calibration import settle_chains
from groktrace.sampling.chains import rows_per_stack
from groktrace.sampling.network import as_float
from groktrace.sampling.posterior import WeightLayout
from groktrace.sampling.settings import SamplingSettings

TRAJECTORY_FILE = "trajectory.json"
SETTINGS_FILE = "settings.json"
_SURVEY_FILE = "survey.jsonl"
POINTS_FILE = "points.jsonl"
_SHARPNESS_FILE = "sharpness.jsonl"
_REFERENCE_FILE = "reference.jsonl"

Progress = Callable[[str, int, int], None]
Result = TypeVar("Result", Survey, Point, Sharpness, Reference)


def analyze(
    run: Run | str | Path,
    *,
    task: Task | None = None,
    task_name: str | None = None,
    device: str | torch.device | None = None,
    progress: Progress | None = None,
    reference: float | Literal["jacobian"] | None = None,
    curvature: bool = False,
    **settings: Any,
) -> Trajectory:
    """Replay a run's snapshots through the sampler into a trajectory of λ̂.

    What is finished is kept in the run directory as it comes; a second call with the same settings goes on from there.

    Args:
        run: a run directory, its path or its URL.
        task: loss and data, where the recording could not keep them.
        task_name: what to call that task in the results' settings.
        device: where to compute; a GPU where there is one.
        progress: called with (phase, snapshots done, snapshots in all).
        reference: a value of λ to show beside the trajectory; "jacobian" for half the rank of the Jacobian of the
            outputs on the training samples, at the last snapshot.
        curvature: whether to measure trace and top eigenvalue of the training loss's Hessian at each snapshot.
        **settings: see `groktrace.SamplingSettings`.

    Returns:
        The trajectory; snapshots that cannot be read are named in its `unreadable`.

    Raises:
        SettingsError: a setting is outside what it may be.
        RunError: the run directory cannot be used, or none of its snapshots.
        TaskError: the recording holds no loss to evaluate and none was given.
    """
    chosen = make_settings(settings)
    check_reference(reference)
    place = choose_device(device)
    run = run if isinstance(run, Run) else open_run(run)
    evaluated = run.task if task is None else task
    sampled = weight_layout(
        {name: (spec.shape, spec.dtype, spec.trainable) for name, spec in run.specs.items()}, chosen.parameters
    )
    chosen = settle_chains(chosen, sampled.size)
    snapshots = _Snapshots(run)
    first = snapshots.first()
    # A task of another network is refused here, before anything is written.
    _check_task(evaluated, first)
    loss = training_loss(evaluated, sampled, first, place)
    del first  # a large network's weights are not held twice
    rows = rows_per_stack(loss)
    report = progress or (lambda phase, done, total: None)
    folder = run.root / layout.ANALYSIS_FOLDER / folder_name(run, chosen, task_name)
    folder.mkdir(parents=True, exist_ok=True)
    with exclusive(folder):

        def survey_group(group: _Group) -> list[Survey]:
            weights, steps = [weights for _, weights in group], [snapshot.step for snapshot, _ in group]
            return survey(evaluated, loss, weights, steps, chosen.seed)

        surveyed = snapshots.replay(
            folder / _SURVEY_FILE, rows, survey_group, Survey.from_dict, lambda d, n: report("losses, curvature", d, n)
        )
        nbeta, localization = _fixed_scale(folder, chosen, evaluated.n, sampled, list(surveyed.values()))
        run.publish(folder / SETTINGS_FILE)

        def take_rank(group: _Group) -> list[Reference]:
            return [jacobian_reference(evaluated, sampled, weights, each.step, place) for each, weights in group]

        beside = None
        if reference == "jacobian":
            # Before the sampling, so that a network too large for its rank is refused early.
            _, beside = snapshots.replay(
                folder / _REFERENCE_FILE,
                1,
                take_rank,
                Reference.from_dict,
                lambda d, n: report("Jacobian rank", d, n),
                snapshots.last(),
            ).popitem()
        elif reference is not None:
            beside = Reference(float(reference), "value")

        def sample_group(group: _Group) -> list[Point]:
            weights = [weights for _, weights in group]
            about = [surveyed[snapshot.step] for snapshot, _ in group]
            estimates = estimate_stack(loss, weights, about, chosen, nbeta, localization, evaluated.n)
            return [
                _point(snapshot, each, estimate)
                for (snapshot, _), each, estimate in zip(group, about, estimates, strict=True)
            ]

        together = max(1, rows_per_stack(loss, chosen.batch_size) // chosen.chains)
        points = snapshots.replay(
            folder / POINTS_FILE, together, sample_group, Point.from_dict, lambda d, n: report("sampling", d, n)
        )
        if curvature:

            def measure_group(group: _Group) -> list[Sharpness]:
                weights, steps = [weights for _, weights in group], [snapshot.step for snapshot, _ in group]
                return measure_sharpness(loss, weights, steps, chosen.seed)

            measured = snapshots.replay(
                folder / _SHARPNESS_FILE, rows, measure_group, Sharpness.from_dict, lambda d, n: report("Hessian", d, n)
            )
            points = {step: replace(points[step], **found.to_dict()) for step, found in measured.items()}
        trajectory = Trajectory(
            tuple(points[step] for step in sorted(points)),
            n=evaluated.n,
            nbeta=nbeta,
            localization=localization,
            resolution=chosen.resolution if chosen.nbeta is None else None,
            locality=chosen.locality if chosen.localization is None else None,
            method=chosen.method,
            run=run.name,
            unreadable=tuple(snapshots.unreadable),
            reference=beside,
        )
        trajectory.save(folder / TRAJECTORY_FILE)
        run.publish(folder / TRAJECTORY_FILE)
    return trajectory


def latest_trajectory(run: str | Path) -> Trajectory:
    """The trajectory that was finished last in a run directory.

    Raises:
        RunError: there is none.
    """
    opened = open_run(run)
    found = list((opened.root / layout.ANALYSIS_FOLDER).glob(f"*/{TRAJECTORY_FILE}"))
    if not found:
        raise RunError(f"{run}: not analysed yet; run 'groktrace analyze {run}' first.")
    return Trajectory.load(max(found, key=lambda path: path.stat().st_mtime_ns))


_Group = list[tuple[Snapshot, dict[str, Tensor]]]


class _Snapshots:
    """The snapshots of a run that can be read, and a line for each that cannot."""

    def __init__(self, run: Run) -> None:
        self.unreadable: list[str] = []
        self.prints: dict[Snapshot, str] = {}
        for snapshot in run.snapshots:
            try:
                self.prints[snapshot] = snapshot.fingerprint()
            except SnapshotError as failure:
                self.unreadable.append(str(failure))
        self.run = run

    def first(self) -> dict[str, Tensor]:
        """The weights of the first snapshot that loads.

        Raises:
            RunError: none does.
        """
        for snapshot in list(self.prints):
            if (weights := self.load(snapshot)) is not None:
                return weights
        raise RunError(f"{self.run.name}: none of its snapshots can be read; the first: {self.unreadable[0]}")

    def last(self) -> list[Snapshot]:
        """The last snapshot that loads, alone; none if none does."""
        return next(([each] for each in reversed(list(self.prints)) if self.load(each) is not None), [])

    def load(self, snapshot: Snapshot) -> dict[str, Tensor] | None:
        """Its weights; None, and a line in `unreadable`, where the file is damaged."""
        try:
            return snapshot.load()
        except SnapshotError as failure:
            self.unreadable.append(str(failure))
            del self.prints[snapshot]
            return None

    def replay(
        self,
        journal: Path,
        stack: int,
        compute: Callable[[_Group], list[Result]],
        parse: Callable[[Any], Result],
        report: Callable[[int, int], None],
        among: Sequence[Snapshot] | None = None,
    ) -> dict[int, Result]:
        """A result for each snapshot, those in the journal as they are, the others computed and added to it.

        Args:
            journal: where results are kept, keyed by the snapshots' fingerprints.
            stack: snapshots computed at once; a stack of which some are missing is computed anew as a whole, so that
                an interruption leaves no trace in the rounding.
            compute: results of a group.
            parse: a result from its journal line.
            report: called with (snapshots done, snapshots in all).
            among: the snapshots wanted; None for all.
        """
        known: dict[str, Result] = {}
        for record in read_lines(journal):
            try:
                fingerprint = str(record.pop("snapshot"))
                known[fingerprint] = parse(record)
            except (KeyError, TypeError, ValueError) as failure:
                raise RunError(f"{journal}: damaged ({failure}); remove the file to redo it.") from failure
        ordered = list(self.prints if among is None else among)
        results: dict[int, Result] = {}
        report(0, len(ordered))
        for start in range(0, len(ordered), stack):
            wanted = ordered[start : start + stack]
            if any(self.prints[snapshot] not in known for snapshot in wanted):
                group = [(snapshot, weights) for snapshot in wanted if (weights := self.load(snapshot)) is not None]
                computed = compute(group) if group else []
                lines = []
                for (snapshot, _), result in zip(group, computed, strict=True):
                    if self.prints[snapshot] not in known:
                        known[self.prints[snapshot]] = parse(result.to_dict())
                        lines.append({"snapshot": self.prints[snapshot], **result.to_dict()})
                append_lines(journal, lines)
                self.run.publish(journal)
            for snapshot in wanted:
                if snapshot in self.prints:
                    results[snapshot.step] = known[self.prints[snapshot]]
            report(min(start + stack, len(ordered)), len(ordered))
        return results


def _check_task(task: Task, weights: dict[str, Tensor]) -> None:
    """Evaluate the loss once, so that a task of another network is refused in plain words."""
    try:
        with torch.no_grad():
            named = {name: as_float(tensor) for name, tensor in weights.items()}
            try:
                task.forward(named, task.train.take(slice(0, 2)).tensors)
            except Exception:  # some take one batch size only
                task.forward(named, task.train.tensors)
    except TaskError:
        raise
    except Exception as failure:
        line = str(failure).splitlines()[0] if str(failure) else ""
        raise TaskError(
            f"the task's loss cannot be evaluated on the recorded weights ({type(failure).__name__}: {line}); it "
            "has to be of the network that was recorded."
        ) from failure


def folder_name(run: Run, settings: SamplingSettings, task_name: str | None) -> str:
    """Where the results lie: the method, and a digest of everything that they depend on but the snapshots."""
    content: list[Any] = [layout.FORMAT_VERSION, settings.to_dict(), task_name]
    if task_name is None:
        data = read_metadata(run.root / layout.DATA_FILE).get("digests")
        content += [data, read_json(run.root / layout.PROGRAM_FILE)]
    return f"{settings.method}-{hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]}"


def _fixed_scale(
    folder: Path, settings: SamplingSettings, n: int, sampled: WeightLayout, surveys: list[Survey]
) -> tuple[float, float]:
    """nβ and γ of this analysis: chosen once, then kept, so that later snapshots are measured with the same."""
    path = folder / SETTINGS_FILE
    if path.exists():
        kept = read_json(path)
        try:
            return float(kept["chosen"]["nbeta"]), float(kept["chosen"]["localization"])
        except (KeyError, TypeError, ValueError) as failure:
            raise RunError(f"{path}: damaged ({failure}); remove the folder {folder} and analyse again.") from failure
    nbeta, localization = choose_scale(settings, n, sampled, surveys)
    write_json(path, {"asked": settings.to_dict(), "chosen": {"nbeta": nbeta, "localization": localization}})
    return nbeta, localization


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
        {**estimate.diagnostics, "top_curvature": about.top_curvature, "norm": about.norm_squared**0.5},
    )
