"""Several runs side by side: their curves in one figure, their transitions in one table."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from groktrace.analysis.detection import Detector
from groktrace.analysis.detection.piecewise import usable_points
from groktrace.analysis.detection.settings import DEFAULTS
from groktrace.analysis.results.store import all_results
from groktrace.analysis.results.trajectory import Trajectory
from groktrace.errors import SettingsError
from groktrace.reporting.console import aligned, as_json
from groktrace.reporting.figure import SMALL, check_suffix, curve_label, empty_figure, log_spaced, style_panels
from groktrace.reporting.groups import Group, Result, group_runs, settings_of, short_names
from groktrace.reporting.numbers import number
from groktrace.reporting.series import CURVE, Events, Series
from groktrace.reporting.tensorboard import write_mean
from groktrace.run.store import Run, open_run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe & Ito; with the markers, told apart in grey too.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "osD^vP"
_STYLES = ("-", "--", "-.", ":")
# The panels below that of λ: the axis, and its quantities with their style where both are known.
_PANELS = (("accuracy", ("val_accuracy", "train_accuracy")), ("loss", ("val_loss", "train_loss")))
_LOOKS = {"val": ("-", "solid: validation"), "train": (":", "dotted: training")}


@dataclass(frozen=True, eq=False)
class Comparison:
    """Several runs side by side.

    Attributes:
        results: of each run its name, its trajectory as series, and the events along it.
        groups: the same runs, those of one setting together; each alone where none are given.
    """

    results: tuple[Result, ...]
    groups: tuple[Group, ...] = ()

    def __post_init__(self) -> None:
        if not self.groups:
            object.__setattr__(self, "groups", group_runs(self.results, [None] * len(self.results)))

    def __str__(self) -> str:
        return self.table()

    @property
    def shared(self) -> tuple[Group, ...]:
        """The groups of several runs."""
        return tuple(group for group in self.groups if len(group) > 1)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: the runs by their names, and the groups of several."""
        runs = {name: as_json(series, events) for name, series, events in self.results}
        return {"runs": runs, "groups": [group.to_dict() for group in self.shared]}

    def table(self) -> str:
        """The transitions of each group of runs, one line each, then run by run, and what speaks against comparing."""
        curves = {series.trajectory.curve.symbol for _, series, _ in self.results}
        level = f"{curves.pop()} before" if len(curves) == 1 else "λ before"
        rows = [("run", "transition", "label", "step", "90 % interval", level, "after", "change", "generalised at")]
        for name, (_, series, events) in zip(short_names([r[0] for r in self.results]), self.results, strict=True):
            at = "-" if events.grokking.generalised_at is None else str(events.grokking.generalised_at)
            if not events.transitions:
                why = "none" if usable_points(series.trajectory) >= DEFAULTS.min_points else "too few snapshots"
                rows.append((name, why, "-", "-", "-", "-", "-", "-", at))
            for item in events.transitions:
                interval = f"{item.step_low} - {item.step_high}"
                levels = number(item.llc_before), number(item.llc_after)
                change = f"{number(item.delta_llc, '+')} ± {number(item.stderr)}"
                rows.append((name, item.kind, item.label or "-", str(item.step), interval, *levels, change, at))
        scales = {_scale(series.trajectory) for _, series, _ in self.results}
        lines = [*self._shared_lines(level), *aligned(rows)]
        if len(scales) > 1:
            listed = "; ".join(
                f"{'as curvature' if nbeta is None else number(nbeta)}, {number(localization)}"
                for nbeta, localization in sorted(scales, key=str)
            )
            first = self.results[0][1].trajectory
            say = ""
            if first.nbeta is not None and first.localization is not None:
                say = f": --nbeta {first.nbeta:.6g} --localization {first.localization:.6g}, as the first was"
            lines += [
                "",
                f"These runs were measured at different nβ and γ ({listed}): steps compare, λ does not. "
                f"Analyse them with the same --nbeta and --localization to compare it{say}.",
            ]
        lines += _said_of_data(self.results)
        if curves:
            lines += ["", "λ is λ_c in the runs that have it at each snapshot, else λ̂."]
        return "\n".join(lines)

    def _shared_lines(self, level: str) -> list[str]:
        """The transitions of the groups of several runs, with their mean and standard deviation."""
        if not self.shared:
            return []
        heading = ("group", "transition", "label", "in", "step", "first - last", level, "after", "change")
        rows: list[tuple[str, ...]] = [(*heading, "generalised at")]
        for group in self.shared:
            when = group.reached("generalised_at")
            at = "-" if when is None else when.text()
            if not group.transitions:
                rows.append((group.name, "none", *["-"] * 7, at))
            for item in group.transitions:
                levels = (number(item.llc_before.mean), number(item.llc_after.mean))
                change = item.delta_llc.text("g" if abs(item.delta_llc.mean) < 10 else ".0f", "+")
                between = f"{item.step.low:.0f} - {item.step.high:.0f}"
                many = f"{item.runs} of {len(group)}"
                kind = item.kind, item.label or "-"
                row = (group.name, *kind, many, item.step.text(), between, *levels, change, at)
                rows.append(row)
        return ["Mean ± standard deviation over the runs of a group:", "", *aligned(rows), "", "Run by run:", ""]

    def plot(self, path: str | Path | None = None) -> "Figure":
        """Draw λ in one panel, and accuracies and losses, where known, in others: of groups mean and spread.

        Args:
            path: also save the figure there; it ends in .png, .pdf or .svg.

        Raises:
            SettingsError: another kind of file.
            GroktraceError: matplotlib is not installed.
        """
        if path is not None:
            check_suffix(Path(path))
        known = {quantity.name for _, series, _ in self.results for quantity in series if quantity.known}
        panels = [(axis, [name for name in names if name in known]) for axis, names in _PANELS]
        panels = [(axis, names) for axis, names in panels if names]
        figure = empty_figure(4 + 1.8 * len(panels))
        every = np.atleast_1d(figure.subplots(1 + len(panels), 1, sharex=True, height_ratios=[3, *[1.5] * len(panels)]))
        if all(log_spaced(series.steps) for _, series, _ in self.results):
            every[0].set_xscale("symlog", linthresh=1.0)
        for i, group in enumerate(self.groups):
            colour = _COLOURS[i % len(_COLOURS)]
            look: dict[str, Any] = {"color": colour, "ls": _STYLES[i % len(_STYLES)]}
            if len(group) == 1:
                look |= {"marker": _MARKERS[i % len(_MARKERS)], "ms": 3}
            _draw_curve(every[0], group, look)
            for axes, (_, names) in zip(every[1:], panels, strict=True):
                for name in names:
                    style = {"ls": _LOOKS[name.partition("_")[0]][0], "ms": 2} if len(names) > 1 else {}
                    _draw_mean(axes, group, name, look | style)
        every[0].set_ylabel(curve_label({series.trajectory.curve.name for _, series, _ in self.results}))
        for axes, (axis, names) in zip(every[1:], panels, strict=True):
            axes.set_ylabel(axis if len(names) > 1 else names[0].replace("val_", "validation ").replace("_", "ing "))
            if axis == "accuracy":
                axes.set_ylim(-0.03, 1.05)
            elif not any((series[name].values < 0).any() for _, series, _ in self.results for name in names):
                axes.set_yscale("log")
        style_panels(every)
        if any(len(names) > 1 for _, names in panels):
            for line, label in _LOOKS.values():
                every[-1].plot([], [], color="0.5", ls=line, label=label)
        self._name_transitions(every[0])
        every[-1].set_xlabel("training step")
        figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=SMALL)
        if path is not None:
            figure.savefig(path)
        return figure

    def _name_transitions(self, axes: "Axes") -> None:
        """A line for each group of several runs above the panel: when they make their transitions."""
        for row, group in enumerate(reversed(self.shared)):
            said = [
                f"{'▲' if item.delta_llc.mean > 0 else '▼'} {item.label or item.kind} at step {item.step.text()}"
                + ("" if item.runs == len(group) else f" ({item.runs} of {len(group)} runs)")
                for item in group.transitions
            ]
            place: dict[str, Any] = {
                "xycoords": "axes fraction",
                "textcoords": "offset points",
                "xytext": (0, 6 + 14 * row),
            }
            colour = _COLOURS[self.groups.index(group) % len(_COLOURS)]
            text = f"{group.name}: {',  '.join(said) or 'no transition'}"
            axes.annotate(text, (0.0, 1.0), **place, color=colour, fontsize=SMALL)

    def to_tensorboard(self, logdir: str | Path) -> list[Path]:
        """Write the mean of each group of several runs as a run of its own, in place of what an earlier call wrote.

        Args:
            logdir: the folder that TensorBoard is pointed at.

        Returns:
            The folders of these runs.

        Raises:
            SettingsError: no group has several runs.
        """
        if not self.shared:
            raise SettingsError("logdir: there is no mean to write, as no runs differ in their seed only.")
        return [write_mean(group, Path(logdir)) for group in self.shared]


