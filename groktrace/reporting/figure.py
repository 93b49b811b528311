"""The trajectory as a figure, for files and for TensorBoard."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from groktrace.analysis.detection import Transition
from groktrace.analysis.results.grokking import THRESHOLD, Grokking
from groktrace.analysis.results.trajectory import Trajectory
from groktrace.errors import GroktraceError, SettingsError
from groktrace.reporting.numbers import number
from groktrace.reporting.remarks import partial
from groktrace.reporting.series import Events, Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".pdf", ".svg")
# Okabe & Ito: told apart by colour-blind readers; the line styles tell them apart in grey.
LLC, RISE, FALL, TRAIN, VAL = "#0072B2", "#E69F00", "#009E73", "#444444", "#CC79A7"
# Colour and width of lines; those that are not named take the other colours in turn.
_LINES = {
    "train_loss": (TRAIN, 2.2),
    "train_accuracy": (TRAIN, 2.2),
    "val_loss": (VAL, 1.4),
    "val_accuracy": (VAL, 1.4),
}
_OTHERS = ("#D55E00", "#56B4E9", "#E69F00", "#009E73")
# Axes that share a panel, left and right; the last panel is always there.
_PANELS = (("Hessian's trace", "largest eigenvalue"), ("accuracy", "loss"))
DPI = 160
SMALL = 8.5  # size of legend and labels, in points


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


def style_panels(every: "Iterable[Axes]") -> None:
    """Give panels the usual look.

    Args:
        every: the panels.
    """
    for axes in every:
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.02)
        axes.grid(axis="y", color="0.92", lw=0.6)
        axes.set_axisbelow(True)


def pixels(figure: "Figure") -> np.ndarray:
    """A figure as [height, width, 3] bytes.

    Args:
        figure: of `empty_figure`.
    """
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3]  # type: ignore[attr-defined]


@dataclass(frozen=True)
class FigureReporter:
    """Draws the trajectory into a file.

    Attributes:
        name: of the file, which ends in .png, .pdf or .svg.
    """

    name: str = "trajectory.png"

    def report(self, series: Series, events: Events, place: Path) -> None:
        """Draw the file; see `Reporter`.

        Raises:
            SettingsError: another kind of file.
            GroktraceError: matplotlib is not installed.
        """
        path = place / self.name
        check_suffix(path)
        trajectory_figure(series, events).savefig(path)


def trajectory_figure(series: Series, events: Events) -> "Figure":
    """λ with its error band and transitions above, accuracies and losses below; between them what else has an axis.

    Args:
        series: of the trajectory.
        events: along it.

    Raises:
        GroktraceError: matplotlib is not installed.
    """
    panels = _panels(series)
    figure = empty_figure(4.5 + 1.5 * len(panels))
    heights = [3, *[1.5] * (len(panels) - 1), 2]
    upper, *below = every = figure.subplots(1 + len(panels), 1, sharex=True, height_ratios=heights)
    steps = series.steps.astype(float)
    if log_spaced(steps):
        below[-1].set_xscale("symlog", linthresh=max(1.0, float(steps[steps > 0].min())))
    below[-1].set_xlabel("training step")
    style_panels(every)
    handles = [
        *_draw_llc(upper, series),
        *_draw_thresholds(below[-1], events.grokking),
        *_draw_transitions(every, events.transitions),
    ]
    for axes, names in zip(below, panels, strict=True):
        handles += _draw_panel(axes, series, names)
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=SMALL)
    _name_transitions(figure, upper, events.transitions)
    data, said = series.trajectory.data, partial(series.trajectory).split(";")[0]
    if title := ". ".join(part for part in ("" if data is None else f"Measured on {data}", said) if part):
        figure.suptitle(title, fontsize=SMALL, color="0.4", ha="left", x=0.05)
    return figure


def _panels(series: Series) -> list[tuple[str, ...]]:
    """The axes of each panel below λ's: those that share one, and one for each other axis."""
    shared = {axis: names for names in _PANELS for axis in names}
    found = dict.fromkeys(
        shared.get(quantity.axis, (quantity.axis,)) for quantity in series if quantity.axis and quantity.known
    )
    return [*(names for names in found if names != _PANELS[-1]), _PANELS[-1]]


