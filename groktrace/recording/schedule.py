"""Which steps are kept: pure functions of the number of optimizer updates."""

import math
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any

from groktrace.errors import SettingsError
from groktrace.run.layout import MAX_STEP

DEFAULT_EVERY = 100
STEPS_PER_DECADE = 20
MAX_EXPLICIT_STEPS = 10**6


@dataclass(frozen=True)
class Schedule:
    """The steps that are kept besides the first and the last.

    Attributes:
        keep: whether a step is kept.
        description: the same as JSON, for run.json.
    """

    keep: Callable[[int], bool]
    description: dict[str, Any]


def make_schedule(every: Any = None, schedule: Any = None) -> Schedule:
    """Make the schedule from the arguments of `watch`.

    Args:
        every: keep each step that this many updates divide; 100 if neither argument is given.
        schedule: "log" for about 20 steps a decade, an iterable of steps, or a function step -> bool.

    Raises:
        SettingsError: both are given, or one is none of these.
    """
    if every is not None and schedule is not None:
        raise SettingsError("every, schedule: give one of the two, got both.")
    if schedule is None:
        interval = DEFAULT_EVERY if every is None else check_count(every, "every", least=1)
        return Schedule(lambda step: step % interval == 0, {"kind": "every", "every": interval})
    if isinstance(schedule, str):
        if schedule != "log":
            raise SettingsError(f"schedule: expected 'log', steps, or a function step -> bool, got '{schedule}'.")
        return Schedule(is_log_step, {"kind": "log", "per_decade": STEPS_PER_DECADE})
    if callable(schedule):
        name = getattr(schedule, "__qualname__", type(schedule).__qualname__)
        return Schedule(lambda step: bool(schedule(step)), {"kind": "function", "name": name})
    if isinstance(schedule, Iterable):
        steps = frozenset(check_count(step, "schedule", least=0) for step in islice(schedule, MAX_EXPLICIT_STEPS + 1))
        if not 0 < len(steps) <= MAX_EXPLICIT_STEPS:
            raise SettingsError(f"schedule: expected 1 to {MAX_EXPLICIT_STEPS} steps, got {len(steps) or 'none'}.")
        return Schedule(steps.__contains__, {"kind": "steps", "steps": sorted(steps)})
    raise SettingsError(f"schedule: expected 'log', steps, or a function step -> bool, got {schedule!r}.")


def is_log_step(step: int) -> bool:
    """Whether `step` is a rounded power of 10^(1/20), so that all of the first few and every 10^k are."""
    if step < 1:
        return False
    nearest = round(STEPS_PER_DECADE * math.log10(step))
    return any(round(10 ** (k / STEPS_PER_DECADE)) == step for k in (nearest - 1, nearest, nearest + 1))


def check_count(value: Any, what: str, *, least: int) -> int:
    """`value` as a plain integer.

    Raises:
        SettingsError: it is no whole number of at least `least`.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        count = operator.index(value)
    except TypeError:
        raise SettingsError(f"{what}: expected a whole number of at least {least}, got {value!r}.") from None
    if not least <= count <= MAX_STEP:
        raise SettingsError(f"{what}: expected a whole number from {least} to {MAX_STEP}, got {count}.")
    return count
