"""A run directory in, a trajectory out: the one place that says what is done after what."""

import contextlib
import math
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from groktrace.analysis.measurement.measure import SnapshotMetrics
from groktrace.analysis.measurement.reference import Reference, check_reference
from groktrace.analysis.progress import ProgressCallback, shown
from groktrace.analysis.results.draws import Keep
from groktrace.analysis.results.journal import exclusive
from groktrace.analysis.results.store import TRAJECTORY_FILE, files_place, note_latest
from groktrace.analysis.results.trajectory import Point, Trajectory
from groktrace.analysis.running.passes import sample_adaptively, sample_in_passes, spread
from groktrace.analysis.running.session import Session, open_session
from groktrace.analysis.running.setup import make_settings
from groktrace.analysis.tuning import PASSES
from groktrace.errors import RunError, SettingsError
from groktrace.run import layout
from groktrace.run.store import Run
from groktrace.run.task import Task
from groktrace.sampling.calibration import Scale, resolution
from groktrace.sampling.interruption import TimeUpError, give_up_at
from groktrace.sampling.settings import SamplingOptions, SamplingSettings

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from groktrace.analysis.detection import Detector
    from groktrace.reporting.base import Reporter


def analyze(
    run: Run | str | Path,
    *,
    train: Any = None,
    n: int | None = None,
    task: Task | None = None,
    task_name: str | None = None,
    device: str | torch.device | None = None,
    progress: ProgressCallback | bool | None = None,
    reference: float | Literal["jacobian"] | None = None,
    hessian: bool = False,
    adaptive: bool = False,
    jobs: int = 1,
    executor: Executor | None = None,
    time_limit: float | None = None,
    partial: Callable[[Trajectory], None] | None = None,
    keep: Keep | None = None,
    detector: "Detector | None" = None,
    reporters: Sequence["Reporter"] = (),
    settings: SamplingSettings | None = None,
    **options: "Unpack[SamplingOptions]",
) -> Trajectory:
    """Replay a run's snapshots through the sampler into a trajectory of λ̂.

    What is finished is kept in the run directory as it comes; a second call with the same settings goes on from there.

    Args:
        run: a run directory, its path or its URL.
        train: other data to measure the same snapshots on, in place of the run's training samples (the data-refined
            LLC): any of the kinds that `watch(train=...)` takes, or the path of a file that `save_data` wrote. Shapes
            and dtypes are those of the recorded samples, but for their number. Results are kept apart; nβ and γ are
            those of the run's own analysis with the same settings, where there is one.
        n: how many samples `train` stands for; by default as many as it has.
        task: loss and data, where the recording could not keep them, or in their place; without data of its own, it
            is measured on the run's. Its results are kept apart from those of other losses and data.
        task_name: "package.module:factory", by which other processes import that task.
        device: where to compute; a GPU where there is one.
        progress: called with (phase, snapshots done, snapshots in all); by default it is shown on standard error, as a
            bar on a terminal and in a notebook where it takes longer than two seconds, elsewhere in a line every 30.
            False shows nothing.
        reference: a value of λ to show beside the trajectory; "jacobian" for half the rank of the Jacobian of the
            outputs on the training samples, at the last snapshot.
        hessian: whether to measure trace and top eigenvalue of the training loss's Hessian at each snapshot.
        adaptive: whether to sample only a coarse subset of the snapshots, and those that date its transitions: a tenth
            of all at most, or 128. Losses and curvature are still measured at all, since they fix nβ and γ.
        jobs: processes on this machine, which share this one's threads. A script that asks for more than one needs
            `if __name__ == "__main__":`, as with all of Python's multiprocessing.
        executor: instead of `jobs`, takes the work in pieces of some snapshots; its processes must reach the run
            directory by the same path, or by its URL. Only this process writes there.
        time_limit: seconds after which no further snapshot is begun, and after twenty more those that were begun are
            given up; a later call goes on. None for no limit.
        partial: called with the trajectory so far, every 15 seconds or so.
        keep: what of the chains' draws is kept, for `Run.draws`: "draws" for their losses, "losses" also for the loss
            of each sample at each draw. λ is the same with it, and snapshots whose draws were not kept are sampled
            again.
        detector: of the transitions that reporters show, and whose dates decide which snapshots are sampled next; see
            `find_transitions`.
        reporters: show the trajectory so far, as often, and the final one; their files go into the run directory.
        settings: of the sampling; None for the defaults.
        **options: fields of `groktrace.SamplingSettings`, in place of those of `settings`.

    Returns:
        The trajectory; snapshots that cannot be read are named in its `unreadable`.

    Raises:
        SettingsError: a setting is outside what it may be.
        RunError: the run directory cannot be used, or none of its snapshots; or workers were lost; or the time was up
            before any snapshot was sampled.
        TaskError: the recording holds no loss to evaluate and none was given.

    Warns:
        RuntimeWarning: the data of the task that was given are others than those recorded, or its loss is; or snapshots
            were given up as the time was up.
    """
    check_reference(reference)
    chosen = make_settings(settings, options)
    if time_limit is not None and not time_limit > 0:
        raise SettingsError(f"time_limit: expected a positive number of seconds, got {time_limit!r}.")
    deadline = math.inf if time_limit is None else time.monotonic() + time_limit
    with (
        shown(progress) as report,
        open_session(
            run,
            chosen,
            task=task,
            task_name=task_name,
            device=device,
            progress=report,
            jobs=jobs,
            executor=executor,
            train=train,
            n=n,
            draws=keep,
        ) as session,
    ):
        source = session.snapshots.run

        def show_partial(trajectory: Trajectory) -> None:
            show_by(source, reporters, detector, trajectory)
            if partial is not None:
                partial(trajectory)

        so_far = show_partial if reporters else partial
        trajectory = replay(session, reference, hessian, adaptive, deadline, so_far, detector)
        if reporters:
            show_by(source, reporters, detector, trajectory)
        return trajectory


