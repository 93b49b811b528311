"""The trajectory as a figure, for files and for TensorBoard."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from groktrace.analysis.detection import Transition
from groktrace.analysis.grokking import THRESHOLD, Grokking
from groktrace.analysis.trajectory import Trajectory
from groktrace.errors import GroktraceError, SettingsError
from groktrace.reporting.console import number
from groktrace.reporting.remarks import partial

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".pdf", ".svg")
# Okabe & Ito: told apart by colour-blind readers; the line styles tell them apart in grey.
LLC, RISE, FALL, TRAIN, VAL = "#0072B2", "#E69F00", "#009E73", "#444444", "#CC79A7"
TRACE, TOP = "#D55E00", "#56B4E9"
DPI = 160
SMALL = 8.5  # size of legend and labels, in points


def shown_curve(trajectory: Trajectory) -> tuple[np.ndarray, np.ndarray]:
    """The curve that charts show: that on which transitions are found, see `Trajectory.curve`.

    Returns:
        Values and standard errors, [T] each; NaN at points that are not used.
    """
    return trajectory.curve.value, trajectory.curve.error


def curve_label(names: set[str]) -> str:
    """What the axis of λ is called.

    Args:
        names: of the curves along it.
    """
    if names == {"llc_centred"}:
        return r"centred learning coefficient $\lambda_c$"
    return r"local learning coefficient $\hat\lambda$" if names == {"llc"} else r"learning coefficient $\lambda$"


def check_suffix(path: Path) -> None:
    """Refuse files of other kinds than figures are saved as.

    Raises:
        SettingsError: it is one.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise SettingsError(f"output: expected a file ending in {', '.join(SUFFIXES)}, got '{path}'.")


