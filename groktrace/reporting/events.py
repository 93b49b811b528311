"""What a followed recording tells as it goes on: lines for people, or one JSON object a line."""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any, TextIO

from groktrace.analysis.detection import EarlyWarning
from groktrace.analysis.follow import Announcement, Event, RecordingEnded, ScaleChanged
from groktrace.analysis.results.trajectory import SYMBOLS, Point, Trajectory
from groktrace.reporting.numbers import number

# TensorBoard's files are written anew as a whole, so not after every snapshot.
WRITE_SECONDS = 30.0


def show_events(
    events: Iterator[Event], write_logs: Callable[[Trajectory], Any], as_json: bool, stream: TextIO
) -> Trajectory:
    """Print what comes, and keep TensorBoard's files up to date; returns the final trajectory.

    Args:
        events: of `groktrace.analysis.follow.follow`.
        write_logs: writes TensorBoard's files; called every half minute, and when a transition is announced.
        as_json: whether to print one JSON object a line.
        stream: where to print.

    Raises:
        RuntimeError: the events have no end.
    """
    written, due = None, False
    for event in events:
        if isinstance(event, Trajectory):
            if due or written is None or time.monotonic() - written > WRITE_SECONDS:
                write_logs(event)
                written, due = time.monotonic(), False
            continue
        due = due or isinstance(event, Announcement)
        line = json.dumps(as_line(event), allow_nan=False) if as_json else as_text(event)
        if line:
            print(line, file=stream, flush=True)
        if isinstance(event, RecordingEnded):
            return event.trajectory
    raise RuntimeError("the events of a recording have no end")


def as_line(event: ScaleChanged | Point | Announcement | EarlyWarning | RecordingEnded) -> dict[str, Any]:
    """An event as one JSON object; of an end without its trajectory.

    Args:
        event: of `groktrace.analysis.follow.follow`.
    """
    if isinstance(event, Announcement):
        return {"event": event.kind, "number": event.number, **event.transition.to_dict()}
    if isinstance(event, EarlyWarning):
        return {"event": "warning", "step": event.step, "rate": event.rate, "stderr": event.stderr}
    if isinstance(event, RecordingEnded):
        return {"event": "end", "reason": event.reason}
    if isinstance(event, ScaleChanged):
        return {"event": "scale", **asdict(event)}
    return {"event": "point", **event.to_dict()}


def as_text(event: ScaleChanged | Point | Announcement | EarlyWarning | RecordingEnded) -> str:
    """An event in words; of points nothing, since TensorBoard shows them.

    Args:
        event: of `groktrace.analysis.follow.follow`.
    """
    if isinstance(event, ScaleChanged):
        follows = "" if event.curvature is None else " where the top curvature is " + number(event.curvature)
        return f"measuring at nβ = {number(event.nbeta)}{follows}, γ = {number(event.localization)}"
    if isinstance(event, RecordingEnded):
        return f"{'recording closed' if event.reason == 'closed' else 'no new snapshot for too long'}; the whole run:\n"
    if isinstance(event, Point):
        return ""
    if isinstance(event, EarlyWarning):
        rate = f"{100 * event.rate:.2g} ± {100 * event.stderr:.2g} %"
        return f"warning: at step {event.step} λ falls, by {rate} each time the training grows by a factor of e"
    transition = event.transition
    if event.kind == "withdrawn":
        return f"transition {event.number} at step {transition.step}: withdrawn, the curve no longer shows it"
    news = "" if event.kind == "transition" else "revised: "
    levels = f"{SYMBOLS.get(transition.curve, 'λ')} {number(transition.llc_before)} → {number(transition.llc_after)}"
    return (
        f"transition {event.number}: {news}{transition.name} at step {transition.step} "
        f"[{transition.step_low}, {transition.step_high}], {levels}"
    )
