"""Text for people and JSON for programs; progress that suits a terminal and a log file alike."""

import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, TextIO

from groktrace.analysis.grokking import Grokking
from groktrace.analysis.trajectory import Point, Trajectory
from groktrace.analysis.transitions import Transition

MAX_ROWS = 25
HEARTBEAT_SECONDS = 30.0


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
        "trajectory": plain["points"],
        "transitions": [transition.to_dict() for transition in transitions],
        "grokking": grokking.to_dict(),
        "unreadable": plain["unreadable"],
    }


def transitions_table(transitions: Sequence[Transition], grokking: Grokking) -> str:
    """The transitions as an aligned table, one a line, with what each label rests on below.

    Args:
        transitions: in step order.
        grokking: of the same run.
    """
    lines = []
    if transitions:
        rows = [("transition", "label", "step", "90 % interval", "onset - end", "λ before", "after", "change")]
        rows += [
            (
                each.kind,
                each.label or "-",
                str(each.step),
                f"{each.step_low} - {each.step_high}",
                f"{each.onset} - {each.end}",
                _number(each.llc_before),
                _number(each.llc_after),
                f"{each.delta_llc:+.4g} ± {each.stderr:.2g}",
            )
            for each in transitions
        ]
        lines += _aligned(rows)
        lines += ["", *(f"step {each.step}: {each.evidence}" for each in transitions if each.evidence)]
    else:
        lines.append("No transition found.")
    known = [
        f"memorised at step {grokking.memorised_at}" if grokking.memorised_at is not None else None,
        f"generalised at step {grokking.generalised_at}" if grokking.generalised_at is not None else None,
        f"grokking severity {grokking.severity:.3f}" if grokking.severity is not None else None,
    ]
    if any(known):
        lines += ["", "By accuracy: " + ", ".join(part for part in known if part) + "."]
    return "\n".join(lines)


def summary(trajectory: Trajectory, transitions: Sequence[Transition], grokking: Grokking) -> str:
    """Settings, snapshots and transitions as text.

    Args:
        trajectory: λ̂ along the run.
        transitions: found in it.
        grokking: measured on it.
    """
    points = _thinned(trajectory.points, transitions)
    rows = [("step", "λ̂", "±", "λ_c", "±", "train loss", "acc", "val loss", "acc", "")]
    for point in points:
        numbers = (point.llc, point.stderr, point.llc_centred, point.stderr_centred, point.train_loss)
        more = (point.train_accuracy, point.val_loss, point.val_accuracy)
        rows.append(
            (str(point.step), *(_number(value) for value in (*numbers, *more)), "" if point.reliable else _why(point))
        )
    hidden = len(trajectory.points) - len(points)
    lines = [settings_line(trajectory), "", *_aligned(rows)]
    if hidden:
        lines.append(f"({hidden} of {len(trajectory.points)} snapshots not shown; --json has all)")
    return "\n".join([*lines, "", transitions_table(transitions, grokking)])


def settings_line(trajectory: Trajectory) -> str:
    """What the trajectory was measured with, in one line."""
    parts = [
        f"{len(trajectory.points)} snapshots",
        f"n = {trajectory.n}" if trajectory.n is not None else None,
        f"method {trajectory.method}" if trajectory.method else None,
        f"nβ = {_number(trajectory.nbeta)}" if trajectory.nbeta is not None else None,
        f"γ = {_number(trajectory.localization)}" if trajectory.localization is not None else None,
        f"resolution {trajectory.resolution:g}" if trajectory.resolution is not None else None,
        f"locality {trajectory.locality:g}" if trajectory.locality is not None else None,
    ]
    where = f"{trajectory.run}: " if trajectory.run else ""
    return where + ", ".join(part for part in parts if part)


class Progress:
    """Progress of long work: a bar on a terminal, elsewhere one line every 30 seconds.

    Args:
        total: how much there is to do.
        label: what is being done.
        stream: where to show it.
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

    def __enter__(self) -> "Progress":
        if self._terminal:
            self._draw()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if self._terminal:
            self._draw()
            self._write("\n")
        elif error is None and self._done >= self._total:
            self._write(f"{self._label}: {self._total} done in {_duration(self._clock() - self._began)}\n")

    def advance(self, count: int = 1) -> None:
        """Tell that `count` more are done."""
        self._done += count
        now = self._clock()
        if self._terminal:
            if now - self._shown >= 0.05 or self._done >= self._total:
                self._shown = now
                self._draw()
        elif now - self._shown >= HEARTBEAT_SECONDS and self._done < self._total:
            self._shown = now
            self._write(f"{self._label}: {self._done} of {self._total}, {self._times()}\n")

    def _times(self) -> str:
        elapsed = self._clock() - self._began
        if not self._done or self._done >= self._total:
            return _duration(elapsed)
        return f"{_duration(elapsed)}, about {_duration(elapsed / self._done * (self._total - self._done))} left"

    def _draw(self) -> None:
        share = self._done / self._total if self._total else 1.0
        text = f"{self._label} {self._done}/{self._total} {self._times()}"
        width = shutil.get_terminal_size().columns - 1
        room = min(30, width - len(text) - 3)
        bar = f"[{'#' * int(share * room):<{room}}] " if room >= 5 else ""
        self._write("\r" + (bar + text)[:width].ljust(width))

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def _thinned(points: Sequence[Point], transitions: Sequence[Transition]) -> list[Point]:
    """At most about 25 points: evenly spread ones, and those at each transition's onset, middle and end."""
    if len(points) <= MAX_ROWS:
        return list(points)
    marks = {step for each in transitions for step in (each.onset, each.end, each.step_low, each.step_high)}
    chosen = {i for i, point in enumerate(points) if point.step in marks} | {0, len(points) - 1}
    stride = -(-len(points) // max(MAX_ROWS - len(chosen), 5))
    chosen |= set(range(0, len(points), stride))
    return [points[i] for i in sorted(chosen)]


def _why(point: Point) -> str:
    """The first words of the first reason: enough to look it up."""
    return point.reasons[0].split(":")[0].split(" (")[0] if point.reasons else "unreliable"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.3g}"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 9.95 else f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as lines of left-aligned words and right-aligned numbers."""
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
