"""The trajectory as a figure, for files and for TensorBoard."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from groktrace.analysis.grokking import Grokking
from groktrace.analysis.trajectory import Trajectory
from groktrace.analysis.transitions import Transition
from groktrace.errors import GroktraceError, SettingsError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".pdf", ".svg")
# Okabe & Ito: told apart by colour-blind readers; the line styles tell them apart in grey.
LLC, RISE, FALL, TRAIN, VAL = "#0072B2", "#E69F00", "#009E73", "#444444", "#CC79A7"


def shown_curve(trajectory: Trajectory) -> tuple[np.ndarray, np.ndarray]:
    """The curve that charts show: λ̂ where it is reliable, else the centred λ_c where it is known.

    Returns:
        Values and standard errors, [T] each; NaN where there is neither.
    """
    reliable = trajectory.column("reliable") > 0
    centred, centred_error = trajectory.column("llc_centred"), trajectory.column("stderr_centred")
    value = np.where(reliable, trajectory.column("llc"), centred)
    error = np.where(reliable, trajectory.column("stderr"), centred_error)
    return value, error


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
    if path.suffix.lower() not in SUFFIXES:
        raise SettingsError(f"output: expected a file ending in {', '.join(SUFFIXES)}, got '{path}'.")
    trajectory_figure(trajectory, transitions, grokking).savefig(path, dpi=160)


def trajectory_figure(trajectory: Trajectory, transitions: Sequence[Transition], grokking: Grokking) -> "Figure":
    """λ with its error band and transitions above, accuracies and losses below.

    Args:
        trajectory: λ̂ along the run.
        transitions: found in it.
        grokking: measured on it.

    Raises:
        GroktraceError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as failure:
        raise GroktraceError("figures need matplotlib: pip install 'groktrace[plot]'") from failure
    figure = Figure(figsize=(8, 6), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    steps = trajectory.column("step")
    _draw_llc(upper, trajectory, steps)
    _draw_transitions(upper, lower, transitions, steps)
    _draw_training(lower, trajectory, steps)
    if _log_spaced(steps):
        lower.set_xscale("symlog", linthresh=max(1.0, float(steps[steps > 0].min())))
    lower.set_xlabel("training step")
    for axes in (upper, lower):
        axes.spines[["top"]].set_visible(False)
        axes.margins(x=0.02)
    upper.spines[["right"]].set_visible(False)
    return figure


def _draw_llc(axes: "Axes", trajectory: Trajectory, steps: np.ndarray) -> None:
    value, error = shown_curve(trajectory)
    reliable = trajectory.column("reliable") > 0
    known = np.isfinite(value)
    axes.fill_between(steps, value - 1.96 * error, value + 1.96 * error, where=known, color=LLC, alpha=0.25, lw=0)
    many = len(steps) > 200
    axes.plot(steps[known], value[known], color=LLC, lw=1.5)
    size = 1.5 if many else 3.5
    axes.plot(steps[reliable], value[reliable], "o", color=LLC, ms=size, label="λ̂ (band: 95 %)")
    doubtful = known & ~reliable
    if doubtful.any():
        axes.plot(
            steps[doubtful],
            value[doubtful],
            "o",
            color=LLC,
            mfc="white",
            ms=size + 1,
            label="λ_c, where λ̂ is not reliable",
        )
    axes.set_ylabel("local learning coefficient")
    if known.any():
        low, high = float(np.nanmin(value)), float(np.nanmax(value))
        room = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
        # Above, room for the transitions' names.
        axes.set_ylim(low - room, high + 3.2 * room)
        axes.legend(loc="lower right", frameon=False, fontsize=9)
    else:
        axes.text(0.5, 0.5, "no snapshot has a usable λ̂", transform=axes.transAxes, ha="center")


def _draw_transitions(upper: "Axes", lower: "Axes", transitions: Sequence[Transition], steps: np.ndarray) -> None:
    from matplotlib.transforms import blended_transform_factory

    for order, each in enumerate(transitions):
        colour = RISE if each.delta_llc > 0 else FALL
        style = "--" if each.delta_llc > 0 else "-"
        for axes in (upper, lower):
            axes.axvspan(each.onset, each.end, color=colour, alpha=0.10, lw=0)
            axes.axvline(each.step, color=colour, ls=style, lw=1.5)
        upper.axvspan(each.step_low, each.step_high, color=colour, alpha=0.25, lw=0)
        where = blended_transform_factory(upper.transData, upper.transAxes)
        right = each.step > steps[0] + 0.75 * (steps[-1] - steps[0]) and not _log_spaced(steps)
        upper.annotate(
            f"{each.label or each.kind}: λ {each.delta_llc:+.0f} at step {each.step}",
            (each.step, 0.975 - 0.075 * (order % 2)),
            xycoords=where,
            xytext=(-5 if right else 5, 0),
            textcoords="offset points",
            ha="right" if right else "left",
            va="top",
            fontsize=9,
            color="black",
            bbox={"facecolor": "white", "alpha": 0.8, "lw": 0, "pad": 1.5},
        )


def _draw_training(axes: "Axes", trajectory: Trajectory, steps: np.ndarray) -> None:
    losses = axes.twinx()
    handles: list[Any] = []
    for name, colour, width in (("train", TRAIN, 2.0), ("val", VAL, 1.5)):
        label = {"train": "training", "val": "validation"}[name]
        accuracy, loss = trajectory.column(f"{name}_accuracy"), trajectory.column(f"{name}_loss")
        if np.isfinite(accuracy).any():
            handles += axes.plot(steps, accuracy, color=colour, lw=width, label=f"{label} accuracy")
        positive = np.where(loss > 0, loss, np.nan)
        if np.isfinite(positive).any():
            handles += losses.plot(steps, positive, color=colour, lw=width, ls=":", label=f"{label} loss")
    axes.set_ylim(-0.03, 1.05)
    axes.set_ylabel("accuracy")
    losses.set_ylabel("loss (dotted)")
    if any(line.axes is losses for line in handles):
        losses.set_yscale("log")
    losses.spines[["top"]].set_visible(False)
    if handles:
        axes.legend(handles, [line.get_label() for line in handles], loc="center right", frameon=False, fontsize=9)


def _log_spaced(steps: np.ndarray) -> bool:
    """Whether the snapshots thin out so much that a linear axis would crowd most of them at its left."""
    return len(steps) > 3 and steps[-1] > 0 and bool(np.median(steps) < 0.15 * steps[-1])