def show_by(run: Run, reporters: Sequence["Reporter"], detector: "Detector | None", trajectory: Trajectory) -> None:
    """Show a trajectory by reporters, whose files go into the run directory, or beside its results if on other data.

    Args:
        run: that was analysed.
        reporters: called one after another.
        detector: of the transitions; see `find_transitions`.
        trajectory: of the run.

    Raises:
        RunError: files cannot be sent to a remote run.
    """
    from groktrace.reporting.base import report  # built on this package: only where it is called

    place = files_place(run, trajectory)
    with exclusive(run.root / layout.ANALYSIS_FOLDER, wait=True), run.publishing():
        report(trajectory, reporters, place, detector)
    for path in () if place == run.root else sorted(place.glob("[!.]*")):
        if path.is_dir():
            run.publish_folder(path, layout.EVENTS_SUFFIX)
        else:
            run.publish(path)


def replay(
    session: Session,
    reference: float | str | None = None,
    hessian: bool = False,
    adaptive: bool = False,
    deadline: float = math.inf,
    partial: Callable[[Trajectory], None] | None = None,
    detector: "Detector | None" = None,
) -> Trajectory:
    """Measure all snapshots of an open analysis, or those that there is time for.

    Args:
        session: the analysis.
        reference: see `analyze`, and so the arguments that are not described here.
        hessian: the same.
        adaptive: the same.
        deadline: until when to begin any snapshot, of `time.monotonic`.
        partial: the same.
        detector: the same.
    """
    large_set = session.objective.large_set
    first = [session.steps[i] for i in spread(session.steps, PASSES.coarse)] if large_set else None
    metrics, scale = _begin(session, first, deadline + PASSES.grace_seconds)
    # Before the sampling, so that a network too large for its rank is refused early.
    beside = session.rank() if reference == "jacobian" else None
    if isinstance(reference, float | int):
        beside = Reference(float(reference), "value")
    if adaptive:
        metrics = session.metrics(deadline=deadline) if large_set else metrics
        wanted: list[int] = []

        def measure(some: list[int]) -> dict[int, Point]:
            wanted.extend(some)
            return session.points(metrics, scale, some, deadline=deadline)

        points = sample_adaptively(
            [step for step in metrics if step in session.snapshots.fingerprints],
            measure,
            lambda done, total: session.report("sampling", done, total),
            session.objective.task.n,
            detector,
            deadline,
        )
    else:
        wanted = session.steps
        points = _sample_all(session, scale, beside, deadline, partial, detector)
    unsampled = sum(step not in points and step in session.snapshots.fingerprints for step in wanted)
    if hessian:
        found = session.hessian(sorted(points), deadline)
        points |= {step: replace(points[step], **one.to_dict()) for step, one in found.items()}
    if session.given_up:
        some = ", ".join(map(str, sorted(set(session.given_up))[:5])) + (", ..." if len(session.given_up) > 5 else "")
        warnings.warn(
            f"groktrace: the time was up while the snapshots of steps {some} were measured. The next analysis begins "
            "them anew; where they take longer than all of its time, give it more (--time, time_limit).",
            RuntimeWarning,
            stacklevel=3,
        )
    return finish(session, points, scale, beside, unsampled)


