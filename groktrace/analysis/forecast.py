"""What an analysis will take, from a few seconds of trying; nothing is written."""

import resource
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from groktrace.analysis.results.trajectory import Point
from groktrace.analysis.running.passes import spread
from groktrace.analysis.running.session import open_session
from groktrace.analysis.running.setup import choose_device, make_settings
from groktrace.analysis.tuning import PASSES
from groktrace.records import Record
from groktrace.run.store import Run
from groktrace.run.task import Task
from groktrace.sampling.settings import SamplingOptions, SamplingSettings

if TYPE_CHECKING:
    from typing_extensions import Unpack

# Snapshots whose losses and curvature are measured, half as many as the analysis begins with; seconds that trying some
# of them may take, and how many are tried at least.
_METRICS = PASSES.coarse // 2
_SECONDS = 8.0
_LEAST_TRIED = 2


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
    """

    snapshots: int
    finished: int
    weights: int
    chains: int
    steps: int
    memory_bytes: int
    seconds: float
    tried: int


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
    start = time.perf_counter()
    with open_session(run, chosen, task=task, device=place, persist=False, train=train, n=n) as session:
        prepared = time.perf_counter() - start
        done, steps = session.known_points(), session.steps
        wanted = [step for step in steps if step not in done]
        objective = session.objective
        of_run = (len(wanted), len(steps) - len(wanted), objective.layout.size, objective.settings.chains)
        if not wanted:
            return Forecast(*of_run, 0, _memory(place), 0.0, 0)
        start = time.perf_counter()
        metrics = session.metrics([steps[i] for i in spread(steps, _METRICS)])
        seconds = (time.perf_counter() - start) / max(len(metrics), 1)
        start = time.perf_counter()
        scale = session.kept_scale() or session.scale_of(metrics)
        prepared += time.perf_counter() - start
        order = [step for step in _from_all_parts(list(metrics)) if step in session.snapshots.fingerprints]
        at_once = objective.llc_stack(scale) * session.backend.threads
        points: dict[int, Point] = {}
        start, spent, rounds = time.perf_counter(), 0.0, 0
        # Another round may take as long as those before.
        while order and (len(points) < _LEAST_TRIED or spent * (rounds + 1) / rounds < _SECONDS):
            points |= session.points(metrics, scale, order[:at_once])
            order, rounds, spent = order[at_once:], rounds + 1, time.perf_counter() - start
        seconds += spent / max(len(points), 1)
    lengths = [sum(point.diagnostics.get(name) or 0 for name in ("lost_steps", "steps")) for point in points.values()]
    mean_length = round(statistics.mean(lengths)) if lengths else 0
    return Forecast(*of_run, mean_length, _memory(place), prepared + seconds * len(wanted), len(points))


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
