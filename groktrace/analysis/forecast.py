"""What an analysis will take, from a few seconds of trying; nothing is written."""

import math
import resource
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from groktrace.analysis.estimate import FITTED, choose_device, choose_scale, estimate_stack, make_settings
from groktrace.analysis.evaluation import Survey, measure_point, stack_weights, survey
from groktrace.analysis.evaluator import Evaluator
from groktrace.analysis.llc import OFF_MINIMUM, LLCEstimate
from groktrace.analysis.replay import POINTS_FILE, folder_name, kept_scale, prepare
from groktrace.analysis.snapshots import Snapshots, read_journal
from groktrace.analysis.trajectory import Point
from groktrace.errors import SettingsError
from groktrace.run import layout
from groktrace.run.store import Run, open_run
from groktrace.run.task import Task
from groktrace.sampling.calibration import (
    COLD_BURN_IN_RELAXATIONS,
    Scale,
    resolution,
    run_length,
    step_size,
)
from groktrace.sampling.chains import MAX_GROWTH, time_steps
from groktrace.sampling.network import Network
from groktrace.sampling.noise import NormalNoise
from groktrace.sampling.settings import SamplingSettings
from groktrace.sampling.traces import ANHARMONIC

# Snapshots that are measured as the analysis will measure them, and seconds that their first draws may take. Where
# those of one take longer, first draws are all, for a share of what they take with all snapshots.
_TRIED = 24
_SECONDS = 6.0
_SHARE = 0.1
# A relative error that the first draws meet.
_CONTENT = 1e9
# Weights of snapshots that are held at once.
_MAX_NUMBERS = 2**24
# Gradients of a snapshot before it is sampled, stacked (Lanczos) and alone (differences on both sides).
_SURVEY_GRADIENTS, _SURVEY_GRADIENTS_LARGE = 9, 16


