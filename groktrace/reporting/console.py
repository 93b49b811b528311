"""Text for people and JSON for programs; progress that suits a terminal and a log file alike."""

import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TextIO

from groktrace.analysis.detection import Transition
from groktrace.analysis.forecast import Forecast
from groktrace.analysis.grokking import Grokking
from groktrace.analysis.reference import Reference
from groktrace.analysis.temperature import TemperatureCurve
from groktrace.analysis.trajectory import SYMBOLS, Point, Trajectory
from groktrace.reporting.numbers import finite, number
from groktrace.reporting.remarks import none_found, remarks
from groktrace.run.store import Run

MAX_ROWS = 25
HEARTBEAT_SECONDS = 30.0
TICK_SECONDS = 1.0


def as_json(trajectory: Trajectory, transitions: Sequence[Transition], grokking: Grokking) -> dict[str, Any]:
    """The result as one JSON object; what is not known is None.

    Args:
        trajectory: λ̂ along the run.
        transitions: found in it.
        grokking: measured on it.
    """
    plain = trajectory.to_dict()
    return {
        "run": plain["run"],
        "n": plain["n"],
        "nbeta": plain["nbeta"],
        "localization": plain["localization"],
        "resolution": plain["resolution"],
        "locality": plain["locality"],
        "method": plain["method"],
        "curve": trajectory.curve.name,
        "reference": plain["reference"],
        "trajectory": plain["points"],
        "remarks": [*([] if transitions else [none_found(trajectory)]), *remarks(trajectory)],
        "transitions": [finite_values(each.to_dict()) for each in transitions],
        "grokking": finite_values(grokking.to_dict()),
        "unreadable": plain["unreadable"],
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
        f"memory     {forecast.memory_bytes / 2**20:,.0f} MiB",
        f"time       {_duration(forecast.seconds)}",
    ]
    return "\n".join(lines)


def transitions_table(trajectory: Trajectory, transitions: Sequence[Transition], grokking: Grokking) -> str:
    """The transitions as an aligned table, one a line, with what each label rests on below.

    Args:
        trajectory: λ̂ along the run.
        transitions: in step order.
        grokking: of the same run.
    """
    if transitions:
        lines = aligned(transition_rows(transitions))
        lines += ["", *(f"step {each.step}: {each.evidence}" for each in transitions if each.evidence)]
    else:
        lines = [none_found(trajectory)]
    for each in remarks(trajectory):
        lines += ["", each]
    if by_accuracy(grokking):
        lines += ["", by_accuracy(grokking)]
    return "\n".join(lines)


def transition_rows(transitions: Sequence[Transition]) -> list[tuple[str, ...]]:
    """The table of transitions, its heading first.

    Args:
        transitions: in step order.
    """
    symbol = SYMBOLS.get(transitions[0].curve, "λ") if transitions else "λ"
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
            each.kind,
            each.label or "-",
            str(each.step),
            f"{each.step_low} - {each.step_high}",
            f"{each.onset} - {each.end}",
            number(each.llc_before),
            number(each.llc_after),
            f"{number(each.delta_llc, '+')} ± {number(each.stderr)}",
            number(each.delta_free_energy, "+"),
        )
        for each in transitions
    ]


def by_accuracy(grokking: Grokking) -> str:
    """What the accuracies say of memorisation and generalisation, in a sentence; empty if nothing.

    Args:
        grokking: measured on the run.
    """
    known = [
        f"memorised at step {grokking.memorised_at}" if grokking.memorised_at is not None else None,
        f"generalised at step {grokking.generalised_at}" if grokking.generalised_at is not None else None,
        f"{grokking.delay} steps later" if grokking.delay is not None else None,
        f"grokking severity {number(grokking.severity)}" if finite(grokking.severity) is not None else None,
    ]
    return "By accuracy: " + ", ".join(part for part in known if part) + "." if any(known) else ""


def summary(trajectory: Trajectory, transitions: Sequence[Transition], grokking: Grokking) -> str:
    """Settings, snapshots and transitions as text.

    Args:
        trajectory: λ̂ along the run.
        transitions: found in it.
        grokking: measured on it.
    """
    points = _thinned(trajectory.points, transitions)
    curved = any(point.hessian_trace is not None for point in trajectory.points)
    sharpness = ("tr H", "±", "h_max") if curved else ()
    rows = [("step", "λ̂", "±", "λ_c", "±", "train loss", "acc", "val loss", "acc", *sharpness, "")]
    for point in points:
        numbers = [point.llc, point.stderr, point.llc_centred, point.stderr_centred, point.train_loss]
        numbers += [point.train_accuracy, point.val_loss, point.val_accuracy]
        numbers += [point.hessian_trace, point.hessian_trace_stderr, point.hessian_top] if curved else []
        rows.append((str(point.step), *map(number, numbers), "" if point.reliable else _why(point)))
    hidden = len(trajectory.points) - len(points)
    lines = [settings_line(trajectory)]
    if trajectory.reference is not None:
        lines.append(f"reference {reference_text(trajectory.reference)}")
    lines += ["", *aligned(rows)]
    if hidden:
        doubtful = sum(not each.reliable for each in trajectory.points) - sum(not each.reliable for each in points)
        among = f", {doubtful} of them unreliable" if doubtful else ""
        lines.append(f"({hidden} of {len(trajectory.points)} snapshots not shown{among}; --json has all)")
    return "\n".join([*lines, "", transitions_table(trajectory, transitions, grokking)])


