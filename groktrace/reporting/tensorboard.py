"""TensorBoard event files: the LLC curve with its band, its transitions as labelled vertical lines, and the rest."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from groktrace.analysis.detection import Transition
from groktrace.analysis.grokking import Grokking
from groktrace.analysis.trajectory import Trajectory
from groktrace.errors import GroktraceError
from groktrace.reporting.console import by_accuracy, number, settings_json, settings_line, transition_rows
from groktrace.reporting.figures import shown_curve, trajectory_figure
from groktrace.reporting.remarks import none_found, remarks

CURVE = "llc/mean"
CURVE_RUN = "trajectory"
# The ending of the event files that are ours to replace.
SUFFIX = ".groktrace"
_BAND = ["Margin", [CURVE, "llc/lower", "llc/upper"]]
_TITLES = {"llc": "local learning coefficient λ̂, 95 %", "llc_centred": "centred learning coefficient λ_c, 95 %"}
# A line needs its points at steps of their own: those sharing one collapse. Several at the top, so that smoothing does
# not shorten it; in short runs fewer, so that it stays upright.
_LINE_POINTS = range(4, 13)
# What to add to TensorBoard's address: a colour for each curve, and for each kind of marker (rise, fall, their labels).
COLOURS = "?runColorGroup=regex%3A(.*trajectory%7Cmemorisation%7Cgeneralisation%7Ccomplexification%7Csimplification)"


# Scalars are kept in single precision; what is larger would be shown as infinite.
_LARGEST = float(np.finfo(np.float32).max)


def write_events(trajectory: Trajectory, transitions: Sequence[Transition], grokking: Grokking, logdir: Path) -> None:
    """Write the result for TensorBoard, in place of what an earlier call wrote to the same folder.

    `llc/mean` is the curve on which transitions are found: λ_c, or λ̂ where there is no λ_c; `llc/raw` (λ̂) and
    `llc/centred` (λ_c) hold both in full.
    The figure is left out where matplotlib is not installed.

    Args:
        trajectory: λ̂ along the run.
        transitions: found in it; each becomes a run of its own, which draws a line in λ's and the accuracies' charts.
        grokking: measured on it.
        logdir: where the event files go; what others wrote there stays.
    """
    _remove_own(logdir)
    value, error = shown_curve(trajectory)
    with _writer(logdir / CURVE_RUN) as writer:
        writer.add_custom_scalars({"LLC": {_TITLES[trajectory.curve.name]: _BAND}})
        steps = [point.step for point in trajectory.points]
        columns = {
            CURVE: value,
            "llc/lower": value - 1.96 * error,
            "llc/upper": value + 1.96 * error,
            "llc/raw": trajectory.column("llc"),
            "llc/centred": trajectory.column("llc_centred"),
            "loss/train": trajectory.column("train_loss"),
            "loss/val": trajectory.column("val_loss"),
            "accuracy/train": trajectory.column("train_accuracy"),
            "accuracy/val": trajectory.column("val_accuracy"),
            "sharpness/hessian_trace": trajectory.column("hessian_trace"),
            "sharpness/hessian_trace_stderr": trajectory.column("hessian_trace_stderr"),
            "sharpness/hessian_top": trajectory.column("hessian_top"),
        }
        # All group names but one come after "llc": TensorBoard unfolds only the first two groups by name.
        for group, attribute in (("logged", "metrics"), ("sampler", "diagnostics")):
            records = [getattr(point, attribute) for point in trajectory.points]
            for name in sorted({name for record in records for name in record}):
                found = [record.get(name) for record in records]
                columns[f"{group}/{name}"] = np.array([np.nan if x is None else x for x in found], dtype=float)
        for tag, column in columns.items():
            for step, measured in zip(steps, column, strict=True):
                if abs(measured) <= _LARGEST:
                    writer.add_scalar(tag, float(measured), step)
        writer.add_text("transitions", _table(trajectory, transitions, grokking))
        writer.add_text("settings", f"{settings_line(trajectory)}\n\n```\n{settings_json(trajectory)}\n```")
        try:
            figure = trajectory_figure(trajectory, transitions, grokking)
        except GroktraceError:  # matplotlib is an extra; the charts do without
            pass
        else:
            writer.add_image("trajectory", _pixels(figure), steps[-1] if steps else 0, dataformats="HWC")
    if trajectory.reference is not None and steps:
        with _writer(logdir / f"reference λ {number(trajectory.reference.llc)}") as writer:
            for step in sorted({steps[0], steps[-1]}):
                for tag in (CURVE, "llc/lower", "llc/upper"):
                    writer.add_scalar(tag, trajectory.reference.llc, step)
    known = value[np.isfinite(value)]
    span = steps[-1] - steps[0] if steps else 0
    count = min(max(span // 200, _LINE_POINTS[0]), _LINE_POINTS[-1])
    accuracies = [tag for tag in ("accuracy/train", "accuracy/val") if np.isfinite(columns[tag]).any()]
    for place, each in enumerate(transitions, 1):
        extent = (known.min(), known.max()) if len(known) else sorted((each.llc_before, each.llc_after))
        # All three of the LLC's, for the chart with the band asks for them.
        lines = dict.fromkeys((CURVE, "llc/lower", "llc/upper"), extent) | dict.fromkeys(accuracies, (0.0, 1.0))
        with _writer(logdir / _run_name(each, place, len(transitions))) as writer:
            for i in range(count):
                for tag, (low, high) in lines.items():
                    writer.add_scalar(tag, float(high if i else low), each.step + i)


def _writer(folder: Path) -> SummaryWriter:
    # The purge makes a TensorBoard that is already open forget what it read from the files that are replaced.
    return SummaryWriter(str(folder), purge_step=0, filename_suffix=SUFFIX)


def _run_name(transition: Transition, place: int, count: int) -> str:
    """A transition's name in TensorBoard's list of runs, which is in the order of the names."""
    label = transition.label or transition.kind
    interval = f"[{transition.step_low}, {transition.step_high}]"
    name = f"transition {place:0{len(str(count))}d}: {label} @ {transition.step} {interval}"
    return name.replace(":", ",") if os.name == "nt" else name  # no colons in names of folders there


def _remove_own(logdir: Path) -> None:
    """Remove the event files of an earlier call, and the folders that this leaves empty."""
    for path in logdir.glob(f"*/events.out.tfevents.*{SUFFIX}"):
        if not path.parent.is_symlink():
            path.unlink()
            if not any(path.parent.iterdir()):
                path.parent.rmdir()


def _table(trajectory: Trajectory, transitions: Sequence[Transition], grokking: Grokking) -> str:
    """The transitions as a Markdown table, with what each label rests on below."""
    parts = [] if transitions else [none_found(trajectory)]
    if transitions:
        heading, *rows = transition_rows(transitions)
        parts = ["\n".join("| " + " | ".join(row) + " |" for row in [heading, ["---"] * len(heading), *rows])]
        parts += [f"Step {each.step}: {each.evidence}." for each in transitions if each.evidence]
    return "\n\n".join([*parts, *remarks(trajectory), by_accuracy(grokking)])


def _pixels(figure: object) -> np.ndarray:
    """The figure as [height, width, 3] bytes."""
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3]
