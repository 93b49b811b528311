"""What an analysis will take, from a few seconds of trying; nothing is written."""

import resource
import statistics
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from groktrace.analysis.estimate import choose_device, make_settings
from groktrace.analysis.evaluation import Survey
from groktrace.analysis.evaluator import Chunk, Evaluator
from groktrace.analysis.passes import spread
from groktrace.analysis.pilot import choose_sampling
from groktrace.analysis.replay import COARSE, POINTS_FILE, folder_name, kept_scale, prepare
from groktrace.analysis.snapshots import Snapshots, read_journal
from groktrace.analysis.trajectory import Point
from groktrace.analysis.workers import Here, available_threads, threads_here
from groktrace.run import layout
from groktrace.run.store import Run, open_run
from groktrace.run.task import Task
from groktrace.sampling.calibration import Scale
from groktrace.sampling.settings import SamplingOptions, SamplingSettings

if TYPE_CHECKING:
    from typing_extensions import Unpack

# Snapshots whose losses and curvature are measured, half as many as the analysis begins with; seconds that trying some
# of them may take, and how many are tried at least.
_SURVEYED = COARSE // 2
_SECONDS = 5.0
_LEAST_TRIED = 2


@dataclass(frozen=True)
class Forecast:
    """What is still to be done, and what it will take.

    Attributes:
        snapshots: to be measured.
        finished: measured before, with the same settings, and not to be measured again.
        weights: D, sampled weights.
        chains: of each snapshot.
        steps: of each chain, burn-in and draws and steps that are lost, on average over the snapshots tried.
        memory_bytes: peak of the process while it tried; on a GPU, of its memory.
        seconds: of the analysis, without the start of Python.
        tried: snapshots that the estimate rests on.
    """

    snapshots: int
    finished: int
    weights: int
    chains: int
    steps: int
    memory_bytes: int
    seconds: float
    tried: int

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def forecast(
    run: Run | str | Path,
    *,
    task: Task | None = None,
    device: str | torch.device | None = None,
    settings: SamplingSettings | None = None,
    **options: "Unpack[SamplingOptions]",
) -> Forecast:
    """What `analyze` would take with the same arguments.

    Args:
        run: a run directory, its path or its URL.
        task: loss and data, where the recording could not keep them.
        device: where to compute; a GPU where there is one.
        settings: of the sampling; None for the defaults.
        **options: fields of `groktrace.SamplingSettings`, in place of those of `settings`.

    Raises:
        SettingsError: a setting is outside what it may be.
        RunError: the run directory cannot be used, or none of its snapshots.
        TaskError: the recording holds no loss to evaluate and none was given.
    """
    place = choose_device(device)
    threads = 1 if task is not None else available_threads(place)
    start = time.perf_counter()
    evaluator, snapshots, _ = prepare(
        run if isinstance(run, Run) else open_run(run), task, make_settings(settings, options), place
    )
    prepared = time.perf_counter() - start
    folder = snapshots.run.root / layout.ANALYSIS_FOLDER / folder_name(evaluator)
    done = read_journal(folder / POINTS_FILE, Point.from_dict)
    steps = list(snapshots.prints)
    wanted = [step for step in steps if snapshots.prints[step] not in done]
    of_run = (len(wanted), len(steps) - len(wanted), evaluator.layout.size, evaluator.settings.chains or 0)
    if not wanted:
        return Forecast(*of_run, 0, _memory(place), 0.0, 0)
    with threads_here(evaluator, threads) as workers:
        trial = _Trial(evaluator, snapshots, workers)
        surveys, survey_seconds = trial.survey([steps[i] for i in spread(steps, _SURVEYED)])
        scale, chosen = kept_scale(folder), 0.0
        if scale is None:
            start = time.perf_counter()
            known = list(surveys.values())
            scale = choose_sampling(
                evaluator.task,
                evaluator.loss,
                snapshots.load,
                known,
                evaluator.settings,
                evaluator.chance,
                threads=threads,
            )
            chosen = time.perf_counter() - start
        points, seconds = trial.sample(surveys, scale)
    lengths = [sum(point.diagnostics.get(name) or 0 for name in ("lost_steps", "steps")) for point in points]
    each = seconds / max(len(points), 1) + survey_seconds / max(len(surveys), 1)
    return Forecast(
        *of_run,
        round(statistics.mean(lengths)) if lengths else 0,
        _memory(place),
        prepared + chosen + each * len(wanted),
        len(points),
    )


class _Trial:
    """Some snapshots, measured as the analysis will."""

    def __init__(self, evaluator: Evaluator, snapshots: Snapshots, workers: Here) -> None:
        self._evaluator, self._prints, self._workers = evaluator, snapshots.prints, workers
        self._by_step = {each.step: each for each in snapshots.run.snapshots}

    def survey(self, steps: list[int]) -> tuple[dict[int, Survey], float]:
        """Losses and curvature by step, and the seconds that these took."""
        start, rows = time.perf_counter(), self._evaluator.rows
        chunks = [Chunk("survey", tuple(steps[first : first + rows])) for first in range(0, len(steps), rows)]
        found = {each.step: each for each in self._evaluate(chunks) if isinstance(each, Survey)}
        return {step: found[step] for step in steps if step in found}, time.perf_counter() - start

    def sample(self, surveys: dict[int, Survey], scale: Scale) -> tuple[list[Point], float]:
        """Points of snapshots from all parts of the run, and the seconds that these took."""
        order, together = _from_all_parts(list(surveys)), self._evaluator.stack(scale)
        start = time.perf_counter()
        points: list[Point] = []
        while order and (len(points) < _LEAST_TRIED or time.perf_counter() - start < _SECONDS):
            chunks = []
            for _ in range(self._workers.threads):
                some, order = order[:together], order[together:]
                if some:
                    chunks.append(Chunk("sample", tuple(some), tuple(surveys[step] for step in some), scale))
            points += [each for each in self._evaluate(chunks) if isinstance(each, Point)]
        return points, time.perf_counter() - start

    def _evaluate(self, chunks: list[Chunk]) -> list[Any]:
        """What is found of all chunks, in their order."""
        chunks = [replace(each, fingerprints=tuple(self._prints[step] for step in each.steps)) for each in chunks]
        found = dict(self._workers.evaluate(chunks, self._by_step))
        return [each for number in sorted(found) for each in found[number]]


def _from_all_parts(steps: list[int]) -> list[int]:
    """The steps in an order whose beginning has some of the beginning, the middle and the end."""
    count, order = len(steps), []
    for parts in (2, 4, 8, 16, 32):
        order += [steps[min(count - 1, (2 * i + 1) * count // parts)] for i in range(parts // 2)]
    return list(dict.fromkeys(order + steps))


def _memory(device: torch.device) -> int:
    """The peak so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
