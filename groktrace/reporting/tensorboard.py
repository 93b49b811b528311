"""TensorBoard event files: the LLC curve with its band, its transitions as labelled vertical lines, and the rest."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from groktrace.analysis.detection import Transition
from groktrace.errors import GroktraceError
from groktrace.reporting.console import by_accuracy, settings_json, settings_line, transition_rows
from groktrace.reporting.figure import pixels, trajectory_figure
from groktrace.reporting.numbers import number
from groktrace.reporting.series import BAND, CURVE, CURVE_TAG, QUANTITIES, Events, Series
from groktrace.run import layout

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from groktrace.reporting.groups import Group

CURVE_RUN = "trajectory"
SUFFIX = layout.EVENTS_SUFFIX
_TITLES = {"llc": "local learning coefficient λ̂, 95 %", "llc_centred": "centred learning coefficient λ_c, 95 %"}
# A line needs its points at steps of their own: those sharing one collapse. Several at the top, so that smoothing does
# not shorten it; in short runs fewer, so that it stays upright.
_LINE_POINTS = range(4, 13)
# What to add to TensorBoard's address: a colour for each curve, and for each kind of marker (rise, fall, their labels).
COLOURS = "?runColorGroup=regex%3A(.*trajectory%7Cmemorisation%7Cgeneralisation%7Ccomplexification%7Csimplification)"


# Scalars are kept in single precision; what is larger would be shown as infinite.
_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class TensorBoardReporter:
    """Writes event files, in place of those that an earlier call wrote to the same folder; others' files stay.

    The curve on which transitions are found, λ_c or else λ̂, is `grokking/llc`, with validation accuracy beside it; λ̂
    and λ_c in full are `llc/raw` and `llc/centred`. Each transition becomes a run of its own, which draws a line in
    their charts. The figure is left out where matplotlib is not installed.

    Attributes:
        folder: of the event files.
    """

    folder: str = layout.TENSORBOARD_FOLDER

    def report(self, series: Series, events: Events, place: Path) -> None:
        """Write the files; see `Reporter`."""
        logdir = place / self.folder
        _remove_own(logdir)
        _write_trajectory(series, events, logdir)
        curve, steps = series[CURVE], series.steps.tolist()
        reference = series.trajectory.reference
        if reference is not None and steps:
            with _writer(logdir / f"reference λ {number(reference.llc)}") as writer:
                for step in sorted({steps[0], steps[-1]}):
                    for tag in (curve.tag, *BAND):
                        writer.add_scalar(tag, reference.llc, step)
        known = curve.values[np.isfinite(curve.values)]
        accuracies = [quantity.tag for quantity in series if quantity.axis == "accuracy" and quantity.known]
        found = events.transitions
        for position, transition in enumerate(found, 1):
            extent = (known.min(), known.max()) if len(known) else sorted((transition.llc_before, transition.llc_after))
            # All three of the LLC's, for the chart with the band asks for them.
            lines = dict.fromkeys((curve.tag, *BAND), extent) | dict.fromkeys(accuracies, (0.0, 1.0))
            _write_line(logdir / _run_name(transition, position, len(found)), transition.step, lines, steps)


def write_mean(group: "Group", logdir: Path) -> Path:
    """Write the mean of several runs as a run beside them, its transitions as lines like theirs.

    Args:
        group: the runs.
        logdir: the folder that TensorBoard is pointed at.

    Returns:
        The folder of the mean, in which nothing but what an earlier call wrote is replaced.
    """
    place = logdir / f"mean of {group.name}".replace("*", "…").replace("/", "-").replace(os.sep, "-")
    _remove_own(place)
    curve = group.mean(CURVE)
    series = group.members[0][1]
    with _writer(place / CURVE_RUN) as writer:
        margin = ["Margin", [CURVE_TAG, *BAND]]
        writer.add_custom_scalars({"LLC": {"mean over the runs, and standard deviation": margin}})
        columns = {series[name].tag: (mean.steps, mean.value) for name in QUANTITIES if (mean := group.mean(name)).runs}
        columns |= dict(zip(BAND, ((curve.steps, curve.low), (curve.steps, curve.high)), strict=True))
        for tag, (steps, values) in columns.items():
            for step, value in zip(steps.tolist(), values.tolist(), strict=True):
                if abs(value) <= _LARGEST:
                    writer.add_scalar(tag, value, step)
        writer.add_text("runs", "\n".join(f"- {name}" for name, *_ in group.members))
    known = curve.value[np.isfinite(curve.value)]
    for position, transition in enumerate(group.transitions, 1):
        label = (transition.label or transition.kind).replace("/", "-")
        name = f"transition {position}: {label} @ {transition.step.text()} ({transition.runs} of {len(group)})"
        extent = (known.min(), known.max()) if len(known) else (0.0, 1.0)
        lines = dict.fromkeys((CURVE_TAG, *BAND), extent) | {
            tag: (0.0, 1.0) for tag in columns if tag.endswith("accuracy")
        }
        folder = place / (name.replace(":", ",") if os.name == "nt" else name)
        _write_line(folder, round(transition.step.mean), lines, curve.steps.tolist())
    return place


def _write_line(folder: Path, step: int, lines: dict[str, Any], steps: list[int]) -> None:
    """An upright line at a step as a run of its own, from the lower to the upper end that is given for each tag."""
    span = steps[-1] - steps[0] if steps else 0
    with _writer(folder) as writer:
        for i in range(min(max(span // 200, _LINE_POINTS[0]), _LINE_POINTS[-1])):
            for tag, (low, high) in lines.items():
                writer.add_scalar(tag, float(high if i else low), step + i)


def _write_trajectory(series: Series, events: Events, logdir: Path) -> None:
    """All scalars, the texts and the figure."""
    trajectory, curve = series.trajectory, series[CURVE]
    with _writer(logdir / CURVE_RUN) as writer:
        margin = ["Margin", [curve.tag, *BAND]]
        writer.add_custom_scalars({"LLC": {_TITLES[trajectory.curve.name]: margin}})
        columns = {tag: column for quantity in series for tag, column in quantity.charts().items()}
        for tag, column in columns.items():
            for step, measured in zip(series.steps.tolist(), column.tolist(), strict=True):
                if abs(measured) <= _LARGEST:
                    writer.add_scalar(tag, measured, step)
        writer.add_text("transitions", _table(events))
        writer.add_text("settings", f"{settings_line(trajectory)}\n\n```\n{settings_json(trajectory)}\n```")
        try:
            figure = trajectory_figure(series, events)
        except GroktraceError:  # matplotlib is an extra; the charts do without
            pass
        else:
            last = int(series.steps[-1]) if len(series.steps) else 0
            writer.add_image("trajectory", pixels(figure), last, dataformats="HWC")


def _writer(folder: Path) -> "SummaryWriter":
    from torch.utils.tensorboard import SummaryWriter  # only where it is used: it takes seconds

    # The purge makes a TensorBoard that is already open forget what it read from the files that are replaced.
    return SummaryWriter(str(folder), purge_step=0, filename_suffix=SUFFIX)


def _run_name(transition: Transition, number: int, count: int) -> str:
    """A transition's name in TensorBoard's list of runs, which is in the order of the names."""
    label = transition.label or transition.kind
    interval = f"[{transition.step_low}, {transition.step_high}]"
    name = f"transition {number:0{len(str(count))}d}: {label} @ {transition.step} {interval}"
    name = name.replace("/", "-").replace(os.sep, "-")  # labels may be anyone's
    return name.replace(":", ",") if os.name == "nt" else name  # no colons in names of folders there


def _remove_own(logdir: Path) -> None:
    """Remove the event files of an earlier call, and the folders that this leaves empty."""
    for path in logdir.glob(f"*/events.out.tfevents.*{SUFFIX}"):
        if not path.parent.is_symlink():
            path.unlink()
            if not any(path.parent.iterdir()):
                path.parent.rmdir()


def _table(events: Events) -> str:
    """The transitions as a Markdown table, with what each label rests on below."""
    found, parts = events.transitions, []
    if found:
        heading, *rows = transition_rows(found)
        parts = ["\n".join("| " + " | ".join(row) + " |" for row in [heading, ["---"] * len(heading), *rows])]
    parts += [f"Step {transition.step}: {transition.evidence}." for transition in found if transition.evidence]
    return "\n\n".join([*parts, *events.remarks, by_accuracy(events.grokking)])
