"""A recording analysed while it goes on: points as they come, transitions as soon as they are significant."""

import hashlib
import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch

from groktrace.analysis.detection import Detector, EarlyWarning, Transition, find_transitions, last_fall
from groktrace.analysis.measurement.reference import check_reference
from groktrace.analysis.replay import finish, replay, show_by
from groktrace.analysis.results.draws import Keep
from groktrace.analysis.results.store import POINTS_FILE, check_positive
from groktrace.analysis.results.trajectory import Point, Trajectory
from groktrace.analysis.running.live_scale import LiveScale
from groktrace.analysis.running.session import Session, open_session
from groktrace.analysis.running.setup import make_settings, run_layout
from groktrace.analysis.tuning import PASSES
from groktrace.errors import RunError, SettingsError
from groktrace.records import Record, read_record
from groktrace.run import layout
from groktrace.run.checkpoints import refuse_checkpoints
from groktrace.run.files import read_json, write_json
from groktrace.run.remote import is_url
from groktrace.run.store import Run
from groktrace.run.task import Task
from groktrace.sampling.calibration import Scale
from groktrace.sampling.settings import SamplingOptions, SamplingSettings

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from groktrace.reporting.base import Reporter

LIVE_FILE = "live.json"
POLL_SECONDS = 1.0


@dataclass(frozen=True)
class ScaleChanged:
    """All points from here on are at this nβ and γ; those before are measured anew."""

    nbeta: float
    localization: float
    curvature: float | None


@dataclass(frozen=True)
class Announcement(Record):
    """What there is to say of a transition.

    Attributes:
        kind: "transition" once for each; "revised" where its date or label changed, or it came back; "withdrawn" where
            the curve no longer shows it.
        number: of the transition, from 1.
        transition: as it is seen now; as it was seen last, where it is withdrawn.
    """

    kind: Literal["transition", "revised", "withdrawn"]
    number: int
    transition: Transition


@dataclass(frozen=True)
class RecordingEnded:
    """No more snapshots will be waited for, and the trajectory is final.

    Attributes:
        reason: "closed" by the recording, or "timeout".
        trajectory: what `analyze` gives.
    """

    reason: Literal["closed", "timeout"]
    trajectory: Trajectory


Event = ScaleChanged | Point | Trajectory | Announcement | EarlyWarning | RecordingEnded


def rest() -> None:
    """Wait a second."""
    time.sleep(POLL_SECONDS)


def wait_for_run(root: Path, timeout: float | None, idle: Callable[[], object] | None = None) -> None:
    """Return once a recording has kept its first snapshot.

    Args:
        root: the run directory, which need not be there yet.
        timeout: seconds to wait; None for as long as it takes.
        idle: see `follow`.

    Raises:
        RunError: there was none in this time, or there are checkpoints that are to be imported.
    """
    began = time.monotonic()
    while not ((root / layout.RUN_FILE).exists() and layout.snapshot_steps(root)):
        refuse_checkpoints(root, str(root))
        if timeout is not None and time.monotonic() - began > timeout:
            raise RunError(f"{root}: no recording has begun there in {timeout:g} s.")
        (idle or rest)()