def _draw_llc(axes: "Axes", series: Series) -> list[Any]:
    trajectory, steps, raw = series.trajectory, series.steps, series["llc"].values
    curve = trajectory.curve
    value, error = curve.value, curve.error
    known = np.isfinite(value)
    reliable = trajectory.column("reliable") > 0
    symbol = r"$\lambda_c$" if curve.name == "llc_centred" else r"$\hat\lambda$"
    low, high = value - 1.96 * error, value + 1.96 * error
    axes.fill_between(steps, low, high, where=known, color=LLC, alpha=0.25, lw=0)
    many = len(steps) > 200
    if not many:
        # A band has no width to be seen at a point that stands alone.
        axes.vlines(steps[known], low[known], high[known], color=LLC, alpha=0.5, lw=1)
    axes.plot(steps[known], value[known], color=LLC, lw=1.0 if many else 1.5)
    hollow: dict[str, Any] = {"color": LLC, "mfc": "white", "ls": "", "ms": 2.5 if many else 4.5}
    handles = []
    full: dict[str, Any] = {"marker": "o", "ls": "", "color": LLC, "ms": 1.5 if many else 3.5}
    for chosen, look, label in (
        (reliable, full, f"{symbol} with 95 % band"),
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
    if left_over.any():
        handles += axes.plot(steps[left_over], raw[left_over], marker="D", **hollow, label=r"$\hat\lambda$, unreliable")
    frame = _frame(trajectory)
    if not len(frame):
        axes.text(0.5, 0.5, "no snapshot has a usable λ̂", transform=axes.transAxes, ha="center")
        return handles
    room = 0.08 * float(np.ptp(frame)) or 0.1 * abs(float(frame[0])) or 1.0
    axes.set_ylim(float(frame.min()) - room, float(frame.max()) + room)
    shown = known | left_over
    look = hollow | {"ms": 4 if many else 6}
    return handles + _mark_outside(axes, steps[shown], np.where(known, value, raw)[shown], look)


def _frame(trajectory: Trajectory) -> np.ndarray:
    """What the axis of λ has to show: all reliable values, their bands, others that can be trusted, and the reference.

    Values that are not to be trusted must not squash those that are; `_mark_outside` says where they are.
    """
    curve, reliable = trajectory.curve, trajectory.column("reliable") > 0
    value, error = curve.value, curve.error
    known = np.isfinite(value)
    trusted = known & ~curve.doubtful if (known & ~curve.doubtful).any() else known
    if (reliable & trusted).any():  # early in training, off any minimum, an error can be a hundred times λ
        trusted &= error <= np.abs(value[reliable & trusted]).max()
    width = np.where(reliable & trusted, 1.96 * error, 0.0)
    used = known & (reliable | trusted)
    frame = np.concatenate([(value - width)[used], (value + width)[used]]) if known.any() else trajectory.column("llc")
    reference = trajectory.reference
    return np.append(frame[np.isfinite(frame)], [] if reference is None else reference.llc)


def _mark_outside(axes: "Axes", steps: np.ndarray, values: np.ndarray, look: dict[str, Any]) -> list[Any]:
    """Triangles at the upper and lower edge where points lie beyond the axis; the legend says how many do."""
    low, high = axes.get_ylim()
    handles: list[Any] = []
    for outside, marker, height in ((values > high, "^", 0.98), (values < low, "v", 0.02)):
        if count := int(outside.sum()):
            label = f"{count} point{'s' if count > 1 else ''} beyond the axis"
            edge: dict[str, Any] = {"marker": marker, "transform": axes.get_xaxis_transform(), "zorder": 5}
            handles += axes.plot(steps[outside], np.full(count, height), **look, **edge, label=label)
    return handles


def _draw_transitions(panels: Sequence["Axes"], transitions: Sequence[Transition]) -> list[Any]:
    from matplotlib.patches import Patch

    for transition in transitions:
        colour, style = _look(transition)
        for axes in panels:
            axes.axvspan(transition.onset, transition.end, color=colour, alpha=0.10, lw=0)
            axes.axvspan(transition.step_low, transition.step_high, color=colour, alpha=0.25, lw=0)
            axes.axvline(transition.step, color=colour, ls=style, lw=1.5)
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
    for transition in sorted(transitions, key=lambda transition: -transition.step):
        colour, style = _look(transition)
        interval = f"{transition.step} ({transition.step_low}–{transition.step_high})"
        label = f"{transition.name} at step {interval}, Δλ = {number(transition.delta_llc, '+')}".replace("-", "−")
        probe = axes.text(0, 0, label, fontsize=SMALL)
        width = probe.get_window_extent().width
        probe.remove()
        line = axes.transData.transform((transition.step, 0))[0]
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
            (transition.step, 1.0),
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


def _draw_panel(axes: "Axes", series: Series, names: tuple[str, ...]) -> list[Any]:
    """The quantities along these axes: the first left and solid, the second right and dotted."""
    handles: list[Any] = []
    others = iter(_OTHERS * len(series))
    for name, style in zip(names, "-:", strict=False):
        panel = axes if style == "-" else axes.twinx()
        drawn = [quantity for quantity in series if quantity.axis == name and quantity.known]
        for quantity in drawn:
            known, values = np.isfinite(quantity.values), quantity.values
            colour, width = _LINES.get(quantity.name) or (next(others), 1.5)
            if quantity.errors is not None:
                band = values - 1.96 * quantity.errors, values + 1.96 * quantity.errors
                panel.fill_between(series.steps, *band, where=known, color=colour, alpha=0.25, lw=0)
            marker = "o" if known.sum() < 3 else None  # a line through one point is not seen
            line: dict[str, Any] = {"color": colour, "ls": style, "marker": marker, "ms": 3, "lw": width}
            label = (quantity.label or quantity.name) + ("" if quantity.errors is None else ", 95 % band")
            handles += panel.plot(series.steps[known], values[known], **line, label=label)
        gap = "\n" if len(name) > 10 else " "
        panel.set_ylabel(f"{name}{gap}({'solid' if style == '-' else 'dotted'})" if len(names) > 1 else name)
        panel.spines[["top"]].set_visible(False)
        if drawn:
            _set_scale(panel, name, np.concatenate([quantity.values for quantity in drawn]))
        elif panel is axes:
            axes.yaxis.set_visible(False)
        else:
            panel.set_axis_off()
    if not handles:
        said = "neither accuracies nor losses are known"
        axes.text(0.5, 0.5, said, transform=axes.transAxes, ha="center")
    return handles


def _set_scale(axes: "Axes", name: str, values: np.ndarray) -> None:
    """A logarithmic axis for losses, and for what spreads as far, as long as every finite value is seen on it."""
    shown = values[np.isfinite(values)]
    least, most = float(shown.min()), float(shown.max())
    if name == "accuracy":
        axes.set_ylim(-0.03, 1.05)
    elif least > 0 and (name == "loss" or most > 20 * least):
        axes.set_yscale("log")
    elif name == "loss" and least == 0 < most:  # fits that are exact: nothing, a decade below the smallest loss
        axes.set_yscale("symlog", linthresh=float(shown[shown > 0].min()))


def _look(transition: Transition) -> tuple[str, str]:
    """Colour and line style of a rise or a fall."""
    return (RISE, "--") if transition.delta_llc > 0 else (FALL, "-")


def log_spaced(steps: np.ndarray) -> bool:
    """Whether the snapshots thin out so much that a linear axis would crowd most of them at its left.

    Args:
        steps: of the snapshots, [T].
    """
    return len(steps) > 3 and steps[-1] > 0 and bool(np.median(steps) < 0.15 * steps[-1])