def compare(
    *runs: Run | Trajectory | str | Path,
    group_by: str | None = None,
    analyses: bool = False,
    detector: Detector | None = None,
) -> Comparison:
    """Put the results that were last found for several runs side by side: seeds, learning rates, controls.

    Runs that differ only in their seed, as far as was recorded, form a group, of which mean and spread are shown.

    Args:
        runs: run directories, their paths or URLs, or trajectories, which stand alone.
        group_by: put those together instead that share this setting, such as "lr", "weight_decay" or "n".
        analyses: show all analyses of each run instead of the last one: on other data, of other weights.
        detector: of the transitions; see `find_transitions`.

    Raises:
        SettingsError: no run is given, or one has no such setting.
        RunError: one cannot be read, or was not analysed yet.
    """
    if not runs:
        raise SettingsError("runs: expected one at least, such as compare('runs/seed0', 'runs/seed1').")
    if analyses and group_by is not None:
        raise SettingsError("group_by: puts runs together by their settings, and analyses=True shows each alone.")
    results: list[Result] = []
    settings: list[dict[str, Any] | None] = []
    for i, run in enumerate(runs):
        opened = open_run(run) if isinstance(run, str | Path) else run
        if analyses and isinstance(opened, Run):
            found = _named_analyses(opened)
            results += [(label, Series.of(trajectory), Events.of(trajectory, detector)) for label, trajectory in found]
            settings += [None] * len(found)
            continue
        trajectory = opened.trajectory() if isinstance(opened, Run) else opened
        name = str(run) if isinstance(run, str | Path) else trajectory.run or f"trajectory {i + 1}"
        results.append((name, Series.of(trajectory), Events.of(trajectory, detector)))
        settings.append(settings_of(opened) if isinstance(opened, Run) else None)
    return Comparison(tuple(results), group_runs(results, settings, group_by))


