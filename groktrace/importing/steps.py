"""The training step of each checkpoint.

By --step-from where that is given. Else by what the checkpoints themselves say, where all do: a number named as one of
`RECORDS`, or the `step` in an optimizer's state. Else by the names of the files, where all have a whole number: the
last one after `step` or `iter`, or else the last one, or else that of the folder.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from groktrace.errors import SettingsError
from groktrace.importing.contents import Contents
from groktrace.importing.find import SUFFIXES
from groktrace.run.layout import MAX_STEP

RECORDS = ("global_step", "step", "steps", "iteration", "iter", "iter_num", "num_steps", "num_updates")
_OPTIMIZER_STEP = re.compile(r"(?:.*\.)?state\..+\.step")
_OPTIMIZER_GROUP = re.compile(r"(?:^|\.)param_groups\.[0-9]+\.")
MAX_STATES = 16  # of an optimizer, that are looked at
# Whole numbers: none that is a part of 0.53 or 1,500, and none that stands for more, as 10k and 1e3 do.
_WHOLE = r"(?<![0-9])(?<![0-9][.,e])([0-9]+)(?![0-9]|[.,][0-9]|[km](?![a-z])|e[0-9])"
_AFTER_STEP = re.compile(rf"(?:step|iter|iteration|update)s?[-_=. ]*{_WHOLE}", re.IGNORECASE)
_NUMBER = re.compile(_WHOLE, re.IGNORECASE)
_SHORTENED = re.compile(r"[0-9](?:[km](?![a-z])|e[0-9])", re.IGNORECASE)


@dataclass(frozen=True)
class Step:
    """The step of a checkpoint, and where it is from.

    Attributes:
        path: of the checkpoint.
        step: its training step.
        source: what says so.
    """

    path: Path
    step: int
    source: str


@dataclass(frozen=True)
class Recorded:
    """What a checkpoint says of its step.

    Attributes:
        path: of the checkpoint.
        step: the number, as it stands there; None where there is none.
        source: its name.
    """

    path: Path
    step: float | None
    source: str


def recorded_step(path: Path, contents: Contents) -> Recorded:
    """What a checkpoint says of its step."""
    for name in RECORDS:
        if (number := _number(contents, name)) is not None:
            return Recorded(path, number, name)
    names = [*contents.tensors, *contents.values]
    states = [name for name in names if _OPTIMIZER_STEP.fullmatch(name)][:MAX_STATES]
    steps = [number for name in states if (number := _number(contents, name)) is not None]
    if steps:
        return Recorded(path, max(steps, key=lambda step: (step != step, step)), "optimizer state")
    fresh = any(map(_OPTIMIZER_GROUP.search, names)) and not any(".state." in f".{name}" for name in names)
    return Recorded(path, None, "optimizer without state" if fresh else "")


def _number(contents: Contents, name: str) -> float | None:
    """A number of a checkpoint, be it kept as a tensor; None where there is none of that name."""
    value: Any = contents.values.get(name)
    tensor = contents.tensors.get(name)
    if tensor is not None and math.prod(tensor.shape) == 1 and not tensor.dtype.is_complex:
        value = tensor.read().item()
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def named_step(path: Path) -> int | None:
    """The step by a checkpoint's name, or else its folder's; None where neither has a whole number."""
    suffix = max((suffix for suffix in SUFFIXES if path.name.endswith(suffix)), key=len, default="")
    for name in (path.name.removesuffix(suffix), path.absolute().parent.name):
        for pattern in (_AFTER_STEP, _NUMBER):
            if found := pattern.findall(name):
                return int(found[-1][:20])
        if _SHORTENED.search(name):  # it tells the step, and not the folder does
            return None
    return None


def choose_steps(found: Sequence[Recorded], step_from: str | None) -> tuple[list[Step], str | None]:
    """The step of each checkpoint, ascending, by one rule for all.

    Args:
        found: what the checkpoints say.
        step_from: a regular expression that finds the step in a path; None for the rule above.

    Returns:
        The steps, and a remark on how they were found, if there is one to make.

    Raises:
        SettingsError: a step is missing, no whole number, or another checkpoint's.
    """
    remark = None
    lacking = [checkpoint for checkpoint in found if checkpoint.step is None]
    started = any(checkpoint.step is not None for checkpoint in found)
    if step_from is not None:
        steps = [Step(checkpoint.path, _by_pattern(checkpoint.path, step_from), "--step-from") for checkpoint in found]
    elif started and all(checkpoint.source for checkpoint in lacking):
        # An optimizer that has made a step has it in its state; one without is that of the start.
        steps = [
            Step(checkpoint.path, _whole(checkpoint.path, checkpoint.step or 0, checkpoint.source), checkpoint.source)
            for checkpoint in found
        ]
    else:
        steps = [Step(path, _whole(path, number, "its name"), "name") for path, number in _by_names(found)]
        if started:
            remark = f"{lacking[0].path} says nothing of its step, so all are taken from the names."
    by_step: dict[int, Path] = {}
    for checkpoint in steps:
        if (other := by_step.setdefault(checkpoint.step, checkpoint.path)) is not checkpoint.path:
            raise SettingsError(
                f"{checkpoint.path}: is of step {checkpoint.step} by {checkpoint.source}, and so is {other}; leave one "
                "of them out, or say by --step-from REGEX where in the path the step is."
            )
    return sorted(steps, key=lambda checkpoint: checkpoint.step), remark


def _by_names(found: Sequence[Recorded]) -> list[tuple[Path, int]]:
    named = [(checkpoint.path, named_step(checkpoint.path)) for checkpoint in found]
    if nameless := next((path for path, number in named if number is None), None):
        raise SettingsError(
            f"{nameless}: expected a step in it or in its name, found none; say by --step-from REGEX where in the path "
            "it is, or leave the file out."
        )
    return [(path, number) for path, number in named if number is not None]


def _by_pattern(path: Path, step_from: str) -> int:
    """The step that a regular expression finds in a path: its first group, or all of it."""
    try:
        match = re.search(step_from, path.as_posix())
    except re.error as failure:
        raise SettingsError(f"--step-from: no regular expression ({failure}): {step_from}") from failure
    if match is None:
        raise SettingsError(
            f"{path}: --step-from '{step_from}' finds nothing in it; make it fit, or leave the file out."
        )
    text = match[1] if match.re.groups else match[0]
    try:
        return _whole(path, int(text or ""), "--step-from")
    except ValueError:
        raise SettingsError(
            f"{path}: --step-from '{step_from}' finds '{text}', expected a whole number; put (...) around the digits."
        ) from None


def _whole(path: Path, number: float, source: str) -> int:
    """A step as an integer.

    Raises:
        SettingsError: it is none.
    """
    if not (0 <= number <= MAX_STEP and number == int(number)):
        raise SettingsError(
            f"{path}: its step is {number} by {source}, expected a whole number from 0 to {MAX_STEP}; leave the file "
            "out, or say by --step-from REGEX where in the path the step is."
        )
    return int(number)