def _begin(session: Session, first: list[int] | None, deadline: float) -> tuple[dict[int, SnapshotMetrics], Scale]:
    """Losses and curvature of the snapshots from which nβ and γ are chosen, and these.

    Raises:
        RunError: the time is up before that.
    """
    wanted = session.steps if first is None else first
    metrics = session.metrics(first, deadline)
    if all(step in metrics or step not in session.snapshots.fingerprints for step in wanted):
        with contextlib.suppress(TimeUpError), give_up_at(deadline):
            return metrics, session.fix_scale(metrics)
    raise RunError(
        f"{session.snapshots.run.name}: the time was up before any snapshot was sampled, with losses and curvature of "
        f"{len(metrics)} of {len(wanted)} snapshots measured, which are kept. Analyse again, for longer."
    )


def _sample_all(
    session: Session,
    scale: Scale,
    beside: Reference | None,
    deadline: float,
    partial: Callable[[Trajectory], None] | None,
    detector: "Detector | None",
) -> dict[int, Point]:
    """λ̂ of all snapshots, or of those that there is time for, in passes."""
    objective, steps = session.objective, session.steps
    known, total = session.sampled(), len(steps)
    done, shown = len(known), time.monotonic()

    def measure(wanted: list[int]) -> dict[int, Point]:
        nonlocal done
        metrics = session.metrics(wanted, deadline, quiet=True)
        wanted = [step for step in wanted if step in metrics]
        fresh = sum(step not in known for step in wanted)
        before = done

        def report(finished: int, _: int) -> None:
            nonlocal done
            done = max(done, before + finished - (len(wanted) - fresh))
            session.report("sampling", min(done, total), total)

        return session.points(metrics, scale, wanted, deadline=deadline, report=report)

    # Whole stacks for all threads, so many in any case: no machine decides what is stacked with what.
    together = max(
        PASSES.round, objective.llc_stack(scale) if objective.large_set else PASSES.stacks * objective.llc_stack()
    )
    points: dict[int, Point] = {}
    session.report("sampling", done, total)
    passes = sample_in_passes(
        steps, measure, objective.task.n, coarse=max(PASSES.coarse, together), together=together, detector=detector
    )
    for points in passes:
        if time.monotonic() > deadline:
            break
        if time.monotonic() - shown > PASSES.partial_seconds and len(points) < total and partial is not None:
            partial(finish(session, points, scale, beside, len(session.steps) - len(points)))
            shown = time.monotonic()
    return points


def finish(
    session: Session, points: dict[int, Point], scale: Scale, beside: Reference | None = None, unsampled: int = 0
) -> Trajectory:
    """The trajectory of these points, which becomes the last result of the run.

    Args:
        session: that measured them.
        points: by step.
        scale: their nβ and γ.
        beside: the reference to keep with them.
        unsampled: snapshots that are still to be sampled.
    """
    settings, run = session.objective.settings, session.snapshots.run
    follows = scale.curvature is not None
    trajectory = Trajectory(
        tuple(points[step] for step in sorted(points)),
        n=session.objective.task.n,
        nbeta=None if follows else scale.nbeta,
        localization=scale.localization,
        resolution=resolution(settings, follows) if settings.nbeta in (None, "curvature") else None,
        locality=scale.locality,
        method=settings.kernel.name,
        run=run.name,
        unreadable=tuple(session.snapshots.unreadable),
        reference=beside,
        weight_decay=run.weight_decay,
        unsampled=unsampled,
        data=session.other_samples(scale),
    )
    trajectory.save(session.folder / TRAJECTORY_FILE)
    run.publish(session.folder / TRAJECTORY_FILE)
    last = max(points, default=None)
    note_latest(run, session.folder, last, None if last is None else session.snapshots.fingerprints.get(last))
    return trajectory
