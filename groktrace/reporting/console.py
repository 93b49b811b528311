"""Text for people and JSON for programs."""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from groktrace.analysis.detection import Transition
from groktrace.analysis.forecast import Forecast
from groktrace.analysis.measurement.limit import LearningCoefficient
from groktrace.analysis.measurement.reference import Reference
from groktrace.analysis.results.grokking import THRESHOLD, Grokking
from groktrace.analysis.results.trajectory import SYMBOLS, Point, Trajectory
from groktrace.analysis.temperature import TemperatureCurve
from groktrace.records import plain
from groktrace.reporting.numbers import duration, number
from groktrace.reporting.remarks import reason_kind
from groktrace.reporting.series import Events, Series
from groktrace.reporting.text_plot import small_curve
from groktrace.run.store import Run

MAX_ROWS = 25


@dataclass(frozen=True)
class ConsoleReporter:
    """Prints the curve, settings, snapshots and transitions as text.

    Attributes:
        stream: where to; standard output by default.
    """

    stream: TextIO | None = None

    def report(self, series: Series, events: Events, place: Path) -> None:
        """Print the text; see `Reporter`."""
        curve = small_curve(series, events)
        opening = f"{series.trajectory.curve.symbol} against the step:\n{curve}\n\n" if curve else ""
        print(opening + summary(series, events), file=self.stream or sys.stdout, flush=True)


def as_json(series: Series, events: Events) -> dict[str, Any]:
    """The result as one JSON object; what is not known is None.

    Args:
        series: of the trajectory.
        events: along it.
    """
    kept = series.trajectory.to_dict()
    return {
        **{name: kept[name] for name in ("run", "n", "nbeta", "localization", "resolution", "locality", "method")},
        "curve": series.trajectory.curve.name,
        "reference": kept["reference"],
        "trajectory": kept["points"],
        "remarks": list(events.remarks),
        "transitions": [transition.to_dict() for transition in events.transitions],
        "grokking": events.grokking.to_dict(),
        "unreadable": kept["unreadable"],
        "data": kept["data"],
    }


def opening_line(run: Run) -> str:
    """What is going to be analysed, in one line.

    Args:
        run: opened.
    """
    steps = [snapshot.step for snapshot in run.snapshots]
    weights = sum(math.prod(spec.shape) for spec in run.specs.values() if spec.trainable)
    samples = run.info["n"]
    data = "" if samples is None else f", {samples:,} training samples"
    return f"{run.name}: {len(steps)} snapshots of steps {steps[0]} to {steps[-1]}, {weights:,} weights{data}"


def forecast_text(forecast: Forecast) -> str:
    """What an analysis will take, in a few lines.

    Args:
        forecast: of the analysis.
    """
    before = f" ({forecast.finished} measured before)" if forecast.finished else ""
    lines = [
        f"snapshots  {forecast.snapshots}{before}",
        f"chains     {forecast.chains} a snapshot, {forecast.weights:,} weights each",
        f"steps      {forecast.steps} a chain on average, over {forecast.tried} snapshots that were tried",
    ]
    if forecast.nbeta is not None and forecast.localization is not None:
        lines.append(f"posterior  nβ = {number(forecast.nbeta)}, γ = {number(forecast.localization)}")
    if forecast.samples is not None:
        batches = "at once" if forecast.batch_size is None else f"in batches of {forecast.batch_size}"
        lines.append(f"data       {forecast.samples:,} samples, {batches}")
    lines.append(f"memory     {forecast.memory_bytes / 2**20:,.0f} MiB")
    lines.append(f"time       {duration(forecast.seconds)}")
    return "\n".join(lines)


_FREE_ENERGY = "(ΔF = n·ΔL + Δλ·log n, L the training loss: negative favours what comes after)"


def transitions_table(events: Events) -> str:
    """The transitions as an aligned table, one a line, with what each label rests on and all remarks below.

    Args:
        events: along the trajectory.
    """
    found = events.transitions
    table = "\n".join((*aligned(transition_rows(found)), _FREE_ENERGY)) if found else ""
    evidence = "\n".join(
        f"step {transition.step}: {transition.evidence}" for transition in found if transition.evidence
    )
    return "\n\n".join(part for part in (table, evidence, *events.remarks, by_accuracy(events.grokking)) if part)


