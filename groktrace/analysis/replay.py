"""A run directory in, a trajectory out; the only place where files and sampling meet."""

import contextlib
import hashlib
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from groktrace.analysis.estimate import choose_device, choose_scale, make_settings
from groktrace.analysis.evaluation import Survey
from groktrace.analysis.evaluator import Chunk, Evaluator, Recipe, choose_task
from groktrace.analysis.identity import noise_key
from groktrace.analysis.journal import append_lines, exclusive
from groktrace.analysis.latest import TRAJECTORY_FILE, note_latest
from groktrace.analysis.passes import sample_adaptively, sample_in_passes, spread
from groktrace.analysis.pilot import choose_sampling
from groktrace.analysis.reference import Reference, check_reference, jacobian_reference
from groktrace.analysis.reminders import reminders
from groktrace.analysis.sharpness import Sharpness
from groktrace.analysis.snapshots import Snapshots, Workers, read_journal
from groktrace.analysis.trajectory import Point, Trajectory, with_logged
from groktrace.analysis.workers import Elsewhere, available_threads, process_pool, threads_here
from groktrace.errors import RunError, SettingsError
from groktrace.run import layout
from groktrace.run.files import read_json, write_file, write_json
from groktrace.run.store import Run, open_run
from groktrace.run.task import Task
from groktrace.sampling.calibration import Scale, resolution
from groktrace.sampling.settings import SamplingOptions, SamplingSettings

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from groktrace.analysis.detection import Detector
    from groktrace.reporting.base import Reporter

SETTINGS_FILE = "settings.json"
POINTS_FILE = "points.jsonl"
_SHARPNESS_FILE = "sharpness.jsonl"
_REFERENCE_FILE = "reference.jsonl"
# Snapshots of the first pass, from which a run's scale is chosen where data are sampled, and of each later pass at
# least; stacks of a pass where data are used whole; seconds between two results that show what there is so far.
COARSE, ROUND, STACKS = 16, 8, 16
PARTIAL_SECONDS = 15.0
# Goes up when the same settings come to give other numbers, which must not end up beside the older ones.
_ESTIMATOR = 7

Progress = Callable[[str, int, int], None]


def analyze(
    run: Run | str | Path,
    *,
    task: Task | None = None,
    task_name: str | None = None,
    device: str | torch.device | None = None,
    progress: Progress | None = None,
    reference: float | Literal["jacobian"] | None = None,
    curvature: bool = False,
    adaptive: bool = False,
    jobs: int = 1,
    executor: Executor | None = None,
    time_limit: float | None = None,
    partial: Callable[[Trajectory], None] | None = None,
    detector: "Detector | None" = None,
    reporters: Sequence["Reporter"] = (),
    settings: SamplingSettings | None = None,
    **options: "Unpack[SamplingOptions]",
) -> Trajectory:
    """Replay a run's snapshots through the sampler into a trajectory of λ̂.

    What is finished is kept in the run directory as it comes; a second call with the same settings goes on from there.

    Args:
        run: a run directory, its path or its URL.
        task: loss and data, where the recording could not keep them, or in their place; without data of its own, it
            is measured on the run's. Its results are kept apart from those of other losses and data.
        task_name: "package.module:factory", by which other processes import that task.
        device: where to compute; a GPU where there is one.
        progress: called with (phase, snapshots done, snapshots in all).
        reference: a value of λ to show beside the trajectory; "jacobian" for half the rank of the Jacobian of the
            outputs on the training samples, at the last snapshot.
        curvature: whether to measure trace and top eigenvalue of the training loss's Hessian at each snapshot.
        adaptive: whether to sample only a coarse subset of the snapshots, and those that date its transitions: a tenth
            of all at most, or 128. Losses and curvature are still measured at all, since they fix nβ and γ.
        jobs: processes on this machine, which share this one's threads. A script that asks for more than one needs
            `if __name__ == "__main__":`, as with all of Python's multiprocessing.
        executor: instead of `jobs`, takes the work in pieces of some snapshots; its processes must reach the run
            directory by the same path, or by its URL. Only this process writes there.
        time_limit: seconds after which no further snapshot is begun; a later call goes on. None for no limit.
        partial: called with the trajectory so far, every half minute or so.
        detector: of the transitions that reporters show; see `find_transitions`.
        reporters: show the trajectory so far, as often, and the final one; their files go into the run directory.
        settings: of the sampling; None for the defaults.
        **options: fields of `groktrace.SamplingSettings`, in place of those of `settings`.

    Returns:
        The trajectory; snapshots that cannot be read are named in its `unreadable`.

    Raises:
        SettingsError: a setting is outside what it may be.
        RunError: the run directory cannot be used, or none of its snapshots; or workers were lost.
        TaskError: the recording holds no loss to evaluate and none was given.

    Warns:
        RuntimeWarning: the data of the task that was given are others than those recorded, or its loss is.
    """
    check_reference(reference)
    chosen = make_settings(settings, options)
    if time_limit is not None and not time_limit > 0:
        raise SettingsError(f"time_limit: expected a positive number of seconds, got {time_limit!r}.")
    began = time.monotonic()
    with open_analysis(run, chosen, task, task_name, device, progress, jobs, executor) as analysis:
        deadline = math.inf if time_limit is None else began + time_limit
        source = analysis.snapshots.run

        def show_partial(trajectory: Trajectory) -> None:
            show_by(source, reporters, detector, trajectory)
            if partial is not None:
                partial(trajectory)

        trajectory = analysis.complete(reference, curvature, adaptive, deadline, show_partial if reporters else partial)
        if reporters:
            show_by(source, reporters, detector, trajectory)
        return trajectory


