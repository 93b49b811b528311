"""A recording analysed while it goes on: points as they come, transitions as soon as they are significant."""

import hashlib
import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from groktrace.analysis.detection import Detector, Transition, find_transitions
from groktrace.analysis.estimate import make_settings
from groktrace.analysis.evaluation import Survey
from groktrace.analysis.evaluator import run_layout
from groktrace.analysis.journal import check_numbers
from groktrace.analysis.reference import check_reference
from groktrace.analysis.replay import (
    PARTIAL_SECONDS,
    POINTS_FILE,
    Analysis,
    kept_scale,
    open_analysis,
    show_by,
)
from groktrace.analysis.trajectory import Point, Trajectory
from groktrace.errors import RunError, SettingsError, printable
from groktrace.run import layout
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
# nβ or γ that the snapshots call for may differ by this factor from those in use, until all is measured anew.
RESCALE = 1.5


@dataclass(frozen=True)
class Scaled:
    """All points from here on are at this nβ and γ; those before are measured anew."""

    nbeta: float
    localization: float
    curvature: float | None


@dataclass(frozen=True)
class Announcement:
    """What there is to say of a transition.

    Attributes:
        news: "transition" once for each; "revised" where its date or label changed, or it came back; "withdrawn" where
            the curve no longer shows it.
        number: of the transition, from 1.
        transition: as it is seen now; as it was seen last, where it is withdrawn.
    """

    news: Literal["transition", "revised", "withdrawn"]
    number: int
    transition: Transition


@dataclass(frozen=True)
class Ended:
    """No more snapshots will be waited for, and the trajectory is final.

    Attributes:
        why: "closed" by the recording, or "timeout".
        trajectory: what `analyze` gives.
    """

    why: Literal["closed", "timeout"]
    trajectory: Trajectory


Event = Scaled | Point | Trajectory | Announcement | Ended


def wait_for_run(root: Path, timeout: float | None) -> None:
    """Return once a recording has kept its first snapshot.

    Args:
        root: the run directory, which need not be there yet.
        timeout: seconds to wait; None for as long as it takes.

    Raises:
        RunError: there was none in this time.
    """
    began = time.monotonic()
    while not ((root / layout.RUN_FILE).exists() and layout.snapshot_steps(root)):
        if timeout is not None and time.monotonic() - began > timeout:
            raise RunError(f"{root}: no recording has begun there in {timeout:g} s.")
        time.sleep(POLL_SECONDS)


