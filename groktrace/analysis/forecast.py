"""What an analysis will take, from a few seconds of trying; nothing is written."""

import math
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from groktrace.analysis.estimate import choose_device, choose_scale, estimate_stack, make_settings, weight_layout
from groktrace.analysis.evaluation import Survey, measure_point, stack_weights, survey, training_loss
from groktrace.analysis.journal import read_lines
from groktrace.analysis.replay import POINTS_FILE, SETTINGS_FILE, folder_name
from groktrace.errors import RunError, SettingsError, SnapshotError
from groktrace.run import layout
from groktrace.run.files import read_json
from groktrace.run.store import Run, Snapshot, open_run
from groktrace.run.task import Task
from groktrace.sampling.calibration import (
    BURN_IN_RELAXATIONS,
    COLD_BURN_IN_RELAXATIONS,
    CURVATURE_SAFETY,
    run_length,
    settle_chains,
    step_size,
)
from groktrace.sampling.chains import rows_per_stack, sample
from groktrace.sampling.network import Network
from groktrace.sampling.posterior import StackedLoss
from groktrace.sampling.settings import SamplingSettings

# Snapshots that are measured as the analysis will measure them, and seconds that this may take.
_TRIED = 6
_SECONDS = 3.0
# Gradients of a snapshot before it is sampled, stacked (Lanczos) and alone (differences on both sides).
_SURVEY_GRADIENTS, _SURVEY_GRADIENTS_LARGE = 9, 16


@dataclass(frozen=True)
class Forecast:
    """What is still to be done, and what it will take.

    Attributes:
        snapshots: to be measured.
        finished: measured before, with the same settings.
        weights: D, sampled weights.
        chains: of each snapshot.
        steps: of each chain, burn-in and draws, on average over the snapshots.
        chain_steps: of all chains of all snapshots.
        memory_bytes: peak of the process, with everything that is loaded at the start; on a GPU, of its memory.
        seconds: of the analysis, without the start of Python.
        tried: snapshots that the estimate rests on; 0 where one alone would take too long, and the steps are those of
            a snapshot of typical curvature, without any growth.
    """

    snapshots: int
    finished: int
    weights: int
    chains: int
    steps: int
    chain_steps: int
    memory_bytes: int
    seconds: float
    tried: int

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class _Lengths:
    """Steps of one snapshot's chains: burn-in, first draws, all draws, and those of attempts at a larger step."""

    burn_in: int
    first: int
    draws: int
    lost: int = 0

    @property
    def total(self) -> int:
        return self.burn_in + self.draws + self.lost


def forecast(
    run: Run | str | Path,
    *,
    task: Task | None = None,
    task_name: str | None = None,
    device: str | torch.device | None = None,
    **settings: Any,
) -> Forecast:
    """What `analyze` would take with the same arguments.

    Args:
        run: a run directory, its path or its URL.
        task: loss and data, where the recording could not keep them.
        task_name: what that task is called in the results' settings.
        device: where to compute; a GPU where there is one.
        **settings: see `groktrace.SamplingSettings`.

    Raises:
        SettingsError: a setting is outside what it may be.
        RunError: the run directory cannot be used, or none of its snapshots.
        TaskError: the recording holds no loss to evaluate and none was given.
    """
    chosen = make_settings(settings)
    place = choose_device(device)
    start = time.perf_counter()
    run = run if isinstance(run, Run) else open_run(run)
    evaluated = run.task if task is None else task
    specs = {name: (spec.shape, spec.dtype, spec.trainable) for name, spec in run.specs.items()}
    sampled = weight_layout(specs, chosen.parameters)
    chosen = settle_chains(chosen, sampled.size)
    folder = run.root / layout.ANALYSIS_FOLDER / folder_name(run, chosen, task_name)
    done = {record.get("snapshot") for record in read_lines(folder / POINTS_FILE)}
    readable, wanted = [], []
    for snapshot in run.snapshots:
        try:
            fingerprint = snapshot.fingerprint()
        except SnapshotError:
            continue
        readable.append(snapshot)
        if fingerprint not in done:
            wanted.append(snapshot)
    if not wanted:
        if not readable:
            raise RunError(f"{run.name}: none of its snapshots can be read.")
        return Forecast(0, len(readable), sampled.size, chosen.chains, 0, 0, _peak_bytes(place), 0.0, 0)
    tried, weights = _load_some(run, wanted)
    loss = training_loss(evaluated, sampled, weights[0], place)
    opened = time.perf_counter() - start
    load = _seconds(lambda: tried[0].load())
    if loss.micro_batch is None:
        found = _stacked(evaluated, loss, tried, weights, chosen, _kept_scale(folder), wanted)
    else:
        found = _large(evaluated, loss, weights[0], chosen, _kept_scale(folder), len(wanted))
    seconds, lengths, memory, count = found
    # Each file is read to survey it, to sample it, and for what the script logged.
    seconds += opened + 3 * load * len(wanted)
    steps = sum(each.total for each in lengths)
    return Forecast(
        len(wanted),
        len(readable) - len(wanted),
        sampled.size,
        chosen.chains,
        round(steps / len(wanted)),
        steps * chosen.chains,
        memory,
        seconds,
        count,
    )