def temperature_table(curve: TemperatureCurve) -> str:
    """λ̂ at each temperature as an aligned table, and the plateau.

    Args:
        curve: nβ ascending.
    """
    rows = [("nβ", "λ̂", "±", "λ_c", "±", "")]
    for each in curve.estimates:
        values = (each.nbeta, each.llc, each.stderr, each.llc_centred, each.stderr_centred)
        rows.append((*(number(value) for value in values), "; ".join(each.reasons)))
    if curve.plateau is None:
        last = "No plateau: λ̂ depends on nβ throughout, and no value of it is the absolute one."
    else:
        low, high = curve.plateau_nbeta
        last = f"Plateau: λ̂ = {number(curve.plateau)} from nβ = {number(low)} to {number(high)}."
    return "\n".join([*aligned(rows), "", last])


def settings_line(trajectory: Trajectory) -> str:
    """What the trajectory was measured with, in one line."""
    parts = [
        f"{len(trajectory.points)} snapshot{'' if len(trajectory.points) == 1 else 's'}",
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


class Progress:
    """Progress of long work: a bar on a terminal, elsewhere one line every 30 seconds; both go on while work stalls.

    Args:
        total: how much there is to do.
        label: what is being done.
        stream: where to show it; standard error by default.
        clock: seconds, for tests.
    """

    def __init__(
        self, total: int, label: str, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._total, self._label = total, label
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._done = 0
        self._terminal = self._stream.isatty()
        self._began = self._shown = clock()
        self._lock = threading.Lock()
        self._ended = threading.Event()
        # One step of the work may take minutes, and silence looks like a hang.
        self._ticker = threading.Thread(target=self._tick, name="groktrace-progress", daemon=True)

    def __enter__(self) -> "Progress":
        if self._terminal:
            self._draw()
        self._ticker.start()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._ended.set()
        self._ticker.join()
        if self._terminal:
            self._draw()
            self._write("\n")
        elif error is None:
            count = f"{self._total}" if self._done >= self._total else f"{self._done} of {self._total}"
            self._write(f"{self._label}: {count} done in {_duration(self._clock() - self._began)}\n")

    def advance(self, n: int = 1) -> None:
        """Tell that `n` more are done."""
        with self._lock:
            self._done += n
            self._show(0.05, self._done >= self._total)

    def _tick(self) -> None:
        while not self._ended.wait(TICK_SECONDS):
            with self._lock:
                self._show(TICK_SECONDS, False)

    def _show(self, pause: float, last: bool) -> None:
        now = self._clock()
        if self._terminal:
            if last or now - self._shown >= pause:
                self._shown = now
                self._draw()
        elif not last and now - self._shown >= HEARTBEAT_SECONDS:
            self._shown = now
            self._write(f"{self._label}: {self._done} of {self._total} ({self._percent()}), {self._times()}\n")

    def _percent(self) -> str:
        return f"{100 * min(self._done / self._total, 1.0):.0f} %" if self._total else "100 %"

    def _times(self) -> str:
        elapsed = self._clock() - self._began
        if not self._done or self._done >= self._total:
            return _duration(elapsed)
        return f"{_duration(elapsed)}, about {_duration(elapsed / self._done * (self._total - self._done))} left"

    def _draw(self) -> None:
        text = f"{self._label} {self._percent()} {self._done}/{self._total} {self._times()}"
        width = _columns(self._stream) - 1
        room = min(30, width - len(text) - 3)
        share = min(self._done / self._total, 1.0) if self._total else 1.0
        bar = f"[{'#' * int(share * room):<{room}}] " if room >= 5 else ""
        self._write("\r" + (bar + text)[:width].ljust(width))

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def _columns(stream: TextIO) -> int:
    """Width of the stream's own terminal: standard output may well go to a file while this is shown."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):  # io.UnsupportedOperation is both
        return 80


def _thinned(points: Sequence[Point], transitions: Sequence[Transition]) -> list[Point]:
    """At most 25 points: evenly spread ones, and those about each transition unless these are too many."""
    if len(points) <= MAX_ROWS:
        return list(points)
    marks = {step for each in transitions for step in (each.onset, each.end, each.step_low, each.step_high)}
    chosen = {i for i, point in enumerate(points) if point.step in marks} | {0, len(points) - 1}
    if len(chosen) > MAX_ROWS - 10:
        chosen = {0, len(points) - 1}
    stride = -(-len(points) // (MAX_ROWS - len(chosen)))
    chosen |= set(range(0, len(points), stride))
    return [points[i] for i in sorted(chosen)]


def _why(point: Point) -> str:
    """The first words of the first reason: enough to look it up."""
    return point.reasons[0].split(":")[0].split(" (")[0] if point.reasons else "unreliable"


def finite_values(plain: dict[str, Any]) -> dict[str, Any]:
    """Numbers that are not finite become None, as JSON has none.

    Args:
        plain: by name.
    """
    return {name: finite(value) for name, value in plain.items()}


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 9.95 else f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"


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