def show_by(run: Run, reporters: Sequence["Reporter"], detector: "Detector | None", trajectory: Trajectory) -> None:
    """Show a trajectory by reporters, whose files go into the run directory.

    Args:
        run: that was analysed.
        reporters: called one after another.
        detector: of the transitions; see `find_transitions`.
        trajectory: of the run.

    Raises:
        RunError: files cannot be sent to a remote run.
    """
    from groktrace.reporting.base import report  # built on this package: only where it is called

    with exclusive(run.root / layout.ANALYSIS_FOLDER, wait=True), run.publishing():
        report(trajectory, reporters, run.root, detector)


@contextlib.contextmanager
def open_analysis(
    run: Run | str | Path,
    settings: SamplingSettings,
    task: Task | None = None,
    task_name: str | None = None,
    device: str | torch.device | None = None,
    progress: Progress | None = None,
    jobs: int = 1,
    executor: Executor | None = None,
) -> Iterator["Analysis"]:
    """An analysis whose folder no other process writes to meanwhile; arguments and errors as those of `analyze`."""
    if executor is not None and jobs != 1:
        raise SettingsError("executor: takes the place of jobs; give one of them.")
    place = choose_device(device)
    run = run if isinstance(run, Run) else open_run(run)
    # A task of another network is refused here, before anything is written.
    evaluator, snapshots, step = prepare(run, task, settings, place)
    with contextlib.ExitStack() as held:
        threads = 1 if task is not None else available_threads(place)
        workers: Workers = held.enter_context(threads_here(evaluator, threads))
        if executor is not None or jobs != 1:
            if task is not None and task_name is None:
                raise SettingsError("task: other processes need its name; give task_name='package.module:factory'.")
            where = str(run.root.absolute()) if run.remote is None else run.name
            name = None if task is None else task_name
            recipe = Recipe(where, name, evaluator.settings, str(place), step, evaluator.identity)
            pool = (executor, None) if executor is not None else held.enter_context(process_pool(jobs))
            workers = Elsewhere(recipe, *pool)
        folder = run.root / layout.ANALYSIS_FOLDER / folder_name(evaluator)
        folder.mkdir(parents=True, exist_ok=True)
        held.enter_context(exclusive(folder))
        _take_surveys(folder, survey_file(evaluator))
        again = partial(open_analysis, run.name, settings, task, task_name, device, progress, jobs, executor)
        yield Analysis(evaluator, snapshots, workers, folder, progress or (lambda phase, done, total: None), again)