def follow(
    run: Run | str | Path,
    *,
    timeout: float | None = None,
    task: Task | None = None,
    task_name: str | None = None,
    device: str | torch.device | None = None,
    reference: float | Literal["jacobian"] | None = None,
    curvature: bool = False,
    jobs: int = 1,
    executor: Executor | None = None,
    detector: Detector | None = None,
    reporters: Sequence["Reporter"] = (),
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
        task: see `analyze`, and so the arguments that are not described here.
        task_name: the same.
        device: where to compute; a GPU where there is one.
        reference: shown beside the final trajectory.
        curvature: whether to measure the Hessian at the end.
        jobs: processes on this machine.
        executor: instead of `jobs`.
        detector: of the transitions that are announced; see `find_transitions`.
        reporters: see `analyze`.
        settings: of the sampling; None for the defaults.
        **options: fields of `groktrace.SamplingSettings`, in place of those of `settings`.

    Yields:
        Changes of scale; points as they are measured; the trajectory so far after each round; announcements; the end.

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
            wait_for_run(Path(run), timeout)
        with open_analysis(run, chosen, task, task_name, device, None, jobs, executor) as analysis:
            shown = -math.inf
            for event in follow_analysis(analysis, timeout, reference, curvature, detector):
                trajectory = event.trajectory if isinstance(event, Ended) else event
                due = isinstance(event, Ended) or time.monotonic() - shown > PARTIAL_SECONDS
                if reporters and due and isinstance(trajectory, Trajectory):
                    show_by(analysis.snapshots.run, reporters, detector, trajectory)
                    shown = time.monotonic()
                yield event

    return events()


def follow_analysis(
    analysis: Analysis,
    timeout: float | None = None,
    reference: float | str | None = None,
    curvature: bool = False,
    detector: Detector | None = None,
) -> Iterator[Event]:
    """The same for an analysis that is open; arguments, events and errors as those of `follow`."""
    live = _Live(analysis.folder / LIVE_FILE)
    surveys: dict[int, Survey] = {}
    points: dict[int, Point] = {}
    fresh, news = list(analysis.snapshots.prints), time.monotonic()
    while True:
        run = analysis.snapshots.run.refreshed()
        if run.info.get("created") != analysis.snapshots.run.info.get("created"):  # one that is resumed keeps its own
            raise RunError(f"{run.name}: was recorded anew while it was followed; follow it again.")
        if run_layout(run, analysis.evaluator.settings.parameters) != analysis.evaluator.layout:
            # Weights have begun to train, so that all is measured anew, with these.
            with analysis.again() as renewed:
                yield from follow_analysis(renewed, timeout, reference, curvature, detector)
            return
        fresh += analysis.snapshots.add(run.snapshots)
        if fresh:
            surveys |= analysis.survey(fresh)
            scale = _scale(analysis, surveys, live.scale)
            if scale is not None:
                journal = _journal(analysis, scale)
                if scale != live.scale:
                    live.rescale(scale)
                    points = {}
                    yield Scaled(*scale[:3])
                if not points:  # those of before an interruption
                    points = analysis.sampled(journal)
                missing = [step for step in surveys if step not in points and step in analysis.snapshots.prints]
                stack = analysis.evaluator.together
                for start in range(0, len(missing), stack):
                    found = analysis.sample(surveys, scale, missing[start : start + stack], journal)
                    points |= found
                    yield from found.values()
                trajectory = analysis.finish(points, scale)
                yield from live.compare(find_transitions(trajectory, detector))
                yield trajectory
            fresh, news = [], time.monotonic()
        elif run.closed or (timeout is not None and time.monotonic() - news > timeout):
            break
        else:
            time.sleep(POLL_SECONDS)
    trajectory = analysis.complete(reference, curvature)
    yield from live.compare(find_transitions(trajectory, detector))
    for path in analysis.folder.glob("live-*.jsonl"):
        path.unlink()
    yield Ended("closed" if run.closed else "timeout", trajectory)


def _scale(analysis: Analysis, surveys: dict[int, Survey], current: Scale | None) -> Scale | None:
    """nβ and γ to measure with now; None where the snapshots do not tell yet."""
    kept = kept_scale(analysis.folder)
    if kept is not None:
        return kept
    if _given(analysis):
        return analysis.fix_scale(surveys)
    try:
        wanted = analysis.choose_scale(surveys, current)
    except SettingsError:  # nothing finite, or no curvature yet
        return current
    if current is None or (wanted.curvature is None) != (current.curvature is None):
        return wanted
    moved = any(max(a / b, b / a) > RESCALE for a, b in zip(wanted[:2], current[:2], strict=True))
    return wanted if moved else current


def _given(analysis: Analysis) -> bool:
    settings = analysis.evaluator.settings
    return settings.nbeta not in (None, "curvature") and settings.localization is not None


def _journal(analysis: Analysis, scale: Scale) -> str:
    """Where points at this scale are kept: with the final ones, if it is the final one."""
    if scale == kept_scale(analysis.folder):
        return POINTS_FILE
    return f"live-{hashlib.sha256(repr(scale).encode()).hexdigest()[:8]}.jsonl"


class _Live:
    """What was said so far, kept on disk so that nothing is said twice.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.scale: Scale | None = None
        self._said: list[tuple[Transition, bool]] = []  # and whether it still stands
        if path.exists():
            kept = read_json(path)
            try:
                self.scale = None if kept["scale"] is None else Scale.from_dict(kept["scale"])
                self._said = [(_transition(each["transition"]), bool(each["stands"])) for each in kept["said"]]
            except (KeyError, TypeError, ValueError, IndexError, AttributeError) as failure:
                raise RunError(f"{path}: damaged ({failure}); remove the file to follow anew.") from failure

    def rescale(self, scale: Scale) -> None:
        """Measure at another nβ and γ from now on."""
        self.scale = scale
        self._save()

    def compare(self, found: list[Transition]) -> list[Announcement]:
        """What is new about these transitions, which then counts as said."""
        news: list[Announcement] = []
        left = list(found)
        for number, (before, stood) in enumerate(self._said, 1):
            match = min(
                (each for each in left if each.kind == before.kind and _overlap(each, before)),
                key=lambda each: abs(each.step - before.step),
                default=None,
            )
            if match is not None:
                left.remove(match)
                moved = not before.step_low <= match.step <= before.step_high
                if moved or match.label != before.label or not stood:
                    news.append(Announcement("revised", number, match))
            elif stood:
                news.append(Announcement("withdrawn", number, before))
        first = len(self._said) + 1
        news += [Announcement("transition", number, each) for number, each in enumerate(left, first)]
        for each in news:
            entry = (each.transition, each.news != "withdrawn")
            self._said[each.number - 1 : each.number] = [entry]
        if news:
            self._save()
        return news

    def _save(self) -> None:
        said = [{"transition": asdict(each), "stands": stands} for each, stands in self._said]
        write_json(self._path, {"scale": None if self.scale is None else self.scale._asdict(), "said": said})


def _overlap(a: Transition, b: Transition) -> bool:
    return max(a.onset, b.onset) <= min(a.end, b.end)


def _transition(value: dict[str, Any]) -> Transition:
    """A transition that was announced, as it was written; TypeError or ValueError where it was not."""
    texts = ("kind", "label", "evidence", "curve")
    numbers = value.keys() - set(texts)
    check_numbers(value, numbers)
    if any(value[name] is None for name in numbers - {"delta_free_energy"}):
        raise ValueError("a number is missing")
    return Transition(**{**value, **{name: printable(value[name]) for name in texts if value.get(name) is not None}})