@dataclass(frozen=True)
class Forecast:
    """What is still to be done, and what it will take.

    Attributes:
        snapshots: to be measured.
        finished: measured before, with the same settings, and not to be measured again.
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
    """Steps of one snapshot's chains: burn-in, first draws, all draws, and those of attempts before the last.

    Also how many attempts there are, and after how many of them the chains look at the curvature.
    """

    burn_in: int
    first: int
    draws: int
    lost: int = 0
    attempts: int = 1
    looks: int = 0

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
        task_name: not used; by `analyze` for other processes.
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
    evaluator, snapshots, first = prepare(run, task, chosen, place)
    weights = snapshots.load(first)
    chains, size = evaluator.settings.chains, evaluator.layout.size
    folder = run.root / layout.ANALYSIS_FOLDER / folder_name(evaluator)
    done = read_journal(folder / POINTS_FILE, Point.from_dict)
    ordered, together = list(snapshots.prints), evaluator.together
    stacks = [ordered[start : start + together] for start in range(0, len(ordered), together)]
    # A stack of which some are missing is computed anew as a whole.
    wanted = [step for stack in stacks if any(snapshots.prints[each] not in done for each in stack) for step in stack]
    finished = len(snapshots.prints) - len(wanted)
    if not wanted:
        return Forecast(0, finished, size, chains, 0, 0, _peak_bytes(place), 0.0, 0)
    opened = time.perf_counter() - start
    load = _seconds(lambda: snapshots.load(first))
    if evaluator.loss.micro_batch is None:
        found = _stacked(evaluator, snapshots, (first, weights), load, kept_scale(folder), wanted)
    else:
        found = _large(evaluator, weights, kept_scale(folder), len(wanted))
    seconds, lengths, memory, tried = found
    # Each file is read to survey it, to sample it, and for what the script logged.
    seconds += opened + 3 * load * len(wanted)
    steps = sum(each.total for each in lengths)
    return Forecast(
        len(wanted), finished, size, chains, round(steps / len(wanted)), steps * chains, memory, seconds, tried
    )


def _spread(items: Sequence[Any], count: int) -> list[Any]:
    """So many of them or all, spread evenly, the last among them."""
    count = max(1, min(count, len(items)))
    return [items[round((i + 1) * len(items) / count) - 1] for i in range(count)]


def _stacked(
    evaluator: Evaluator,
    snapshots: Snapshots,
    first: tuple[int, dict[str, Tensor]],
    load: float,
    scale: Scale | None,
    wanted: Sequence[int],
) -> tuple[float, list[_Lengths], int, int]:
    """Seconds, lengths of all snapshots, peak of memory, snapshots tried."""
    task, loss, settings = evaluator.task, evaluator.loss, evaluator.settings
    total, rows, weights = len(wanted), evaluator.rows, first[1]
    together = min(total, evaluator.together)
    measure = _seconds(lambda: measure_point(task, weights, loss.device))
    steps = {
        count: time_steps(*stack_weights(loss, [weights] * count), settings, 0.05 * _SECONDS) for count in {1, together}
    }
    # A step of a stack takes some time whatever it holds, and some for each snapshot.
    each = (steps[together][0] - steps[1][0]) / max(together - 1, 1)
    each = max(each, 0.0) if together > 1 else steps[1][0]
    always = max(steps[1][0] - each, 0.0)
    stack = _SURVEY_GRADIENTS * (always / min(total, rows) + each / settings.chains) + measure
    seconds = total * stack

    numbers = sum(tensor.numel() for tensor in weights.values())
    affordable = min(int(0.25 * _SECONDS / max(load + stack, 1e-9)), _MAX_NUMBERS // max(numbers, 1))
    surveyed = {step: loaded for step in _spread(wanted, affordable) if (loaded := snapshots.load(step)) is not None}
    surveyed = surveyed or dict([first])
    surveys: list[Survey] = []
    for start in range(0, len(surveyed), rows):
        steps_now = list(surveyed)[start : start + rows]
        surveys += survey(task, loss, [surveyed[step] for step in steps_now], steps_now, settings.seed)
    # Whether nβ follows the curvature is decided from the first snapshot that is fitted on.
    while scale is None and (step := _before_fitted(surveys, wanted)) is not None:
        if (loaded := snapshots.load(step)) is None:
            break
        surveyed[step] = loaded
        surveys += survey(task, loss, [loaded], [step], settings.seed)
        surveys.sort(key=lambda about: about.step)
    scale = scale or choose_scale(settings, task.n, loss.layout, surveys)
    expected = {about.step: _first_lengths(settings, scale, about) for about in surveys}

    costs = {step: lengths.total * (always + each) for step, lengths in expected.items()}
    chosen = _affordable(surveys, costs, _SECONDS)
    cut_short = not chosen and settings.draws is None
    if not chosen:
        chosen = _affordable(surveys, costs, _SHARE * total * statistics.mean(costs.values()))
    trying = replace(settings, rtol=_CONTENT) if cut_short else settings
    seen: dict[int, _Lengths] = {}
    for start in range(0, len(chosen), together):
        part = chosen[start : start + together]
        estimates = estimate_stack(loss, [surveyed[about.step] for about in part], part, trying, scale, task.n)
        for about, found in zip(part, estimates, strict=True):
            if found.step_size is not None:
                halvings, lost = found.diagnostics["halvings"], found.diagnostics["lost_steps"]
                draws = run_length(settings, scale.localization, found.step_size, halvings=halvings)[1]
                grown = found.draws * (_growth(found, settings.rtol, scale) if cut_short else 1)
                attempts = 1 + (max(halvings, 1) if lost else 0)
                # As `Traces.anharmonic` has it; an attempt that was given up had its reasons to look.
                in_bowl = abs((found.diagnostics["anharmonicity"] or 0.0) - 1) <= ANHARMONIC
                looks = attempts - 1 if in_bowl else attempts
                seen[about.step] = _Lengths(found.burn_in, min(draws, found.draws), grown, lost, attempts, looks)
    lengths = []
    for step in wanted:
        near = min(expected, key=lambda other: abs(other - step))
        alike = min(seen, key=lambda other: abs(other - step), default=None)
        lengths.append(expected[near] if alike is None else _like(expected[near], expected[alike], seen[alike]))
    for start in range(0, total, together):
        group = lengths[start : start + together]
        seconds += sum(snapshot.attempts for snapshot in group) * steps[together][1] / together
        seconds += sum(snapshot.looks for snapshot in group) * _SURVEY_GRADIENTS * each
        for active, count in _rounds(group):
            seconds += (always + each * active) * count
    return seconds, lengths, _peak_bytes(loss.device), len(chosen)


def _affordable(surveys: Sequence[Survey], costs: dict[int, float], seconds: float) -> list[Survey]:
    """Snapshots spread over those surveyed, as many as can be tried in so many seconds."""
    for count in range(_TRIED, 0, -1):
        chosen = _spread(surveys, count)
        if sum(costs[about.step] for about in chosen) <= seconds:
            return chosen
    return []


def _growth(found: LLCEstimate, rtol: float, scale: Scale) -> int:
    """How many times as many draws it will take for the standard error to fall to what is wanted: a power of two."""
    centred = scale.curvature is not None and found.llc_centred is not None
    value, error = (found.llc_centred, found.stderr_centred) if centred else (found.llc, found.stderr)
    if not value or (OFF_MINIMUM in found.reasons and not centred):
        return 1
    wanted = (error / (rtol * abs(value))) ** 2
    if centred and (value < 0 or wanted > MAX_GROWTH):
        return 1  # no more draws are spent
    return min(2 ** math.ceil(math.log2(max(wanted, 1.0))), MAX_GROWTH)


def _before_fitted(surveys: Sequence[Survey], wanted: Sequence[int]) -> int | None:
    """Half-way between the last snapshot that is not fitted and the first that is; None where nothing lies between."""
    losses = [about.train_loss for about in surveys]
    low = min(losses) + FITTED * (max(losses) - min(losses))
    first = next((i for i, loss in enumerate(losses) if loss <= low), 0)
    between = [step for step in wanted if first and surveys[first - 1].step < step < surveys[first].step]
    return between[len(between) // 2] if between else None


def _like(expected: _Lengths, other: _Lengths, seen: _Lengths) -> _Lengths:
    """What a snapshot will take if it differs from what it asks for as another one did."""
    burn_in = round(expected.burn_in * seen.burn_in / max(other.burn_in, 1))
    first = round(expected.first * seen.first / max(other.first, 1))
    lost = round(expected.total * seen.lost / max(other.total, 1))
    draws = round(first * seen.draws / max(seen.first, 1))
    return _Lengths(burn_in, first, draws, lost, seen.attempts, seen.looks)


def _rounds(group: Sequence[_Lengths]) -> Iterator[tuple[int, int]]:
    """Snapshots and steps of each round of a stack: it goes on until its longest is done, then those that need more."""
    if lost := [each.lost for each in group if each.lost]:
        yield len(lost), max(lost)
    yield len(group), max(each.burn_in + each.first for each in group)
    going, count = group, 1
    while going := [each for each in going if each.draws >= 2 * count * each.first > 0]:
        yield len(going), max(count * each.first for each in going)
        count *= 2


def _step_size(settings: SamplingSettings, scale: Scale, about: Survey) -> float:
    top = about.top_curvature if scale.curvature is None else scale.curvature
    return settings.step_size or step_size(scale.nbeta, scale.localization, top)


def _first_lengths(settings: SamplingSettings, scale: Scale, about: Survey) -> _Lengths:
    """What one snapshot asks for before anything is known of its draws."""
    if not (math.isfinite(about.train_loss) and math.isfinite(about.top_curvature)):
        return _Lengths(0, 0, 0)
    burn_in, draws = run_length(settings, scale.localization, _step_size(settings, scale, about))
    return _Lengths(burn_in, draws, draws)


def _large(
    evaluator: Evaluator, weights: dict[str, Tensor], scale: Scale | None, total: int
) -> tuple[float, list[_Lengths], int, int]:
    """The same of networks that go alone, from one micro-batch of one of them."""
    loss, settings = evaluator.loss, evaluator.settings
    network = Network(loss, weights)
    gradient, position = torch.zeros(network.layout.size, dtype=network.dtype), network.vector()
    gradient = gradient.to(network.device)
    few = torch.arange(min(loss.micro_batch, network.samples), device=network.device)
    part = _seconds(lambda: network.add_gradient(gradient, position, few)) / len(few)

    normal = NormalNoise((1, network.longest_piece), network.dtype, network.device)

    def move() -> None:
        generator = torch.Generator(network.device).manual_seed(0)
        for place, anchor in network.pieces():
            displacement = position[place] - anchor
            for _ in range(settings.chains):
                torch.dot(displacement, gradient[place])
            for _ in range(2):
                normal.fill(anchor[None], [generator])
                position[place].add_(anchor, alpha=0.0)

    corrected = settings.batch_size is not None and settings.method != "sgld"
    samples = min(settings.batch_size or network.samples, network.samples)
    step = (2 if corrected else 1) * samples * part + _seconds(move)
    localization = settings.localization if scale is None else scale.localization
    if localization is None:
        norm_squared = sum(float(anchor.square().sum(dtype=torch.float64)) for _, anchor in network.pieces())
        localization = network.layout.size / (settings.locality**2 * norm_squared)
    if settings.step_size is not None:
        epsilon = settings.step_size
    elif settings.nbeta in (None, "curvature"):
        # ε of a snapshot whose curvature is that from which nβ was derived.
        follow = settings.nbeta == "curvature" or (scale is not None and scale.curvature is not None)
        epsilon = step_size(resolution(settings, follow), 1.0, 1.0) / localization
    elif None in (settings.burn_in, settings.draws):
        raise SettingsError(
            "dry-run: the steps of a network as large as this follow from its curvature, which takes longer to measure "
            "than a forecast should; give step_size, or draws and burn_in, or leave nbeta to be derived."
        )
    else:
        epsilon = 1.0  # not used
    burn_in, draws = run_length(settings, localization, epsilon, COLD_BURN_IN_RELAXATIONS)
    lengths = [_Lengths(burn_in, draws, draws)] * total
    # The survey's losses are a third of a gradient; so is the loss at w*, or, with minibatches, a gradient.
    survey_gradients = _SURVEY_GRADIENTS_LARGE + 1 / 3 + (1 if corrected else 1 / 3)
    seconds = total * (survey_gradients * network.samples * part + settings.chains * (burn_in + draws) * step)
    vectors = settings.chains * (2 if settings.method == "kinetic" else 1) - 1 + corrected
    memory = _peak_bytes(network.device) + vectors * position.nbytes
    return seconds, lengths, memory, 0


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