def follow(
    run: Run | str | Path,
    *,
    timeout: float | None = None,
    train: Any = None,
    n: int | None = None,
    task: Task | None = None,
    task_name: str | None = None,
    device: str | torch.device | None = None,
    reference: float | Literal["jacobian"] | None = None,
    hessian: bool = False,
    jobs: int = 1,
    executor: Executor | None = None,
    keep: Keep | None = None,
    detector: Detector | None = None,
    reporters: Sequence["Reporter"] = (),
    idle: Callable[[], object] | None = None,
    settings: SamplingSettings | None = None,
    **options: "Unpack[SamplingOptions]",
) -> Iterator[Event]:
    """Analyse snapshots as they appear, until the recording is closed; then all of them, as `analyze` does.

    nβ and γ are those that the snapshots so far call for; where that changes by half, or where weights begin to train
    that did not, all is measured anew. The end settles it: unless nβ and γ are known beforehand, all is measured once
    more at those of the whole run.

    Args:
        run: a run directory, its path or its URL; at a path, the recording may still have to begin.
        timeout: seconds without a new snapshot until a recording counts as ended; None for no limit.
        train: see `analyze`, and so the arguments that are not described here.
        n: the same.
        task: the same.
        task_name: the same.
        device: where to compute; a GPU where there is one.
        reference: shown beside the final trajectory.
        hessian: whether to measure the Hessian at the end.
        jobs: processes on this machine.
        executor: instead of `jobs`.
        keep: what of the draws behind the final trajectory is kept; see `analyze`.
        detector: of the transitions that are announced; see `find_transitions`.
        reporters: see `analyze`.
        idle: called while there is nothing new, before it is looked for again; by default a second's sleep.
        settings: of the sampling; None for the defaults.
        **options: fields of `groktrace.SamplingSettings`, in place of those of `settings`.

    Yields:
        Changes of scale; points as they are measured; the trajectory so far after each round; early warnings and
        announcements, before that; the end.

    Raises:
        RunError: nothing is recorded within `timeout`, or another recording has taken the place of this one.
        GroktraceError: as `analyze`.
    """
    check_reference(reference)
    chosen = make_settings(settings, options)
    if timeout is not None and not timeout >= 0:
        raise SettingsError(f"timeout: expected seconds, none of them negative, got {timeout!r}.")

    def events() -> Iterator[Event]:
        if not isinstance(run, Run) and not is_url(run):
            wait_for_run(Path(run), timeout, idle)
        source: Run | str | Path | None = run
        while source is not None:
            with open_session(
                source,
                chosen,
                task=task,
                task_name=task_name,
                device=device,
                jobs=jobs,
                executor=executor,
                train=train,
                n=n,
                draws=keep,
            ) as session:
                following = _follow_session(session, timeout, reference, hessian, detector, idle or rest)
                source = yield from _reported(following, session.snapshots.run, reporters, detector)

    return events()


def _reported(
    events: Generator[Event, None, Run | str | Path | None],
    run: Run,
    reporters: Sequence["Reporter"],
    detector: Detector | None,
) -> Generator[Event, None, Run | str | Path | None]:
    """The same events, whose trajectories are shown by reporters now and then, and the last one in any case."""
    shown = -math.inf
    while True:
        try:
            event = next(events)
        except StopIteration as stopped:
            return stopped.value
        trajectory = event.trajectory if isinstance(event, RecordingEnded) else event
        due = isinstance(event, RecordingEnded) or time.monotonic() - shown > PASSES.partial_seconds
        if reporters and due and isinstance(trajectory, Trajectory):
            show_by(run, reporters, detector, trajectory)
            shown = time.monotonic()
        yield event


def _follow_session(
    session: Session,
    timeout: float | None,
    reference: float | str | None,
    hessian: bool,
    detector: Detector | None,
    idle: Callable[[], object],
) -> Generator[Event, None, Run | None]:
    """The same for an open analysis; returns the run where other weights have begun to train, else None at the end."""
    announced = _Announced(session.folder / LIVE_FILE)
    scales = LiveScale(session, announced.scaled_at, announced.scale)
    points: dict[int, Point] = {}
    fresh, last_news = session.steps, time.monotonic()
    while True:
        run = session.snapshots.run.refreshed()
        if run.info.get("created") != session.snapshots.run.info.get("created"):  # one that is resumed keeps its own
            raise RunError(f"{run.name}: was recorded anew while it was followed; follow it again.")
        if run_layout(run, session.objective.settings.parameters) != session.objective.layout:
            return run  # weights have begun to train, so that all is measured anew, with these
        fresh += session.snapshots.add(run.snapshots)
        if fresh:
            scales.add(session.metrics(fresh))
            metrics, scale = scales.metrics, scales.choose()
            if scale is not None:
                journal = _journal(session, scale)
                if scale != announced.scale:
                    announced.rescale(scale, scales.step)
                    points = {}
                    yield ScaleChanged(*scale[:3])
                if not points:  # those of before an interruption
                    points = session.known_points(journal)
                missing = [step for step in metrics if step not in points and step in session.snapshots.fingerprints]
                stack = session.objective.llc_stack()
                for start in range(0, len(missing), stack):
                    found = session.points(metrics, scale, missing[start : start + stack], journal=journal)
                    points |= found
                    yield from found.values()
                trajectory = finish(session, points, scale)
                yield from announced.warn(last_fall(trajectory))
                yield from announced.compare(find_transitions(trajectory, detector))
                yield trajectory
            fresh, last_news = [], time.monotonic()
        elif run.closed or (timeout is not None and time.monotonic() - last_news > timeout):
            break
        else:
            idle()
    trajectory = replay(session, reference, hessian, detector=detector)
    yield from announced.compare(find_transitions(trajectory, detector))
    for path in session.folder.glob("live-*.jsonl"):
        path.unlink()
    yield RecordingEnded("closed" if run.closed else "timeout", trajectory)
    return None


