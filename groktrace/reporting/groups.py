"""Runs of one setting: their mean and spread, and their transitions dated over all of them."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from groktrace.errors import GroktraceError, SettingsError, printable
from groktrace.records import plain
from groktrace.reporting.series import CURVE, QUANTITIES, Events, Series
from groktrace.run import layout
from groktrace.run.files import read_json
from groktrace.run.store import Run

# Of a run: its name, and what there is to show.
Result = tuple[str, Series, Events]
# What run.json says of a run that another seed changes, or another day.
_NOT_SETTINGS = {"seed", "created", "closed", "torch", "groktrace", "doubts", "aliases", "out", "format", "weights"}


@dataclass(frozen=True, eq=False)
class Mean:
    """A quantity over several runs: of losses the geometric mean, since they are seen on a logarithmic axis.

    Attributes:
        steps: at which all runs are known, or lie between two snapshots that are, [T].
        value: the mean, [T].
        low, high: one standard deviation below and above, [T]; those of losses by a factor.
        runs: how many runs know the quantity.
    """

    steps: np.ndarray
    value: np.ndarray
    low: np.ndarray
    high: np.ndarray
    runs: int


@dataclass(frozen=True)
class Spread:
    """A number over several runs.

    Attributes:
        mean: of those in which it is known.
        deviation: the standard deviation; None of a single one.
        low, high: the smallest and the largest.
    """

    mean: float
    deviation: float | None
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """The spread of some numbers, of which there is one at least."""
        deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
        return cls(float(np.mean(values)), deviation, float(min(values)), float(max(values)))

    def text(self, digits: str = ".0f", sign: str = "") -> str:
        """The mean, and what it varies by."""
        varies = "" if self.deviation is None else f" ± {self.deviation:{digits}}"
        return f"{self.mean:{sign}{digits}}{varies}"


@dataclass(frozen=True)
class SharedTransition:
    """A transition that several runs make: the first, second, ... of its label or kind in each.

    Attributes:
        kind, label: see `groktrace.Transition`.
        runs: how many of the runs make it.
        step: of its midpoint.
        llc_before, llc_after, delta_llc: see `groktrace.Transition`.
    """

    kind: str
    label: str | None
    runs: int
    step: Spread
    llc_before: Spread
    llc_after: Spread
    delta_llc: Spread


@dataclass(frozen=True, eq=False)
class Group:
    """Runs of one setting.

    Attributes:
        name: what they have in common.
        members: the runs.
    """

    name: str
    members: tuple[Result, ...]

    def __len__(self) -> int:
        return len(self.members)

    def mean(self, name: str) -> Mean:
        """A quantity over the runs, of losses that are never negative in the geometric mean.

        Args:
            name: of the quantity.
        """
        every = [series.steps for _, series, _ in self.members]
        first, last = max(_end(steps, 0) for steps in every), min(_end(steps, -1) for steps in every)
        steps = np.unique(np.concatenate(every))
        steps = steps[(steps >= first) & (steps <= last)]
        logarithms = name.endswith("loss") and not any((series[name].values < 0).any() for _, series, _ in self.members)
        rows = [row for _, series, _ in self.members if (row := _row(series, name, steps, logarithms)) is not None]
        if not rows:
            return Mean(steps, *np.full((3, len(steps)), np.nan), runs=0)
        table = np.array(rows)
        centre, width = table.mean(axis=0), table.std(axis=0, ddof=1) if len(rows) > 1 else np.zeros(len(steps))
        bands = (centre, centre - width, centre + width)
        if logarithms:
            bands = tuple(np.exp(bound) for bound in bands)
        elif name.endswith("accuracy"):
            bands = tuple(np.clip(bound, 0.0, 1.0) for bound in bands)
        return Mean(steps, *bands, runs=len(rows))

    @property
    def transitions(self) -> tuple[SharedTransition, ...]:
        """The transitions of the runs, those of the same label or kind together, in the order of their dates."""
        found: dict[tuple[str, int], list[Any]] = {}
        for _, _, events in self.members:
            seen: Counter[str] = Counter()
            for transition in events.transitions:
                name = transition.label or transition.kind
                found.setdefault((name, seen[name]), []).append(transition)
                seen[name] += 1

        def spread(own: list[Any], attribute: str) -> Spread:
            return Spread.of([getattr(transition, attribute) for transition in own])

        shared = (
            SharedTransition(
                own[0].kind,
                own[0].label,
                len(own),
                *(spread(own, attribute) for attribute in ("step", "llc_before", "llc_after", "delta_llc")),
            )
            for own in found.values()
        )
        return tuple(sorted(shared, key=lambda transition: transition.step.mean))

    def reached(self, name: str) -> Spread | None:
        """When the runs memorised or generalised by their accuracies; None where none did.

        Args:
            name: "memorised_at" or "generalised_at".
        """
        steps = [getattr(events.grokking, name) for _, _, events in self.members]
        known = [step for step in steps if step is not None]
        return Spread.of(known) if known else None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        means = {name: self.mean(name) for name in QUANTITIES}
        return {
            "name": self.name,
            "runs": [name for name, *_ in self.members],
            "steps": means[CURVE].steps.tolist(),
            **{
                name: {key: plain(getattr(mean, key).tolist()) for key in ("value", "low", "high")}
                for name, mean in means.items()
                if mean.runs
            },
            "transitions": [plain(asdict(transition)) for transition in self.transitions],
            **{
                name: None if (when := self.reached(name)) is None else plain(asdict(when))
                for name in ("memorised_at", "generalised_at")
            },
        }


def group_runs(
    results: Sequence[Result], settings: Sequence[Mapping[str, Any] | None], by: str | None = None
) -> tuple[Group, ...]:
    """Put runs together that differ in nothing that was recorded but their seed, or that share a setting.

    Args:
        results: the runs.
        settings: of each, see `settings_of`; None where they are not known, so that it stays alone.
        by: the name of a setting; None for all.

    Raises:
        SettingsError: a run has no such setting.
    """
    found: dict[str, list[int]] = {}
    for i, own in enumerate(settings):
        if by is not None:
            key = f"{by.rpartition('.')[2]} = {_value(results[i][0], own or {}, by)}"
        else:
            kept = None if own is None else {k: v for k, v in own.items() if k.split(".")[0] not in _NOT_SETTINGS}
            key = f"alone {i}" if kept is None else json.dumps(kept, sort_keys=True)
        found.setdefault(key, []).append(i)
    short = short_names([name for name, *_ in results])
    groups = []
    for key, own in found.items():
        members = tuple(results[i] for i in own)
        name = key if by is not None else _pattern([short[i] for i in own])
        groups.append(Group(name if len(own) == 1 else f"{name} ({len(own)} runs)", members))
    return tuple(groups)


def settings_of(run: Run) -> dict[str, Any]:
    """What a run was recorded with, by dotted names, such as optimizer.groups.0.lr.

    Args:
        run: opened.
    """
    found = _flat({name: value for name, value in run.info.items() if name != "weights"})
    shapes = sorted((name, spec.shape, str(spec.dtype), spec.trainable) for name, spec in run.specs.items())
    found["network"] = hashlib.sha256(repr(shapes).encode()).hexdigest()[:12]
    path = run.root / layout.PROGRAM_FILE
    if path.exists():
        try:
            program = json.dumps(read_json(path), sort_keys=True)
            found["program"] = hashlib.sha256(program.encode()).hexdigest()[:12]
        except GroktraceError as failure:  # its results are there all the same
            found["program"] = str(failure)
    return found


def short_names(names: Sequence[str]) -> list[str]:
    """Paths without the folders that all have in common at their beginning."""
    parts = [name.replace("\\", "/").rstrip("/").split("/") for name in names]
    shared = 0
    while len(parts) > 1 and all(part[shared : shared + 1] == parts[0][shared : shared + 1] for part in parts):
        if shared == min(map(len, parts)) - 1:
            break
        shared += 1
    return ["/".join(part[shared:]) if len(parts) > 1 else name for part, name in zip(parts, names, strict=True)]


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict | list) and value and prefix.count(".") < 4:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        pairs = (_flat(item, f"{prefix}.{name}" if prefix else str(name)) for name, item in items)
        return {name: item for pair in pairs for name, item in pair.items()}
    return {printable(prefix): value}


def _value(run: str, own: Mapping[str, Any], by: str) -> str:
    """A setting as text, by its full name or by that within the optimizer's first group."""
    for name in (by, f"optimizer.groups.0.{by}", f"{by}.name"):
        if name in own:
            return json.dumps(own[name]).strip('"')
    known = [name.removeprefix("optimizer.groups.0.") for name in own if not name.startswith("data.")]
    raise SettingsError(f"group_by: {run} has no setting '{by}'; it has {', '.join(known) or 'none that are known'}.")


def _pattern(names: Sequence[str]) -> str:
    """What names have in common at their beginning, and a star; where that is nothing, the first."""
    if len(names) == 1:
        return names[0]
    length = next((i for i, letters in enumerate(zip(*names, strict=False)) if len(set(letters)) > 1), None)
    start = names[0][: min(map(len, names)) if length is None else length]
    return f"{start}*" if start else f"{names[0]}, ..."


def _end(steps: np.ndarray, which: int) -> float:
    return float(steps[which]) if len(steps) else math.nan


def _row(series: Series, name: str, steps: np.ndarray, logarithms: bool) -> np.ndarray | None:
    """A run's quantity, or its logarithm, at these steps, between its snapshots along straight lines, [T]."""
    values = series[name].values
    known = np.isfinite(values) & ((values > 0) | (not logarithms))
    if not known.any():
        return None
    values = np.log(values[known]) if logarithms else values[known]
    return np.interp(steps, series.steps[known], values, left=np.nan, right=np.nan)
