"""What an analysis will take, from a few seconds of trying; nothing is written."""

import math
import resource
import sys
import time
from collections.abc import Iterator, Sequence
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
# Weights of snapshots that are held at once.
_MAX_NUMBERS = 2**24
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
    first, weights = _first(run, wanted)
    loss = training_loss(evaluated, sampled, weights, place)
    opened = time.perf_counter() - start
    load = _seconds(first.load)
    if loss.micro_batch is None:
        found = _stacked(evaluated, loss, weights, load, chosen, _kept_scale(folder), wanted)
    else:
        found = _large(evaluated, loss, weights, chosen, _kept_scale(folder), len(wanted))
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


def _first(run: Run, wanted: Sequence[Snapshot]) -> tuple[Snapshot, dict[str, Tensor]]:
    """The last snapshot that can be read, and its weights."""
    for snapshot in reversed(wanted):
        try:
            return snapshot, snapshot.load()
        except SnapshotError:
            continue
    raise RunError(f"{run.name}: none of its snapshots can be read; groktrace check tells more.")


def _spread(items: Sequence[Any], count: int) -> list[Any]:
    """So many of them or all, spread evenly, the last among them."""
    count = max(1, min(count, len(items)))
    return [items[round((i + 1) * len(items) / count) - 1] for i in range(count)]


def _stacked(
    task: Task,
    loss: StackedLoss,
    weights: dict[str, Tensor],
    load: float,
    settings: SamplingSettings,
    scale: tuple[float, float] | None,
    wanted: Sequence[Snapshot],
) -> tuple[float, list[_Lengths], int, int]:
    """Seconds, lengths of all snapshots, peak of memory, snapshots tried."""
    total, rows = len(wanted), rows_per_stack(loss)
    together = min(total, max(1, rows_per_stack(loss, settings.batch_size) // settings.chains))
    measure = _seconds(lambda: measure_point(task, weights, loss.device))
    steps = {count: _seconds_a_step(loss, weights, count, settings) for count in {1, together}}
    # A step of a stack takes some time whatever it holds, and some for each snapshot.
    each = (steps[together][0] - steps[1][0]) / max(together - 1, 1)
    each = max(each, 0.0) if together > 1 else steps[1][0]
    always = max(steps[1][0] - each, 0.0)
    stack = _SURVEY_GRADIENTS * (always / min(total, rows) + each / settings.chains) + measure
    seconds = total * stack

    numbers = sum(tensor.numel() for tensor in weights.values())
    affordable = min(int(0.5 * _SECONDS / max(load + stack, 1e-9)), _MAX_NUMBERS // max(numbers, 1))
    surveyed = []
    for snapshot in _spread(wanted, affordable):
        try:
            surveyed.append((snapshot, snapshot.load()))
        except SnapshotError:
            continue
    surveys: list[Survey] = []
    for start in range(0, len(surveyed), rows):
        group = surveyed[start : start + rows]
        surveys += survey(task, loss, [w for _, w in group], [snapshot.step for snapshot, _ in group], settings.seed)
    nbeta, localization = scale or choose_scale(settings, task.n, loss.layout, surveys)
    expected = {about.step: _first_lengths(settings, nbeta, localization, about) for about in surveys}

    chosen, spent = [], 0.0
    for about, (_, loaded) in _spread(list(zip(surveys, surveyed, strict=True)), _TRIED):
        spent += expected[about.step].total * (always + each)
        if spent < 0.5 * _SECONDS:
            chosen.append((about, loaded))
    seen: dict[int, _Lengths] = {}
    if chosen:
        few, known = [loaded for _, loaded in chosen], [about for about, _ in chosen]
        estimates = estimate_stack(loss, few, known, settings, nbeta, localization, task.n)
        for about, found in zip(known, estimates, strict=True):
            if found.step_size is not None:
                first = run_length(settings, localization, found.step_size)[1]
                lost = found.step_size < 0.999 * _step_size(settings, nbeta, localization, about)
                seen[about.step] = _Lengths(
                    found.burn_in, min(first, found.draws), found.draws, expected[about.step].total if lost else 0
                )
    lengths = []
    for snapshot in wanted:
        near = min(expected, key=lambda step: abs(step - snapshot.step))
        alike = min(seen, key=lambda step: abs(step - snapshot.step), default=None)
        lengths.append(expected[near] if alike is None else _like(expected[near], expected[alike], seen[alike]))
    for start in range(0, total, together):
        group = lengths[start : start + together]
        seconds += steps[together][1] * len(group) / together
        for active, count in _rounds(group):
            seconds += (always + each * active) * count
    return seconds, lengths, _peak_bytes(loss.device), len(chosen)


def _like(expected: _Lengths, other: _Lengths, seen: _Lengths) -> _Lengths:
    """What a snapshot will take if it differs from what it asks for as another one did."""
    burn_in = round(expected.burn_in * seen.burn_in / max(other.burn_in, 1))
    first = round(expected.first * seen.first / max(other.first, 1))
    return _Lengths(burn_in, first, round(first * seen.draws / max(seen.first, 1)), expected.total if seen.lost else 0)


def _rounds(group: Sequence[_Lengths]) -> Iterator[tuple[int, int]]:
    """Snapshots and steps of each round of a stack: it goes on until its longest is done, then those that need more."""
    if lost := [each.lost for each in group if each.lost]:
        yield len(lost), max(lost)
    yield len(group), max(each.burn_in + each.first for each in group)
    going, count = group, 1
    while going := [each for each in going if each.draws >= 2 * count * each.first > 0]:
        yield len(going), max(count * each.first for each in going)
        count *= 2


def _seconds_a_step(
    loss: StackedLoss, weights: dict[str, Tensor], together: int, settings: SamplingSettings
) -> tuple[float, float]:
    """Time of one step of a stack of so many snapshots, and of what comes before the first."""
    stacked, anchors = stack_weights(loss, [weights] * together)

    def run(steps: int) -> float:
        short = replace(settings, burn_in=0, draws=steps, step_size=1e-12, nbeta=None, localization=None)
        start = time.perf_counter()
        sample(stacked, anchors, range(together), short, 1.0, 1.0, [1e-12] * together, lambda traces: True)
        return time.perf_counter() - start

    run(2)  # records the plan
    few = run(2)
    count = max(4, min(80, int(0.1 * _SECONDS / max(few, 1e-9)) * 4))
    many = run(2 + count)
    step = max((many - few) / count, 0.0)
    return step, max(few - 2 * step, 0.0)


def _step_size(settings: SamplingSettings, nbeta: float, localization: float, about: Survey) -> float:
    return settings.step_size or step_size(nbeta, localization, about.top_curvature)


def _first_lengths(settings: SamplingSettings, nbeta: float, localization: float, about: Survey) -> _Lengths:
    """What one snapshot asks for before anything is known of its draws."""
    if not (math.isfinite(about.train_loss) and math.isfinite(about.top_curvature)):
        return _Lengths(0, 0, 0)
    burn_in, draws = run_length(settings, localization, _step_size(settings, nbeta, localization, about))
    return _Lengths(burn_in, draws, draws)


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