def _journal(session: Session, scale: Scale) -> str:
    """Where points at this scale are kept: with the final ones, if it is the final one."""
    if scale == session.kept_scale():
        return POINTS_FILE
    return f"live-{hashlib.sha256(repr(scale).encode()).hexdigest()[:8]}.jsonl"


@dataclass(frozen=True)
class _Entry:
    """A transition that was announced, and whether it still stands."""

    transition: Transition
    stands: bool


@dataclass(frozen=True)
class _State:
    """What live.json keeps.

    Attributes:
        scale: nβ and γ in use.
        said: all that was announced.
        warned: step of the last warning, of a fall that lasts.
        scaled_at: of the last snapshot that `scale` was chosen from.
    """

    scale: Annotated[Scale | None, check_positive]
    said: tuple[_Entry, ...]
    warned: int | None = None
    scaled_at: int | None = None


class _Announced:
    """What was announced so far, kept on disk so that nothing is announced twice.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._state = path, _State(None, ())
        if path.exists():
            value = read_json(path)
            try:
                self._state = read_record(_State, value)
            except ValueError as failure:
                raise RunError(f"{path}: damaged ({failure}); remove the file to follow anew.") from failure

    @property
    def scale(self) -> Scale | None:
        """nβ and γ in use."""
        return self._state.scale

    @property
    def scaled_at(self) -> int | None:
        """Step of the last snapshot that they were chosen from."""
        return self._state.scaled_at

    def rescale(self, scale: Scale, step: int | None) -> None:
        """Measure at another nβ and γ from now on."""
        self._save(replace(self._state, scale=scale, scaled_at=step))

    def warn(self, fall: EarlyWarning | None) -> list[EarlyWarning]:
        """The warning of a fall that is clear, once until λ falls no more.

        Args:
            fall: at the last snapshot.
        """
        if fall is None:
            return []
        if self._state.warned is None and fall.is_significant:
            self._save(replace(self._state, warned=fall.step))
            return [fall]
        if self._state.warned is not None and fall.rate <= 0:
            self._save(replace(self._state, warned=None))
        return []

    def compare(self, found: list[Transition]) -> list[Announcement]:
        """What is new about these transitions, which then counts as announced."""
        announcements: list[Announcement] = []
        unmatched, entries = list(found), list(self._state.said)
        for number, entry in enumerate(entries, 1):
            before = entry.transition
            match = min(
                (now for now in unmatched if now.kind == before.kind and _overlap(now, before)),
                key=lambda now: abs(now.step - before.step),
                default=None,
            )
            if match is not None:
                unmatched.remove(match)
                moved = not before.step_low <= match.step <= before.step_high
                if moved or match.label != before.label or not entry.stands:
                    announcements.append(Announcement("revised", number, match))
            elif entry.stands:
                announcements.append(Announcement("withdrawn", number, before))
        first = len(entries) + 1
        announcements += [Announcement("transition", number, new) for number, new in enumerate(unmatched, first)]
        for announcement in announcements:
            entry = _Entry(announcement.transition, announcement.kind != "withdrawn")
            entries[announcement.number - 1 : announcement.number] = [entry]
        if announcements:
            self._save(replace(self._state, said=tuple(entries)))
        return announcements

    def _save(self, state: _State) -> None:
        self._state = state
        scale = None if state.scale is None else state.scale._asdict()
        write_json(self._path, {**asdict(state), "scale": scale})


def _overlap(a: Transition, b: Transition) -> bool:
    return max(a.onset, b.onset) <= min(a.end, b.end)