def empty_figure(height: float) -> "Figure":
    """A figure of the usual width that needs no display.

    Args:
        height: in inches.

    Raises:
        GroktraceError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as failure:
        raise GroktraceError("figures need matplotlib: pip install 'groktrace[plot]'") from failure
    figure = Figure(figsize=(8, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(trajectory: Trajectory, transitions: Sequence[Transition], grokking: Grokking, path: Path) -> None:
    """Draw the trajectory into a file.

    Args:
        trajectory: λ̂ along the run.
        transitions: found in it.
        grokking: measured on it.
        path: a .png, .pdf or .svg file.

    Raises:
        SettingsError: another kind of file.
        GroktraceError: matplotlib is not installed.
    """
    check_suffix(path)
    trajectory_figure(trajectory, transitions, grokking).savefig(path)


def trajectory_figure(trajectory: Trajectory, transitions: Sequence[Transition], grokking: Grokking) -> "Figure":
    """λ with its error band and transitions above, accuracies and losses below; where measured, curvature between.

    Args:
        trajectory: λ̂ along the run.
        transitions: found in it.
        grokking: measured on it.

    Raises:
        GroktraceError: matplotlib is not installed.
    """
    curved = bool(np.isfinite(trajectory.column("hessian_trace")).any())
    figure = empty_figure(7.5 if curved else 6)
    panels = figure.subplots(3 if curved else 2, 1, sharex=True, height_ratios=[3, 1.5, 2] if curved else [3, 2])
    upper, lower = panels[0], panels[-1]
    steps = trajectory.column("step")
    if log_spaced(steps):
        lower.set_xscale("symlog", linthresh=max(1.0, float(steps[steps > 0].min())))
    lower.set_xlabel("training step")
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.02)
        axes.grid(axis="y", color="0.92", lw=0.6)
        axes.set_axisbelow(True)
    handles = [
        *_draw_llc(upper, trajectory, steps),
        *_draw_thresholds(lower, grokking),
        *_draw_transitions(panels, transitions),
        *(_draw_sharpness(panels[1], trajectory, steps) if curved else []),
        *_draw_training(lower, trajectory, steps),
    ]
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=SMALL)
    _name_transitions(figure, upper, transitions)
    if said := partial(trajectory):
        figure.suptitle(said.split(";")[0], fontsize=SMALL, color="0.4", ha="left", x=0.05)
    return figure


def _draw_llc(axes: "Axes", trajectory: Trajectory, steps: np.ndarray) -> list[Any]:
    curve = trajectory.curve
    value, error, known = curve.value, curve.error, np.isfinite(curve.value)
    raw = trajectory.column("llc")
    reliable = trajectory.column("reliable") > 0
    symbol = r"$\lambda_c$" if curve.name == "llc_centred" else r"$\hat\lambda$"
    low, high = value - 1.96 * error, value + 1.96 * error
    axes.fill_between(steps, low, high, where=known, color=LLC, alpha=0.25, lw=0)
    many = len(steps) > 200
    if not many:
        # A band has no width to be seen at a point that stands alone.
        axes.vlines(steps[known], low[known], high[known], color=LLC, alpha=0.5, lw=1)
    axes.plot(steps[known], value[known], color=LLC, lw=1.0 if many else 1.5)
    hollow = {"color": LLC, "mfc": "white", "ls": "", "ms": 2.5 if many else 4.5}
    handles = []
    for chosen, look, label in (
        (reliable, {"marker": "o", "ls": "", "color": LLC, "ms": 1.5 if many else 3.5}, f"{symbol} with 95 % band"),
        (~reliable & ~curve.doubtful, {"marker": "o", **hollow}, f"{symbol}, not at a minimum"),
        (~reliable & curve.doubtful, {"marker": "s", **hollow}, f"{symbol}, unreliable"),
    ):
        if (known & chosen).any():
            handles += axes.plot(steps[known & chosen], value[known & chosen], **look, label=label)
    axes.set_ylabel(curve_label({curve.name}))
    left_over = np.isfinite(raw) & ~known
    reference = trajectory.reference
    if reference is not None:
        label = rf"reference $\lambda$ = {number(reference.llc)}"
        label += f" (rank {reference.rank} / 2)" if reference.source == "jacobian" else ""
        handles.append(axes.axhline(reference.llc, color="0.35", ls="-.", lw=1.2, label=label))
    trusted = known & ~curve.doubtful if (known & ~curve.doubtful).any() else known
    frame = np.concatenate([value[trusted], low[reliable & trusted], high[reliable & trusted]])
    frame = frame[np.isfinite(frame)] if known.any() else raw[left_over]
    if left_over.any():
        handles += axes.plot(steps[left_over], raw[left_over], marker="D", **hollow, label=r"$\hat\lambda$, unreliable")
    if reference is not None:
        frame = np.append(frame, reference.llc)
    if len(frame):
        # Values that are not to be trusted must not squash those that are.
        room = 0.08 * float(np.ptp(frame)) or 0.1 * abs(float(frame[0])) or 1.0
        axes.set_ylim(float(frame.min()) - room, float(frame.max()) + room)
    else:
        axes.text(0.5, 0.5, "no snapshot has a usable λ̂", transform=axes.transAxes, ha="center")
    return handles


def _draw_sharpness(axes: "Axes", trajectory: Trajectory, steps: np.ndarray) -> list[Any]:
    value, error = trajectory.column("hessian_trace"), trajectory.column("hessian_trace_stderr")
    known = np.isfinite(value)
    axes.fill_between(steps, value - 1.96 * error, value + 1.96 * error, where=known, color=TRACE, alpha=0.25, lw=0)
    handles = axes.plot(steps[known], value[known], "o-", color=TRACE, lw=1.5, ms=2, label="Hessian's trace, 95 % band")
    axes.set_ylabel("Hessian's trace")
    top = trajectory.column("hessian_top")
    known_top = np.isfinite(top)
    right = axes.twinx()
    handles += right.plot(steps[known_top], top[known_top], ls="--", color=TOP, lw=1.5, label="its largest eigenvalue")
    right.set_ylabel("largest eigenvalue")
    right.spines[["top"]].set_visible(False)
    for panel, column in ((axes, value[known]), (right, top[known_top])):
        if len(column) and column.min() > 0 and column.max() > 20 * column.min():
            panel.set_yscale("log")
    return handles


def _draw_transitions(panels: Sequence["Axes"], transitions: Sequence[Transition]) -> list[Any]:
    from matplotlib.patches import Patch

    for each in transitions:
        colour, style = _look(each)
        for axes in panels:
            axes.axvspan(each.onset, each.end, color=colour, alpha=0.10, lw=0)
            axes.axvspan(each.step_low, each.step_high, color=colour, alpha=0.25, lw=0)
            axes.axvline(each.step, color=colour, ls=style, lw=1.5)
    if not transitions:
        return []
    return [
        Patch(color="0.5", alpha=0.15, lw=0, label="transition, onset to end"),
        Patch(color="0.5", alpha=0.45, lw=0, label="midpoint, 90 % interval"),
    ]


def _name_transitions(figure: "Figure", axes: "Axes", transitions: Sequence[Transition]) -> None:
    """A label for each transition above the panel, in as many rows as it takes for none to touch another."""
    from matplotlib.transforms import blended_transform_factory

    if not transitions:
        return
    figure.draw_without_rendering()  # only then is the panel as wide as it will be
    frame, pixels = axes.get_window_extent(), figure.dpi / 72
    where = blended_transform_factory(axes.transData, axes.transAxes)
    placed: list[tuple[int, float, float, float]] = []  # row, left, right and line of each label
    # From the right: an earlier label goes above a later one, so that its line passes left of it.
    for each in sorted(transitions, key=lambda each: -each.step):
        colour, style = _look(each)
        interval = f"{each.step} ({each.step_low}–{each.step_high})"
        label = f"{each.label or each.kind} at step {interval}, Δλ = {number(each.delta_llc, '+')}".replace("-", "−")
        probe = axes.text(0, 0, label, fontsize=SMALL)
        width = probe.get_window_extent().width
        probe.remove()
        line = axes.transData.transform((each.step, 0))[0]
        left = max(min(line, frame.x1 - width), frame.x0)
        right = left + width
        gap = 8 * pixels
        row = 0
        # Neither over another label, nor with either's line through the other, unless there is no other way.
        while row <= len(placed) and any(
            (row == other and left < end + gap and start < right + gap)
            or (row < other and left - gap < at < right + gap)
            or (row > other and start - gap < line < end + gap)
            for other, start, end, at in placed
        ):
            row += 1
        row = min(row, 1 + max((other for other, *_ in placed), default=-1))
        placed.append((row, left, right, line))
        axes.annotate(
            label,
            (each.step, 1.0),
            xycoords=where,
            xytext=((left - line) / pixels, 5 + 15 * row),
            textcoords="offset points",
            va="bottom",
            fontsize=SMALL,
            zorder=4 - 0.01 * row,  # a line that must pass below another label does so behind it
            bbox={"facecolor": "white", "lw": 0, "pad": 1},
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "ls": style,
                "lw": 1.5,
                "shrinkA": 0,
                "shrinkB": 0,
                "relpos": ((line - left) / width, 0.0),
            },
        )


def _draw_thresholds(axes: "Axes", grokking: Grokking) -> list[Any]:
    marks = [(grokking.memorised_at, TRAIN), (grokking.generalised_at, VAL)]
    for step, colour in marks:
        if step is not None:
            axes.plot(step, THRESHOLD, "v", color=colour, mec="white", ms=7, zorder=4)
    if all(step is None for step, _ in marks):
        return []
    from matplotlib.lines import Line2D

    return [Line2D([], [], marker="v", ls="", color="0.5", label=f"accuracy first ≥ {THRESHOLD}")]


def _draw_training(axes: "Axes", trajectory: Trajectory, steps: np.ndarray) -> list[Any]:
    losses = axes.twinx()
    handles: list[Any] = []
    for name, colour, width in (("train", TRAIN, 2.2), ("val", VAL, 1.4)):
        label = {"train": "training", "val": "validation"}[name]
        accuracy, loss = trajectory.column(f"{name}_accuracy"), trajectory.column(f"{name}_loss")
        for panel, column, style, what in ((axes, accuracy, "-", "accuracy"), (losses, loss, ":", "loss")):
            known = np.isfinite(column) & ((column > 0) | (what == "accuracy"))
            if known.any():
                marker = "o" if known.sum() < 3 else None  # a line through one point is not seen
                line = {"color": colour, "ls": style, "marker": marker, "ms": 3, "lw": width}
                handles += panel.plot(steps[known], column[known], **line, label=f"{label} {what}")
    axes.set_ylim(-0.03, 1.05)
    axes.set_ylabel("accuracy (solid)")
    losses.set_ylabel("loss (dotted)")
    losses.spines[["top"]].set_visible(False)
    if any(line.axes is losses for line in handles):
        losses.set_yscale("log")
    else:
        losses.set_axis_off()
    if not any(line.axes is axes for line in handles):
        axes.yaxis.set_visible(False)
    if not handles:
        axes.text(0.5, 0.5, "neither accuracies nor losses are known", transform=axes.transAxes, ha="center")
    return handles


def _look(transition: Transition) -> tuple[str, str]:
    """Colour and line style of a rise or a fall."""
    return (RISE, "--") if transition.delta_llc > 0 else (FALL, "-")


def log_spaced(steps: np.ndarray) -> bool:
    """Whether the snapshots thin out so much that a linear axis would crowd most of them at its left.

    Args:
        steps: of the snapshots, [T].
    """
    return len(steps) > 3 and steps[-1] > 0 and bool(np.median(steps) < 0.15 * steps[-1])