def transition_rows(transitions: Sequence[Transition]) -> Sequence[tuple[str, ...]]:
    """The table of transitions, its heading first.

    Args:
        transitions: in step order.
    """
    symbol = SYMBOLS.get(transitions[0].curve or "", "λ") if transitions else "λ"
    heading = (
        "transition",
        "label",
        "step",
        "90 % interval",
        "onset - end",
        f"{symbol} before",
        "after",
        "change",
        "ΔF",
    )
    return [heading] + [
        (
            transition.kind,
            transition.label or "-",
            str(transition.step),
            f"{transition.step_low} - {transition.step_high}",
            f"{transition.onset} - {transition.end}",
            number(transition.llc_before),
            number(transition.llc_after),
            f"{number(transition.delta_llc, '+')} ± {number(transition.stderr)}",
            number(transition.delta_free_energy, "+"),
        )
        for transition in transitions
    ]


def by_accuracy(grokking: Grokking) -> str:
    """What the accuracies say of memorisation and generalisation, in a sentence; empty if nothing.

    Args:
        grokking: measured on the run.
    """
    never = grokking.severity == 0 and grokking.generalised_at is None
    known = [
        f"memorised at step {grokking.memorised_at}" if grokking.memorised_at is not None else None,
        f"generalised at step {grokking.generalised_at}" if grokking.generalised_at is not None else None,
        f"{grokking.delay} steps later" if grokking.delay is not None else None,
        f"grokking severity {number(grokking.severity)}"
        if plain(grokking.severity) is not None and not never
        else None,
        f"validation accuracy stays below {THRESHOLD:g}" if never else None,
    ]
    return "By accuracy: " + ", ".join(part for part in known if part) + "." if any(known) else ""


def summary(series: Series, events: Events) -> str:
    """Settings, snapshots and transitions as text.

    Args:
        series: of the trajectory.
        events: along it.
    """
    trajectory = series.trajectory
    points = trajectory.points
    shown = _thinned(points, events.transitions)
    columns = [["step", *(str(points[i].step) for i in shown)]]
    for quantity in series:
        if quantity.heading and quantity.known:
            columns.append([quantity.heading, *(number(float(quantity.values[i])) for i in shown)])
            if quantity.errors is not None:
                columns.append(["±", *(number(float(quantity.errors[i])) for i in shown)])
    columns.append(["", *("" if points[i].reliable else reason_kind(points[i].reasons) for i in shown)])
    hidden = len(points) - len(shown)
    lines = [settings_line(trajectory)]
    if trajectory.reference is not None:
        lines.append(f"reference {reference_text(trajectory.reference)}")
    lines += ["", *aligned([*zip(*columns, strict=True)])]
    if hidden:
        doubtful = sum(not point.reliable for point in points) - sum(not points[i].reliable for i in shown)
        among = f", {doubtful} of them unreliable" if doubtful else ""
        lines.append(f"({hidden} of {len(points)} snapshots not shown{among}; --json and --csv have all)")
    return "\n".join([*lines, "", transitions_table(events)])


def temperature_table(curve: TemperatureCurve) -> str:
    """λ̂ at each temperature as an aligned table, and its limit.

    Args:
        curve: nβ ascending.
    """
    rows: list[tuple[str, ...]] = [("nβ", "λ̂", "±", "λ_c", "±", "")]
    for estimate in curve.estimates:
        values = (estimate.nbeta, estimate.llc, estimate.stderr, estimate.llc_centred, estimate.stderr_centred)
        rows.append((*(number(value) for value in values), "; ".join(estimate.reasons)))
    unsought = "The limit was not looked for: that takes minutes and more beyond some hundred weights. "
    unsought += "estimate_llc(..., limit=True) does so in any case."
    return "\n".join([*aligned(rows), "", *([unsought] if curve.limit is None else limit_lines(curve.limit))])


