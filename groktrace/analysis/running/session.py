"""An open analysis of one run at one set of settings: it measures snapshots, and keeps each result as it comes."""

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from groktrace.analysis.measurement.hessian import HessianMetrics
from groktrace.analysis.measurement.measure import Objective, SnapshotMetrics
from groktrace.analysis.measurement.pilot import choose_sampling
from groktrace.analysis.measurement.reference import Reference, jacobian_reference
from groktrace.analysis.progress import ProgressCallback, silent
from groktrace.analysis.results import store
from groktrace.analysis.results.draws import Keep, KeptDraws
from groktrace.analysis.results.identity import data_digest, identify
from groktrace.analysis.results.journal import append_lines, exclusive, read_journal
from groktrace.analysis.results.task_differences import reminders
from groktrace.analysis.results.trajectory import OtherSamples, Point, with_logged
from groktrace.analysis.running.backends import (
    Backend,
    ExecutorBackend,
    available_threads,
    process_pool,
    thread_backend,
)
from groktrace.analysis.running.evaluator import Evaluator, EvaluatorSpec, Phase, WorkItem
from groktrace.analysis.running.setup import OtherData, choose_device, choose_task, run_layout
from groktrace.analysis.running.snapshots import Snapshots
from groktrace.errors import RunError, SettingsError, SnapshotError, TaskError
from groktrace.run.data import write_data
from groktrace.run.layout import DATA_FILE
from groktrace.run.store import Run, open_run
from groktrace.run.task import Task
from groktrace.sampling.calibration import Scale
from groktrace.sampling.settings import SamplingSettings

_RECORDS = {"metrics": SnapshotMetrics, "llc": Point, "hessian": HessianMetrics}


@contextlib.contextmanager
def open_session(
    run: Run | str | Path,
    settings: SamplingSettings,
    *,
    task: Task | None = None,
    task_name: str | None = None,
    device: str | torch.device | None = None,
    progress: ProgressCallback | None = None,
    jobs: int = 1,
    executor: Executor | None = None,
    threads: int | None = None,
    persist: bool = True,
    train: Any = None,
    n: int | None = None,
    draws: Keep | None = None,
) -> Iterator["Session"]:
    """An analysis whose folder no other process writes to meanwhile.

    Where a task is given that differs from the recording, a RuntimeWarning says so.

    Args:
        run: see `groktrace.analyze`, and so the arguments that are not described here.
        settings: of the sampling.
        task: the same.
        task_name: the same.
        device: the same.
        progress: the same.
        jobs: the same.
        executor: the same.
        threads: of this process that evaluate; None for one a core, or for one where a task is given.
        persist: whether results are read from the run directory and written there.
        train: see `groktrace.analyze`; with other processes only with `persist`, as they read it there.
        n: the same.
        draws: what is kept of them; see `keep` of `groktrace.analyze`.

    Raises:
        RunError: no snapshot can be read, or other files are damaged.
        TaskError: there is no loss to evaluate, no data, or they do not fit the network.
        SettingsError: a setting is outside what it may be.
    """
    if executor is not None and jobs != 1:
        raise SettingsError("executor: takes the place of jobs; give one of them.")
    place = choose_device(device)
    run = run if isinstance(run, Run) else open_run(run)
    # Refused before snapshots are read, which may have to be fetched.
    if train is None:
        if n is not None:
            raise SettingsError("n: says how many samples train= stands for; give both, or neither.")
        other = None
        choose_task(run, task)
    else:
        other = OtherData.of(run, task, train, n)
    snapshots = Snapshots(run)
    step, first = snapshots.first()
    # A task of another network is refused here, before anything is written.
    evaluator = Evaluator.of(run, task, settings, place, first, other)
    if task is not None:
        for reminder in reminders(run, task, run_layout(run, None), first, other is not None):
            warnings.warn(f"groktrace: {reminder}", RuntimeWarning, stacklevel=2)
    resolved = evaluator.objective.settings
    folder = store.results_folder(run, resolved, evaluator.identity)
    with contextlib.ExitStack() as held:
        if threads is None:
            threads = 1 if task is not None else available_threads(place)
        backend: Backend = held.enter_context(thread_backend(evaluator, threads))
        if executor is not None or jobs != 1:
            if task is not None and task_name is None:
                raise SettingsError("task: other processes need its name; give task_name='package.module:factory'.")
            where = str(run.root.absolute()) if run.remote is None else run.name
            name = None if task is None else task_name
            held_in = None if other is None else folder.name
            spec = EvaluatorSpec(where, name, resolved, str(place), step, evaluator.identity, held_in)
            pool = (executor, None) if executor is not None else held.enter_context(process_pool(jobs))
            backend = ExecutorBackend(spec, *pool)
        kept = KeptDraws.for_request(run, folder, draws, evaluator.objective)
        session = Session(evaluator, snapshots, backend, folder, progress or silent, persist, kept)
        if persist:
            folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(exclusive(folder))
            store.take_metrics(folder / store.metrics_file(resolved.seed, evaluator.identity))
        if other is not None:
            session.other, session.own_folder = other, _own_folder(run, task, evaluator, first)
            if persist:
                write_data(folder / DATA_FILE, other.train, other.n)
                run.publish(folder / DATA_FILE)
        yield session


