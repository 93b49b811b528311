"""TensorBoard event files: the LLC curve with its band, its transitions as labelled vertical lines, and the rest."""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from groktrace.analysis.grokking import Grokking
from groktrace.analysis.trajectory import Trajectory
from groktrace.analysis.transitions import Transition
from groktrace.errors import GroktraceError
from groktrace.reporting.console import settings_json, settings_line
from groktrace.reporting.figures import shown_curve, trajectory_figure

CURVE = "llc/mean"
CURVE_RUN = "trajectory"
# Which folders below the log folder are ours to replace.
OWNED_FILE = "groktrace.json"
_LAYOUT = {"LLC": {"local learning coefficient, 95 %": ["Margin", [CURVE, "llc/lower", "llc/upper"]]}}
# A line needs its points at steps of their own: those sharing one collapse. Several at the top, so that smoothing does
# not shorten it.
_LINE_POINTS = 12


def write_events(trajectory: Trajectory, transitions: Sequence[Transition], grokking: Grokking, logdir: Path) -> None:
    """Write the result for TensorBoard, in place of what an earlier call wrote to the same folder.

    `llc/mean` is λ̂ where it is reliable and the centred λ_c elsewhere; `llc/raw` and `llc/centred` hold both in full.
    The figure is left out where matplotlib is not installed.

    Args:
        trajectory: λ̂ along the run.
        transitions: found in it; each becomes a run of its own, which draws a line in the chart of `llc/mean`.
        grokking: measured on it.
        logdir: where the event files go; what others wrote there stays.
    """
    _remove_own(logdir)
    names = [_run_name(each) for each in transitions]
    logdir.mkdir(parents=True, exist_ok=True)
    (logdir / OWNED_FILE).write_text(json.dumps([CURVE_RUN, *names]) + "\n")
    value, error = shown_curve(trajectory)
    with SummaryWriter(str(logdir / CURVE_RUN)) as writer:
        writer.add_custom_scalars(_LAYOUT)
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
        }
        for group, attribute in (("logged", "metrics"), ("sampler", "diagnostics")):
            records = [getattr(point, attribute) for point in trajectory.points]
            for name in sorted({name for record in records for name in record}):
                found = [record.get(name) for record in records]
                columns[f"{group}/{name}"] = np.array([np.nan if x is None else x for x in found], dtype=float)
        for tag, column in columns.items():
            for step, number in zip(steps, column, strict=True):
                if np.isfinite(number):
                    writer.add_scalar(tag, float(number), step)
        writer.add_text("transitions", _table(transitions, grokking))
        writer.add_text("settings", f"{settings_line(trajectory)}\n\n```\n{settings_json(trajectory)}\n```")
        try:
            figure = trajectory_figure(trajectory, transitions, grokking)
        except GroktraceError:  # matplotlib is an extra; the charts do without
            pass
        else:
            writer.add_image("trajectory", _pixels(figure), steps[-1] if steps else 0, dataformats="HWC")
    known = value[np.isfinite(value)]
    for each, name in zip(transitions, names, strict=True):
        with SummaryWriter(str(logdir / name)) as writer:
            low, high = float(known.min()), float(known.max())
            for i in range(_LINE_POINTS):
                for tag in (CURVE, "llc/lower", "llc/upper"):  # all three, for the chart with the band asks for them
                    writer.add_scalar(tag, low if i == 0 else high, each.step + i)


def _run_name(transition: Transition) -> str:
    """A transition's label in TensorBoard's list of runs, safe as a folder name everywhere."""
    label = transition.label or transition.kind
    text = f"{label} at {transition.step} ({transition.step_low}-{transition.step_high})"
    return re.sub(r"[^\w ().-]", "_", text)


def _remove_own(logdir: Path) -> None:
    """Remove the event files of an earlier call, and only those."""
    try:
        names = json.loads((logdir / OWNED_FILE).read_text())
    except (OSError, ValueError):
        return
    for name in names if isinstance(names, list) else []:
        # A name that leads out of the folder is not ours, whatever the file says.
        if isinstance(name, str) and Path(name).name == name and not (logdir / name).is_symlink():
            for path in (logdir / name).glob("events.out.tfevents.*"):
                path.unlink()
            if (logdir / name).is_dir() and not any((logdir / name).iterdir()):
                shutil.rmtree(logdir / name)


def _table(transitions: Sequence[Transition], grokking: Grokking) -> str:
    """The transitions as a Markdown table."""
    if not transitions:
        return "No transition found."
    lines = [
        "| kind | label | step | 90 % interval | onset – end | λ before | after | change | evidence |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {each.kind} | {each.label or '–'} | {each.step} | {each.step_low} – {each.step_high} "
        f"| {each.onset} – {each.end} | {each.llc_before:.4g} | {each.llc_after:.4g} "
        f"| {each.delta_llc:+.4g} ± {each.stderr:.2g} | {each.evidence} |"
        for each in transitions
    ]
    lines += ["", f"By accuracy: memorised at {grokking.memorised_at}, generalised at {grokking.generalised_at}."]
    return "\n".join(lines)


def _pixels(figure: object) -> np.ndarray:
    """The figure as [height, width, 3] bytes."""
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3]
