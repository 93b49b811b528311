"""What an analysis will take, from a few seconds of trying; nothing is written."""

import resource
import statistics
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from groktrace.analysis.measurement.measure import SnapshotMetrics
from groktrace.analysis.measurement.pilot import fitted_losses, run_threads
from groktrace.analysis.results.trajectory import Point
from groktrace.analysis.running.passes import spread
from groktrace.analysis.running.session import Session, open_session
from groktrace.analysis.running.setup import choose_device, make_settings
from groktrace.analysis.tuning import FORECAST, PASSES
from groktrace.records import Record
from groktrace.run.store import Run
from groktrace.run.task import Task
from groktrace.sampling.settings import SamplingOptions, SamplingSettings

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(frozen=True)
class Forecast(Record):
    """What is still to be done, and what it will take.

    Attributes:
        snapshots: to be measured.
        finished: measured before, with the same settings, and not to be measured again.
        weights: D, sampled weights.
        chains: of each snapshot.
        steps: of each chain, burn-in and draws and steps that are lost, on average over the snapshots tried.
        memory_bytes: peak of the process while it tried; on a GPU, of its memory.
        seconds: of the analysis, without the start of Python and without writing results, which the command adds.
        tried: snapshots that the estimate rests on.
        nbeta, localization: nβ, where it follows the curvature that of the median, and γ; None with nothing to be done.
        samples: of the data, how many are used; None for all that are stored.
        batch_size: samples a gradient; None for all that are used.
    """

    snapshots: int
    finished: int
    weights: int
    chains: int
    steps: int
    memory_bytes: int
    seconds: float
    tried: int
    nbeta: float | None = None
    localization: float | None = None
    samples: int | None = None
    batch_size: int | None = None


def forecast(
    run: Run | str | Path,
    *,
    train: Any = None,
    n: int | None = None,
    task: Task | None = None,
    device: str | torch.device | None = None,
    settings: SamplingSettings | None = None,
    **options: "Unpack[SamplingOptions]",
) -> Forecast:
    """What `analyze` would take with the same arguments.

    Args:
        run: a run directory, its path or its URL.
        train: see `analyze`.
        n: the same.
        task: loss and data, where the recording could not keep them.
        device: where to compute; a GPU where there is one.
        settings: of the sampling; None for the defaults.
        **options: fields of `groktrace.SamplingSettings`, in place of those of `settings`.

    Raises:
        SettingsError: a setting is outside what it may be.
        RunError: the run directory cannot be used, or none of its snapshots.
        TaskError: the recording holds no loss to evaluate and none was given.
    """
    place, chosen = choose_device(device), make_settings(settings, options)
    began = start = time.perf_counter()
    with open_session(run, chosen, task=task, device=place, persist=False, train=train, n=n) as session:
        prepared = time.perf_counter() - start
        done, steps = session.known_points(), session.steps
        wanted = [step for step in steps if step not in done]
        objective = session.objective
        of_run = (len(wanted), len(steps) - len(wanted), objective.layout.size, objective.settings.chains)
        if not wanted:
            return Forecast(*of_run, 0, _memory(place), 0.0, 0)
        coarse = [steps[i] for i in spread(steps, PASSES.coarse)]
        order, scale = _from_all_parts(coarse), session.kept_scale()
        looks = {}
        if scale is None:
            found = run_threads(partial(_look, session), [(step,) for step in coarse], session.backend.threads)
            looks = {look.step: look for look in found if look is not None}
        fitted = fitted_losses({step: look.train_loss for step, look in looks.items()})
        first = order[: max(FORECAST.least_tried, session.backend.threads)]
        start = time.perf_counter()
        metrics = session.metrics(sorted({*fitted, *first}))
        surveying, start = time.perf_counter() - start, time.perf_counter()
        # The curvature of the others has no part in the choice, and is what a look at a snapshot costs.
        scale = scale or session.scale_of(looks | metrics)
        prepared += time.perf_counter() - start
        at_once = objective.llc_stack(scale) * session.backend.threads
        points: dict[int, Point] = {}
        spent, busy, rounds = 0.0, 0.0, 0
        while order and (len(points) < FORECAST.least_tried or _time_is_left(began, spent, rounds)):
            some, order = order[:at_once], order[at_once:]
            start = time.perf_counter()
            metrics |= session.metrics([step for step in some if step not in metrics])
            ends = [time.perf_counter()]
            surveying += ends[0] - start
            points |= session.points(
                metrics,
                scale,
                [step for step in some if step in metrics],
                report=partial(_note_time, ends),
            )
            spent += ends[-1] - ends[0]
            # A thread is idle once its snapshots are done, which costs next to nothing where they are in no basin.
            busy += sum(end - ends[0] for end in ends[1:]) / session.backend.threads
            rounds += 1
        seconds = surveying / max(len(metrics), 1) + busy / max(len(points), 1)
    lengths = [sum(point.diagnostics.get(name) or 0 for name in ("lost_steps", "steps")) for point in points.values()]
    mean_length = round(statistics.mean(lengths)) if lengths else 0
    seconds = prepared + seconds * len(wanted)
    where = scale.nbeta, scale.localization, scale.samples, scale.batch_size
    return Forecast(*of_run, mean_length, _memory(place), seconds, len(points), *where)


def _look(session: Session, step: int) -> SnapshotMetrics | None:
    """The losses of a snapshot; None where its file is damaged."""
    weights = session.load(step)
    return None if weights is None else session.objective.fork().look(weights, step)


def _time_is_left(began: float, spent: float, rounds: int) -> bool:
    """Whether another round, which may take as long as those before, would be over in time."""
    taken = time.perf_counter() - began
    return spent * (rounds + 1) / rounds < FORECAST.seconds and taken + spent / rounds < FORECAST.seconds_in_all


def _note_time(ends: list[float], done: int, total: int) -> None:
    """Append the time at which a stack of snapshots was done."""
    if done:
        ends.append(time.perf_counter())


def _from_all_parts(steps: list[int]) -> list[int]:
    """The steps in an order whose beginning has as many of the earlier as of the later half."""
    count, order = len(steps), []
    for parts in (4, 8, 16, 32):
        order += [steps[min(count - 1, (2 * i + 1) * count // parts)] for i in range(parts // 2)]
    return list(dict.fromkeys(order + steps))


def _memory(device: torch.device) -> int:
    """The peak so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