def limit_lines(limit: LearningCoefficient) -> list[str]:
    """λ̂ along a ladder of nβ, twice a decade, and its limit.

    Args:
        limit: nβ ascending.
    """
    rows: list[tuple[str, ...]] = [("nβ", "λ̂", "±")]
    places = [math.floor(2 * math.log10(point.nbeta)) for point in limit.ladder]
    last = [i for i, place in enumerate(places) if i == len(places) - 1 or places[i + 1] > place]
    for i in last:
        point = limit.ladder[i]
        rows.append((number(point.nbeta), number(point.llc), number(point.stderr)))
    if limit.llc is None or limit.plateau is None:
        found = f"Learning coefficient {'; '.join(limit.reasons)}."
    else:
        bounds = f"95 % interval {number(limit.low)} to {number(limit.high)}"
        found = f"Learning coefficient: λ = {number(limit.llc)} ({bounds}); λ̂ nears it as theory says from nβ = "
        found += f"{number(limit.plateau[0])} to {number(limit.plateau[1])}."
    return ["Annealed particles:", *aligned(rows), "", found]


def settings_line(trajectory: Trajectory) -> str:
    """What the trajectory was measured with, in one line."""
    parts = [
        f"{len(trajectory.points)} snapshot{'' if len(trajectory.points) == 1 else 's'}",
        f"on {trajectory.data}" if trajectory.data is not None else None,
        f"n = {trajectory.n}" if trajectory.n is not None else None,
        f"method {trajectory.method}" if trajectory.method else None,
        "nβ follows each snapshot's curvature" if trajectory.follows_curvature else None,
        f"nβ = {number(trajectory.nbeta)}" if trajectory.nbeta is not None else None,
        f"γ = {number(trajectory.localization)}" if trajectory.localization is not None else None,
        f"resolution {trajectory.resolution:g}" if trajectory.resolution is not None else None,
        f"locality {trajectory.locality:g}" if trajectory.locality is not None else None,
        f"transitions on {trajectory.curve.symbol}",
    ]
    where = f"{trajectory.run}: " if trajectory.run else ""
    return where + ", ".join(part for part in parts if part)


def reference_text(reference: Reference) -> str:
    """A reference value and where it comes from, in a few words.

    Args:
        reference: of a trajectory.
    """
    text = f"λ = {number(reference.llc)}"
    if reference.source == "value":
        return text
    rank = f"half the Jacobian's rank of {reference.rank} at step {reference.step}"
    gap = "" if reference.gap is None else f", gap {number(reference.gap)}"
    return f"{text}, {rank} (tolerance {number(reference.tolerance)}{gap})"


def _thinned(points: Sequence[Point], transitions: Sequence[Transition]) -> list[int]:
    """Indices of at most 25 points: evenly spread ones, and those about each transition unless these are too many."""
    if len(points) <= MAX_ROWS:
        return list(range(len(points)))
    marks = {
        step
        for transition in transitions
        for step in (transition.onset, transition.end, transition.step_low, transition.step_high)
    }
    chosen = {i for i, point in enumerate(points) if point.step in marks} | {0, len(points) - 1}
    if len(chosen) > MAX_ROWS - 10:
        chosen = {0, len(points) - 1}
    stride = -(-len(points) // (MAX_ROWS - len(chosen)))
    chosen |= set(range(0, len(points), stride))
    return sorted(chosen)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as lines of left-aligned words and right-aligned numbers.

    Args:
        rows: the heading first.
    """
    columns = list(zip(*rows, strict=True))
    widths = [max(len(cell) for cell in column) for column in columns]
    numeric = [all(cell in ("", "-") or cell[0] in "+-0123456789" for cell in column[1:]) for column in columns]
    return [
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ).rstrip()
        for row in rows
    ]


def settings_json(trajectory: Trajectory) -> str:
    """The settings as indented JSON, for TensorBoard's Text tab."""
    kept = {name: value for name, value in trajectory.to_dict().items() if name not in ("points", "unreadable")}
    return json.dumps(kept, indent=2)