def _own_folder(run: Run, task: Task | None, evaluator: Evaluator, first: dict[str, Tensor]) -> Path | None:
    """Where the analysis lies, or would, of the same settings on the run's own data; None where it has none."""
    try:
        own = choose_task(run, task)
    except TaskError:
        return None
    layout = evaluator.objective.layout
    own = replace(own, forward=layout.joined(own.forward))
    identity = identify(run, task, own, layout, layout.split(first))
    return store.results_folder(run, evaluator.objective.settings, identity)


@dataclass
class Session:
    """An open analysis.

    Attributes:
        evaluator: of the run, with its settings.
        snapshots: of the run.
        backend: where they are evaluated.
        folder: where the results are kept.
        report: called with (phase, snapshots done, snapshots in all).
        persist: whether they are.
        draws: what is kept of the draws behind final points; None for nothing.
        other: samples in place of the run's own; None for these.
        own_folder: where the results of the same settings on the run's own samples lie, or would, beside those.
        given_up: steps of the snapshots that were begun when the time was up, and are not finished.
    """

    evaluator: Evaluator
    snapshots: Snapshots
    backend: Backend
    folder: Path
    report: ProgressCallback = silent
    persist: bool = True
    draws: KeptDraws | None = None
    other: OtherData | None = None
    own_folder: Path | None = None
    given_up: list[int] = field(default_factory=list)

    @property
    def objective(self) -> Objective:
        """What the snapshots are measured by."""
        return self.evaluator.objective

    @property
    def steps(self) -> list[int]:
        """Of the snapshots that can be read, ascending."""
        return list(self.snapshots.fingerprints)

    @property
    def _metrics_file(self) -> str:
        return store.metrics_file(self.objective.settings.seed, self.evaluator.identity)

    def key(self, step: int) -> int:
        """What a snapshot's noise is keyed by beside the seed."""
        return self.evaluator.key(self.snapshots.fingerprints[step])

    def metrics(
        self, among: Sequence[int] | None = None, deadline: float = math.inf, quiet: bool = False
    ) -> dict[int, SnapshotMetrics]:
        """Losses and curvature of snapshots, by step.

        Args:
            among: the steps wanted; None for all.
            deadline: until when to begin any, of `time.monotonic`.
            quiet: whether to report nothing.
        """
        report = partial(silent if quiet else self.report, "losses, curvature")
        return self._measure("metrics", self._metrics_file, self.objective.metrics_stack, among, report, deadline)

    def points(
        self,
        metrics: dict[int, SnapshotMetrics],
        scale: Scale,
        among: Sequence[int] | None = None,
        *,
        journal: str = store.POINTS_FILE,
        deadline: float = math.inf,
        report: Callable[[int, int], None] | None = None,
    ) -> dict[int, Point]:
        """λ̂ by step.

        Args:
            metrics: of the same snapshots.
            scale: nβ and γ.
            among: the steps wanted; None for all.
            journal: the file that keeps the results.
            deadline: until when to begin any, of `time.monotonic`.
            report: called with (snapshots done, snapshots in all).
        """
        report, stack = report or partial(silent, ""), self.objective.llc_stack(scale)
        return self._with_logged(self._measure("llc", journal, stack, among, report, deadline, metrics, scale))

    def hessian(self, among: Sequence[int], deadline: float = math.inf) -> dict[int, HessianMetrics]:
        """Trace and top eigenvalue of the Hessian, by step.

        Args:
            among: the steps wanted.
            deadline: until when to begin any, of `time.monotonic`.
        """
        stack, report = self.objective.metrics_stack, partial(self.report, "Hessian")
        return self._measure("hessian", store.HESSIAN_FILE, stack, among, report, deadline)

    def _measure(
        self,
        phase: Phase,
        journal: str,
        stack: int,
        among: Sequence[int] | None,
        report: Callable[[int, int], None],
        deadline: float = math.inf,
        metrics: dict[int, SnapshotMetrics] | None = None,
        scale: Scale | None = None,
    ) -> dict[int, Any]:
        """A result for each snapshot, those in the journal as they are, the others computed and added to it.

        Stacks are cut out of `among` whatever is known already, so that a result does not depend on what was.
        """
        path, parse = self.folder / journal, _RECORDS[phase].from_dict
        known = kept = read_journal(path, parse) if self.persist else {}
        fingerprints, draws = self.snapshots.fingerprints, self.draws if journal == store.POINTS_FILE else None
        for step, fingerprint in fingerprints.items():
            if fingerprint in known and known[fingerprint].step != step:
                raise RunError(f"{path}: damaged (step {step} has another's result); remove the file to redo it.")
        ordered = list(fingerprints if among is None else among)
        stacks = [tuple(ordered[start : start + stack]) for start in range(0, len(ordered), stack)]
        if draws is not None:
            known = draws.behind(known, [fingerprints[step] for step in ordered])
        missing = [steps for steps in stacks if any(fingerprints[step] not in known for step in steps)]
        done = len(ordered) - sum(len(steps) for steps in missing)
        report(done, len(ordered))
        items = []
        for steps in missing:
            names = tuple(fingerprints[step] for step in steps)
            own = () if metrics is None else tuple(metrics[step] for step in steps)
            items.append(WorkItem(phase, steps, names, own, scale, draws and draws.what))
        for number, found in self.backend.evaluate(items, self.snapshots.by_step, deadline):
            if found is None:
                self.given_up += missing[number]
                continue
            lines = []
            for step, result in zip(missing[number], found, strict=True):
                if isinstance(result, SnapshotError):
                    self.snapshots.drop(step, result)
                elif fingerprints[step] not in known:
                    if draws is not None:
                        result = draws.take(*result, fingerprints[step])
                    plain = result.to_dict()
                    again = parse(plain)
                    if again != kept.get(fingerprints[step]):  # which it is where its draws alone were lacking
                        lines.append({"snapshot": fingerprints[step], **plain})
                    known[fingerprints[step]] = again
            if self.persist:
                append_lines(path, lines)
                self.snapshots.run.publish(path)
            done += len(missing[number])
            report(done, len(ordered))
        return {step: known[fingerprints[step]] for step in ordered if fingerprints.get(step) in known}

    def known_points(self, journal: str = store.POINTS_FILE) -> dict[int, Point]:
        """What a journal holds of the snapshots, by step.

        Args:
            journal: the file.
        """
        known, names = read_journal(self.folder / journal, Point.from_dict), self.snapshots.fingerprints
        return self._with_logged({step: known[name] for step, name in names.items() if name in known})

    def sampled(self) -> set[int]:
        """The snapshots at which nothing is left to be sampled."""
        points = {self.snapshots.fingerprints[step]: point for step, point in self.known_points().items()}
        points = points if self.draws is None else self.draws.behind(points, points)
        return {point.step for point in points.values()}

    def _with_logged(self, points: dict[int, Point]) -> dict[int, Point]:
        """Points with what was logged for the snapshots that are there: a journal knows them by their weights alone."""
        found = ((step, point, self.snapshots.metrics(step)) for step, point in points.items())
        return {step: point if logged is None else with_logged(point, logged) for step, point, logged in found}

    def kept_scale(self) -> Scale | None:
        """nβ and γ that this analysis chose before; None where none were."""
        return store.kept_scale(self.folder)

    def fix_scale(self, metrics: dict[int, SnapshotMetrics]) -> Scale:
        """nβ and γ of this analysis: chosen once, then kept, so that later snapshots are measured with the same.

        Args:
            metrics: of all snapshots.
        """
        if (scale := self.kept_scale()) is None:
            scale, requested = self.scale_of(metrics), self.objective.settings.to_dict()
            self.snapshots.run.publish(store.KeptSettings(requested, scale).save(self.folder))
        return scale

    def scale_of(self, metrics: dict[int, SnapshotMetrics]) -> Scale:
        """The same without keeping it; on other data that of the run's own analysis, if any, so that λ compares.

        Args:
            metrics: of all snapshots.
        """
        own, wbic = self.own_scale(), self.objective.settings.nbeta == "wbic"
        if own is not None and not (self.objective.large_set or wbic):
            return own._replace(samples=None, batch_size=None)
        chosen = self.choose_scale(metrics)
        if own is None:
            return chosen
        scale = own._replace(samples=chosen.samples, batch_size=chosen.batch_size)
        return scale._replace(nbeta=chosen.nbeta) if wbic else scale  # which is a function of n

    def own_scale(self) -> Scale | None:
        """nβ and γ of the run's own analysis, where this one is on other data and there is one; else None."""
        return None if self.own_folder is None else store.kept_scale(self.own_folder)

    def other_samples(self, scale: Scale) -> OtherSamples | None:
        """What is measured in place of the run's own training samples; None for these.

        Args:
            scale: of this analysis.
        """
        if self.other is None:
            return None
        own, settings = self.own_scale(), self.objective.settings
        same = None if own is None else own[:3] == scale[:3]
        if own is None and (settings.localization is None or not isinstance(settings.nbeta, float | int)):
            same = False
        return OtherSamples(self.other.name, data_digest(self.other.train), same)

    def choose_scale(self, metrics: dict[int, SnapshotMetrics]) -> Scale:
        """nβ and γ that these snapshots call for, and what few of them say of how to sample all.

        Args:
            metrics: by step.
        """
        known = list(metrics.values())
        self.report("locality, samples, batches", 0, 1)
        chosen = choose_sampling(self.objective, self.load, known, self.key, self.backend.threads)
        self.report("locality, samples, batches", 1, 1)
        return chosen

    def load(self, step: int) -> dict[str, Tensor] | None:
        """A snapshot's weights by name, as the objective takes them; None where the file is damaged."""
        weights = self.snapshots.load(step)
        return None if weights is None else self.objective.layout.split(weights)

    def rank(self) -> Reference | None:
        """Half the rank of the Jacobian at the last snapshot; None where none loads."""
        last = self.snapshots.last()
        if last is None:
            return None
        step, weights = last
        journal, fingerprint = self.folder / store.REFERENCE_FILE, self.snapshots.fingerprints[step]
        known = read_journal(journal, Reference.from_dict)
        self.report("Jacobian rank", 0, 1)
        if fingerprint not in known:
            objective, split = self.objective, self.objective.layout.split(weights)
            known[fingerprint] = jacobian_reference(
                objective.task, objective.layout, split, step, objective.loss.device
            )
            append_lines(journal, [{"snapshot": fingerprint, **known[fingerprint].to_dict()}])
            self.snapshots.run.publish(journal)
        self.report("Jacobian rank", 1, 1)
        return known[fingerprint]