def _named_analyses(run: Run) -> list[tuple[str, Trajectory]]:
    """All analyses of a run, that on its own data first, each named by the settings in which they differ."""
    found = sorted(all_results(run), key=lambda result: result[1].data is not None)
    told: list[dict[str, Any]] = [
        {"data": "training data" if trajectory.data is None else str(trajectory.data), **asked}
        for _, trajectory, asked in found
    ]
    # How many chains there were is rarely asked for, but follows from the rest.
    keys = [key for key in told[0] if key != "chains" and any(facts.get(key) != told[0].get(key) for facts in told)]
    labels = [
        ", ".join(
            str(facts[key]) if key == "data" else f"{key} {_in_words(facts.get(key))}"
            for key in keys
            if key == "data" or facts.get(key) is not None
        )
        for facts in told
    ]
    labels = [
        label if label and labels.count(label) == 1 else f"{label}{', ' if label else ''}{folder.name}"
        for label, (folder, _, _) in zip(labels, found, strict=True)
    ]
    return [(f"{run.name}: {label}", trajectory) for label, (_, trajectory, _) in zip(labels, found, strict=True)]


def _said_of_data(results: Sequence[Result]) -> list[str]:
    """What was measured on other data than a run's own, where runs were analysed on different ones."""
    others = [(name, series.trajectory.data) for name, series, _ in results]
    if len({None if data is None else data.digest for _, data in others}) < 2:
        return []
    said = "; ".join(f"{name} on {data}" for name, data in others if data is not None and str(data) not in name)
    return ["", f"Not measured on the run's training samples: {said}."] if said else []


def _in_words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _scale(trajectory: Trajectory) -> tuple[float | None, ...]:
    """nβ and γ, rounded as they may have been typed."""
    both = (trajectory.nbeta, trajectory.localization)
    return tuple(None if value is None else float(f"{value:.4g}") for value in both)


def _draw_curve(axes: "Axes", group: Group, look: dict[str, Any]) -> None:
    """λ of a group with its band, and its transitions: midpoints, upwards or downwards as λ goes, with their spread."""
    colour, marks = look["color"], []
    if len(group) > 1:
        mean = _draw_mean(axes, group, CURVE, look | {"label": f"{group.name}, mean ± std."})
        steps, value = mean
        for item in group.transitions:
            width = item.step.deviation or 0.0
            marks.append((item.step.mean, item.step.mean - width, item.step.mean + width, item.delta_llc.mean))
    else:
        ((_, series, events),) = group.members
        curve = series.trajectory.curve
        known = np.isfinite(curve.value)
        steps, value = series.steps[known], curve.value[known]
        axes.plot(steps, value, **look, label=group.name)
        error = 1.96 * curve.error[known]
        axes.fill_between(steps, value - error, value + error, color=colour, alpha=0.2, lw=0)
        marks = [(item.step, item.step_low, item.step_high, item.delta_llc) for item in events.transitions]
    for step, low, high, change in marks:
        height = float(np.interp(step, steps, value)) if len(steps) else 0.0
        axes.plot([low, high], [height, height], color=colour, lw=3, alpha=0.5)
        axes.plot(step, height, "^" if change > 0 else "v", color=colour, mec="black", ms=9, zorder=5)


def _draw_mean(axes: "Axes", group: Group, name: str, look: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """A quantity of a group, of several runs its mean with a band and the runs behind it; steps and values drawn."""
    for _, series, _ in group.members if len(group) > 1 else ():
        values = series[name].values
        known = np.isfinite(values) & ((values > 0) | (not name.endswith("loss")))
        axes.plot(series.steps[known], values[known], color=look["color"], ls=look["ls"], lw=0.6, alpha=0.4)
    mean = group.mean(name)
    known = np.isfinite(mean.value)
    if not known.any():
        return mean.steps[known], mean.value[known]
    if len(group) > 1:
        axes.fill_between(mean.steps, mean.low, mean.high, where=known, color=look["color"], alpha=0.2, lw=0)
        look = look | {"lw": 1.8}
    axes.plot(mean.steps[known], mean.value[known], **look)
    return mean.steps[known], mean.value[known]