def _load_some(run: Run, wanted: Sequence[Snapshot]) -> tuple[list[Snapshot], list[dict[str, Tensor]]]:
    """Snapshots spread evenly over the run, the last among them, and their weights; of large ones only one."""
    numbers = sum(math.prod(spec.shape) for spec in run.specs.values())
    count = min(_TRIED, len(wanted), max(1, 2**24 // max(numbers, 1)))
    places = sorted({round((i + 1) * len(wanted) / count) - 1 for i in range(count)})
    tried, weights = [], []
    for snapshot in (wanted[i] for i in places):
        try:
            weights.append(snapshot.load())
        except SnapshotError:
            continue
        tried.append(snapshot)
    if not tried:
        raise RunError(f"{run.name}: none of the snapshots tried can be read; groktrace check tells more.")
    return tried, weights


def _stacked(
    task: Task,
    loss: StackedLoss,
    tried: Sequence[Snapshot],
    weights: Sequence[dict[str, Tensor]],
    settings: SamplingSettings,
    scale: tuple[float, float] | None,
    wanted: Sequence[Snapshot],
) -> tuple[float, list[_Lengths], int, int]:
    """Seconds, lengths of all snapshots, peak of memory, snapshots tried."""
    total, chains = len(wanted), settings.chains
    together = min(total, max(1, rows_per_stack(loss, settings.batch_size) // chains))
    one = weights[0]
    measure = _seconds(lambda: measure_point(task, one, loss.device))
    step, before = _seconds_a_step(loss, one, together, settings)
    seconds = total * measure
    # A survey's stack holds one row a snapshot.
    gradient = step / (together * chains)
    seconds += total * _SURVEY_GRADIENTS * gradient
    keep = max(1, min(len(tried), int(_SECONDS / max(measure + _SURVEY_GRADIENTS * gradient, 1e-9))))
    tried, weights = tried[-keep:], weights[-keep:]
    surveys = survey(task, loss, weights, [each.step for each in tried], settings.seed)
    nbeta, localization = scale or choose_scale(settings, task.n, loss.layout, surveys)
    expected = [_first_lengths(settings, nbeta, localization, each) for each in surveys]
    affordable, spent = [], 0.0
    # From both ends inwards: what is left out lies between others.
    for s in sorted(range(len(tried)), key=lambda s: min(s, len(tried) - 1 - s)):
        spent += expected[s].total * chains * gradient * max(1.0, together / len(tried)) ** 0.5
        if spent < _SECONDS:
            affordable.append(s)
    known = dict(zip((each.step for each in tried), expected, strict=True))
    if affordable:
        chosen = sorted(affordable)
        few, about = [weights[s] for s in chosen], [surveys[s] for s in chosen]
        estimates = estimate_stack(loss, few, about, settings, nbeta, localization, task.n)
        for s, estimate in zip(chosen, estimates, strict=True):
            if estimate.step_size is not None:
                known[tried[s].step] = _observed(
                    expected[s], estimate.burn_in, estimate.draws, estimate.step_size, settings, localization
                )
    steps = sorted(known)
    lengths = [known[min(steps, key=lambda other: abs(other - snapshot.step))] for snapshot in wanted]
    for first in range(0, total, together):
        group = lengths[first : first + together]
        # A stack goes on until its longest chain is done; those that need more draws then go on alone.
        rounds = len(group) * max(each.burn_in + each.first + each.lost for each in group)
        rounds += sum(each.draws - each.first for each in group)
        seconds += rounds * chains * gradient + before * len(group) / together
    return seconds, lengths, _peak_bytes(loss.device), len(affordable)


def _seconds_a_step(
    loss: StackedLoss, weights: dict[str, Tensor], together: int, settings: SamplingSettings
) -> tuple[float, float]:
    """Time of one step of a whole stack, and of what comes before the first."""
    stacked, anchors = stack_weights(loss, [weights] * together)

    def run(steps: int) -> float:
        short = replace(settings, burn_in=0, draws=steps, step_size=1e-12, nbeta=None, localization=None)
        start = time.perf_counter()
        sample(stacked, anchors, range(together), short, 1.0, 1.0, [1e-12] * together, lambda traces: True)
        return time.perf_counter() - start

    run(2)  # records the plan
    few = run(2)
    count = max(4, min(100, int(0.15 * _SECONDS / max(few, 1e-9)) * 4))
    many = run(2 + count)
    step = max((many - few) / count, 0.0)
    return step, max(few - 2 * step, 0.0)


def _first_lengths(
    settings: SamplingSettings, nbeta: float, localization: float, about: Survey, cold: bool = False
) -> _Lengths:
    """What one snapshot asks for before anything is known of its draws."""
    if not (math.isfinite(about.train_loss) and math.isfinite(about.top_curvature)):
        return _Lengths(0, 0, 0)
    epsilon = settings.step_size or step_size(nbeta, localization, about.top_curvature)
    relaxations = COLD_BURN_IN_RELAXATIONS if cold else BURN_IN_RELAXATIONS
    burn_in, draws = run_length(settings, localization, epsilon, relaxations)
    return _Lengths(burn_in, draws, draws)


def _observed(
    expected: _Lengths, burn_in: int, draws: int, epsilon: float, settings: SamplingSettings, localization: float
) -> _Lengths:
    """What a snapshot took; where its step was reduced on the way, what the first attempt took is lost."""
    first = run_length(settings, localization, epsilon)[1]
    lost = 0 if burn_in == expected.burn_in and first == expected.first else expected.total
    return _Lengths(burn_in, min(first, draws), draws, lost)


def _large(
    task: Task,
    loss: StackedLoss,
    weights: dict[str, Tensor],
    settings: SamplingSettings,
    scale: tuple[float, float] | None,
    total: int,
) -> tuple[float, list[_Lengths], int, int]:
    """The same of networks that go alone, from one micro-batch of one of them."""
    network = Network(loss, weights)
    gradient, position = torch.zeros(network.layout.size, dtype=network.dtype), network.vector()
    gradient = gradient.to(network.device)
    few = torch.arange(min(loss.micro_batch, network.samples), device=network.device)
    part = _seconds(lambda: network.add_gradient(gradient, position, few)) / len(few)

    def move() -> None:
        generator = torch.Generator(network.device).manual_seed(0)
        for place, anchor in network.pieces():
            displacement = position[place] - anchor
            for _ in range(settings.chains):
                torch.dot(displacement, gradient[place])
            for _ in range(2):
                position[place].add_(anchor.normal_(generator=generator), alpha=0.0)

    corrected = settings.batch_size is not None and settings.method != "sgld"
    samples = min(settings.batch_size or network.samples, network.samples)
    step = (2 if corrected else 1) * samples * part + _seconds(move)
    nbeta, localization = scale or _typical_scale(settings, network)
    if settings.step_size is None and nbeta is None:
        # ε of a snapshot whose curvature is that from which nβ was derived.
        epsilon = 2 / ((CURVATURE_SAFETY * settings.resolution + 1) * localization)
    elif settings.step_size is None and None in (settings.burn_in, settings.draws):
        raise SettingsError(
            "dry-run: the steps of a network as large as this follow from its curvature, which takes longer to measure "
            "than a forecast should; give step_size, or draws and burn_in, or leave nbeta to be derived."
        )
    else:
        epsilon = settings.step_size or 1.0
    burn_in, draws = run_length(settings, localization, epsilon, COLD_BURN_IN_RELAXATIONS)
    lengths = [_Lengths(burn_in, draws, draws)] * total
    # The survey's losses are a third of a gradient; so is the loss at w*, or, with minibatches, a gradient.
    survey_gradients = _SURVEY_GRADIENTS_LARGE + 1 / 3 + (1 if corrected else 1 / 3)
    seconds = total * (survey_gradients * network.samples * part + settings.chains * (burn_in + draws) * step)
    vector = position.nbytes
    memory = _peak_bytes(network.device) + (settings.chains - 1 + corrected) * vector
    return seconds, lengths, memory, 0


def _typical_scale(settings: SamplingSettings, network: Network) -> tuple[float | None, float]:
    """nβ where it is given, and γ."""
    localization = settings.localization
    if localization is None:
        norm_squared = sum(float(anchor.square().sum(dtype=torch.float64)) for _, anchor in network.pieces())
        localization = network.layout.size / (settings.locality**2 * norm_squared)
    return (None if settings.nbeta is None else 1.0), localization


def _kept_scale(folder: Path) -> tuple[float, float] | None:
    """nβ and γ where this analysis was begun before."""
    path = folder / SETTINGS_FILE
    if not path.exists():
        return None
    kept = read_json(path)["chosen"]
    return float(kept["nbeta"]), float(kept["localization"])


def _seconds(action: Any) -> float:
    """Time of an action, the second time."""
    action()
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