def prepare(
    run: Run, task: Task | None, settings: SamplingSettings, place: torch.device
) -> tuple[Evaluator, Snapshots, int]:
    """What evaluates a run's snapshots, the snapshots, and the step of the first that can be read.

    Where a task is given that differs from the recording, a RuntimeWarning says so.

    Args:
        run: opened.
        task: see `analyze`.
        settings: of the sampling.
        place: where to compute.

    Raises:
        RunError: no snapshot can be read, or other files are damaged.
        TaskError: there is no loss to evaluate, no data, or they do not fit the network.
    """
    evaluated = choose_task(run, task)
    snapshots = Snapshots(run)
    step, first = snapshots.first()
    evaluator = Evaluator(run, task, evaluated, settings, place, first)
    if task is not None:
        for reminder in reminders(run, task, evaluator.layout, first):
            warnings.warn(f"groktrace: {reminder}", RuntimeWarning, stacklevel=2)
    return evaluator, snapshots, step


class Analysis:
    """One run at one set of settings, and what is known of it so far.

    Args:
        evaluator: loss, data and settings.
        snapshots: of the run.
        workers: where the snapshots are evaluated.
        folder: where the results are kept.
        report: called with (phase, snapshots done, snapshots in all).
        again: opens the same analysis of the run as it is by then.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        snapshots: Snapshots,
        workers: Workers,
        folder: Path,
        report: Progress,
        again: Callable[[], contextlib.AbstractContextManager["Analysis"]],
    ) -> None:
        self.again = again
        self.evaluator, self.snapshots, self.folder = evaluator, snapshots, folder
        self.surveys = folder / survey_file(evaluator)
        self._workers, self._report = workers, report

    def complete(
        self,
        reference: float | str | None = None,
        curvature: bool = False,
        adaptive: bool = False,
        deadline: float = math.inf,
        partial: Callable[[Trajectory], None] | None = None,
    ) -> Trajectory:
        """All snapshots, and the trajectory of them; arguments as those of `analyze`, and until when to begin any."""
        steps = list(self.snapshots.prints)
        dear = self.evaluator.loss.sample_bytes is not None
        surveys = self.survey([steps[i] for i in spread(steps, COARSE)] if dear else None)
        scale = self.fix_scale(surveys)
        # Before the sampling, so that a network too large for its rank is refused early.
        beside = self.rank() if reference == "jacobian" else None
        if isinstance(reference, float | int):
            beside = Reference(float(reference), "value")
        if adaptive:
            points = self._sample_some(self.survey() if dear else surveys, scale)
        else:
            points = self._sample_all(scale, beside, deadline, partial)
        if curvature:
            found = self.sharpen(sorted(points))
            points = {step: replace(points[step], **each.to_dict()) for step, each in found.items()}
        return self.finish(points, scale, beside, 0 if adaptive else len(self.snapshots.prints) - len(points))

    def _sample_all(
        self,
        scale: Scale,
        beside: Reference | None,
        deadline: float,
        partial: Callable[[Trajectory], None] | None,
    ) -> dict[int, Point]:
        """λ̂ of all snapshots, or of those that there is time for, in passes."""
        known, total = set(self.snapshots.prints) & self.sampled().keys(), len(self.snapshots.prints)
        done, shown = len(known), time.monotonic()

        def measure(wanted: list[int]) -> dict[int, Point]:
            nonlocal done
            fresh = [step for step in wanted if step not in known]
            surveys = self.survey(wanted, deadline, quiet=True)
            wanted = [step for step in wanted if step in surveys]
            before = done

            def report(finished: int, _: int) -> None:
                nonlocal done
                done = max(done, before + finished - (len(wanted) - len(fresh)))
                self._report("sampling", min(done, total), total)

            return self.sample(surveys, scale, wanted, phase=None, deadline=deadline, report=report)

        steps = list(self.snapshots.prints)
        # Whole stacks for all threads, so many in any case: no machine decides what is stacked with what.
        dear = self.evaluator.loss.sample_bytes is not None
        together = max(ROUND, self.evaluator.stack(scale) if dear else STACKS * self.evaluator.together)
        points: dict[int, Point] = {}
        self._report("sampling", done, total)
        passes = sample_in_passes(
            steps, measure, self.evaluator.task.n, coarse=max(COARSE, together), together=together
        )
        for points in passes:
            if time.monotonic() > deadline:
                break
            if time.monotonic() - shown > PARTIAL_SECONDS and len(points) < total and partial is not None:
                partial(self.finish(points, scale, beside, len(self.snapshots.prints) - len(points)))
                shown = time.monotonic()
        return points

    def survey(
        self, among: Sequence[int] | None = None, deadline: float = math.inf, quiet: bool = False
    ) -> dict[int, Survey]:
        """Losses and curvature of snapshots, by step.

        Args:
            among: the steps wanted; None for all.
            deadline: until when to begin any.
            quiet: whether to report nothing.
        """
        return self.snapshots.replay(
            self.surveys,
            self.evaluator.rows,
            self._workers,
            lambda steps: Chunk("survey", steps),
            Survey.from_dict,
            lambda done, total: None if quiet else self._report("losses, curvature", done, total),
            among,
            deadline,
        )

    def fix_scale(self, surveys: dict[int, Survey]) -> Scale:
        """nβ and γ of this analysis: chosen once, then kept, so that later snapshots are measured with the same.

        Args:
            surveys: of all snapshots.
        """
        kept = kept_scale(self.folder)
        if kept is not None:
            return kept
        scale = self.choose_scale(surveys)
        path, asked = self.folder / SETTINGS_FILE, self.evaluator.settings.to_dict()
        write_json(path, {"asked": asked, "chosen": scale._asdict()})
        self.snapshots.run.publish(path)
        return scale

    def choose_scale(self, surveys: dict[int, Survey], before: Scale | None = None) -> Scale:
        """nβ and γ that these snapshots call for, and what few of them say of how to sample all.

        Args:
            surveys: by step.
            before: what was chosen before, whose locality, samples and batches are kept.
        """
        own = self.evaluator
        if before is not None:
            settings = replace(own.settings, locality=before.locality)
            scale = choose_scale(settings, own.task.n, own.layout, list(surveys.values()))
            return scale._replace(samples=before.samples, batch_size=before.batch_size)
        self._report("locality, samples, batches", 0, 1)
        chosen = choose_sampling(
            own.task,
            own.loss,
            self.snapshots.load,
            list(surveys.values()),
            own.settings,
            own.chance,
            lambda step: noise_key(own.identity, self.snapshots.prints[step]),
            self._workers.threads,
        )
        self._report("locality, samples, batches", 1, 1)
        return chosen

    def sample(
        self,
        surveys: dict[int, Survey],
        scale: Scale,
        among: Sequence[int] | None = None,
        journal: str = POINTS_FILE,
        phase: str | None = "sampling",
        deadline: float = math.inf,
        report: Callable[[int, int], None] | None = None,
    ) -> dict[int, Point]:
        """λ̂ by step.

        Args:
            surveys: of the same snapshots.
            scale: nβ and γ.
            among: the steps wanted; None for all.
            journal: the file that keeps the results.
            phase: what to call it in reports; None for no reports.
            deadline: until when to begin any.
            report: called with (snapshots done, snapshots in all), in place of reports.
        """
        points = self.snapshots.replay(
            self.folder / journal,
            self.evaluator.stack(scale),
            self._workers,
            lambda steps: Chunk("sample", steps, tuple(surveys[step] for step in steps), scale),
            Point.from_dict,
            report or (lambda done, total: self._report(phase, done, total) if phase is not None else None),
            among,
            deadline,
        )
        return self._with_metrics(points)

    def _with_metrics(self, points: dict[int, Point]) -> dict[int, Point]:
        """Points with what was logged for the snapshots that are there: a journal knows them by their weights alone."""
        found = ((step, point, self.snapshots.metrics(step)) for step, point in points.items())
        return {step: point if logged is None else with_logged(point, logged) for step, point, logged in found}

    def _sample_some(self, surveys: dict[int, Survey], scale: Scale) -> dict[int, Point]:
        def report(done: int, total: int) -> None:
            self._report("sampling", done, total)

        def measure(wanted: list[int]) -> dict[int, Point]:
            return self.sample(surveys, scale, wanted, phase=None)

        steps = [step for step in surveys if step in self.snapshots.prints]
        return sample_adaptively(steps, measure, report, self.evaluator.task.n)

    def sampled(self, journal: str = POINTS_FILE) -> dict[int, Point]:
        """What a journal holds of the snapshots, by step."""
        known = read_journal(self.folder / journal, Point.from_dict)
        found = {step: known[each] for step, each in self.snapshots.prints.items() if each in known}
        return self._with_metrics(found)

    def sharpen(self, among: Sequence[int]) -> dict[int, Sharpness]:
        """Trace and top eigenvalue of the Hessian, by step.

        Args:
            among: the steps wanted.
        """
        return self.snapshots.replay(
            self.folder / _SHARPNESS_FILE,
            self.evaluator.rows,
            self._workers,
            lambda steps: Chunk("sharpen", steps),
            Sharpness.from_dict,
            lambda done, total: self._report("Hessian", done, total),
            among,
        )

    def rank(self) -> Reference | None:
        """Half the rank of the Jacobian at the last snapshot; None where none loads."""
        last = self.snapshots.last()
        if last is None:
            return None
        step, weights = last
        journal, fingerprint = self.folder / _REFERENCE_FILE, self.snapshots.prints[step]
        known = read_journal(journal, Reference.from_dict)
        self._report("Jacobian rank", 0, 1)
        if fingerprint not in known:
            own = self.evaluator
            known[fingerprint] = jacobian_reference(own.task, own.layout, weights, step, own.device)
            append_lines(journal, [{"snapshot": fingerprint, **known[fingerprint].to_dict()}])
            self.snapshots.run.publish(journal)
        self._report("Jacobian rank", 1, 1)
        return known[fingerprint]

    def finish(
        self, points: dict[int, Point], scale: Scale, beside: Reference | None = None, unsampled: int = 0
    ) -> Trajectory:
        """The trajectory of these points, which becomes the last result of the run.

        Args:
            points: by step.
            scale: their nβ and γ.
            beside: the reference to keep with them.
            unsampled: snapshots that are still to be sampled.
        """
        settings, run = self.evaluator.settings, self.snapshots.run
        trajectory = Trajectory(
            tuple(points[step] for step in sorted(points)),
            n=self.evaluator.task.n,
            nbeta=scale.nbeta if scale.curvature is None else None,
            localization=scale.localization,
            resolution=resolution(settings, scale.curvature is not None)
            if settings.nbeta in (None, "curvature")
            else None,
            locality=scale.locality,
            method=settings.kernel.name,
            run=run.name,
            unreadable=tuple(self.snapshots.unreadable),
            reference=beside,
            weight_decay=run.weight_decay,
            unsampled=unsampled,
        )
        trajectory.save(self.folder / TRAJECTORY_FILE)
        run.publish(self.folder / TRAJECTORY_FILE)
        last = max(points, default=None)
        note_latest(run, self.folder, last, None if last is None else self.snapshots.prints.get(last))
        return trajectory


def kept_scale(folder: Path) -> Scale | None:
    """nβ and γ that an analysis chose before; None where none were.

    Args:
        folder: of its results.

    Raises:
        RunError: the file that keeps them is damaged.
    """
    path = folder / SETTINGS_FILE
    if not path.exists():
        return None
    kept = read_json(path)
    try:
        return Scale.from_dict(kept["chosen"])
    except (KeyError, TypeError, ValueError) as failure:
        raise RunError(f"{path}: damaged ({failure}); remove the folder {folder} and analyse again.") from failure


def survey_file(evaluator: Evaluator) -> str:
    """Where losses and curvatures lie: they depend on few of the settings.

    Args:
        evaluator: of the run, with its settings.
    """
    content = [layout.FORMAT_VERSION, _ESTIMATOR, evaluator.settings.seed, evaluator.identity.key]
    return f"survey-{hashlib.sha256(json.dumps(content).encode()).hexdigest()[:8]}.jsonl"


def _take_surveys(folder: Path, name: str) -> None:
    """Begin with what analyses at other settings measured, where nothing is there yet."""
    found = sorted(folder.parent.glob(f"*/{name}"), key=lambda path: (path.stat().st_size, path))
    if found and not (folder / name).exists():
        write_file(folder / name, found[-1].read_bytes())


def folder_name(evaluator: Evaluator) -> str:
    """Where the results lie: the method, and a digest of everything that they depend on but the snapshots.

    Args:
        evaluator: of the run, with its settings.
    """
    settings = evaluator.settings
    content = [layout.FORMAT_VERSION, _ESTIMATOR, settings.to_dict(), evaluator.identity.key]
    return f"{settings.kernel.name}-{hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]}"
