"""Several runs side by side: their curves in one figure, their transitions in one table."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from groktrace.analysis.detection import Detector
from groktrace.analysis.detection.piecewise import usable_points
from groktrace.analysis.detection.settings import DEFAULTS
from groktrace.analysis.trajectory import Trajectory
from groktrace.errors import SettingsError
from groktrace.reporting.console import aligned, as_json
from groktrace.reporting.figure import SMALL, check_suffix, curve_label, empty_figure, log_spaced
from groktrace.reporting.numbers import number
from groktrace.reporting.series import Events, Series
from groktrace.run.store import Run, open_run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Of a run: its name, and what there is to show.
Result = tuple[str, Series, Events]
# Okabe & Ito; with the markers, told apart in grey too.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "osD^vP"
_STYLES = ("-", "--", "-.", ":")


@dataclass(frozen=True, eq=False)
class Comparison:
    """Several runs side by side.

    Attributes:
        results: of each run its name, its trajectory as series, and the events along it.
    """

    results: tuple[Result, ...]

    def __str__(self) -> str:
        return self.table()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, by the runs' names."""
        return {name: as_json(series, events) for name, series, events in self.results}

    def table(self) -> str:
        """One line a transition, run by run, and what speaks against comparing them."""
        curves = {series.trajectory.curve.symbol for _, series, _ in self.results}
        level = f"{curves.pop()} before" if len(curves) == 1 else "λ before"
        rows = [("run", "transition", "label", "step", "90 % interval", level, "after", "change", "generalised at")]
        for name, (_, series, events) in zip(_short_names(self.results), self.results, strict=True):
            at = "-" if events.grokking.generalised_at is None else str(events.grokking.generalised_at)
            if not events.transitions:
                why = "none" if usable_points(series.trajectory) >= DEFAULTS.min_points else "too few snapshots"
                rows.append((name, why, "-", "-", "-", "-", "-", "-", at))
            for each in events.transitions:
                interval = f"{each.step_low} - {each.step_high}"
                levels = number(each.llc_before), number(each.llc_after)
                change = f"{number(each.delta_llc, '+')} ± {number(each.stderr)}"
                rows.append((name, each.kind, each.label or "-", str(each.step), interval, *levels, change, at))
        scales = {(series.trajectory.nbeta, series.trajectory.localization) for _, series, _ in self.results}
        lines = aligned(rows)
        if len(scales) > 1:
            listed = "; ".join(
                f"{'as curvature' if nbeta is None else number(nbeta)}, {number(localization)}"
                for nbeta, localization in sorted(scales, key=str)
            )
            lines += [
                "",
                f"These runs were measured at different nβ and γ ({listed}): steps compare, λ does not. "
                "Analyse them with the same --nbeta and --localization to compare it.",
            ]
        if curves:
            lines += ["", "λ is λ_c in the runs that have it at each snapshot, else λ̂."]
        return "\n".join(lines)

    def plot(self, path: str | Path | None = None) -> "Figure":
        """Draw the runs' λ above one another in one panel, and their validation accuracies, where known, in another.

        Args:
            path: also save the figure there; it ends in .png, .pdf or .svg.

        Raises:
            SettingsError: another kind of file.
            GroktraceError: matplotlib is not installed.
        """
        if path is not None:
            check_suffix(Path(path))
        accuracies = any(series["val_accuracy"].known for _, series, _ in self.results)
        figure = empty_figure(6 if accuracies else 4)
        panels = np.atleast_1d(figure.subplots(1 + accuracies, 1, sharex=True, height_ratios=[3, 2][: 1 + accuracies]))
        for i, (name, (_, series, events)) in enumerate(zip(_short_names(self.results), self.results, strict=True)):
            colour = _COLOURS[i % len(_COLOURS)]
            look = {"color": colour, "ls": _STYLES[i % len(_STYLES)], "marker": _MARKERS[i % len(_MARKERS)], "ms": 3}
            curve = series.trajectory.curve
            steps, value, error = series.steps, curve.value, curve.error
            known = np.isfinite(value)
            panels[0].plot(steps[known], value[known], **look, label=name)
            low, high = value - 1.96 * error, value + 1.96 * error
            panels[0].fill_between(steps, low, high, where=known, color=colour, alpha=0.2, lw=0)
            for each in events.transitions:
                # A transition's midpoint, its interval as a bar, upwards or downwards as λ goes.
                height = float(np.interp(each.step, steps[known], value[known]))
                panels[0].plot([each.step_low, each.step_high], [height, height], color=colour, lw=3, alpha=0.5)
                shape = "^" if each.delta_llc > 0 else "v"
                panels[0].plot(each.step, height, shape, color=colour, mec="black", ms=9, zorder=5)
            accuracy = series["val_accuracy"].values
            known = np.isfinite(accuracy)
            if known.any():
                panels[1].plot(steps[known], accuracy[known], **look)
        if all(log_spaced(series.steps) for _, series, _ in self.results):
            panels[0].set_xscale("symlog", linthresh=1.0)
        for panel in panels:
            panel.spines[["top", "right"]].set_visible(False)
            panel.grid(axis="y", color="0.92", lw=0.6)
            panel.set_axisbelow(True)
        panels[0].set_ylabel(curve_label({series.trajectory.curve.name for _, series, _ in self.results}))
        panels[-1].set_xlabel("training step")
        if accuracies:
            panels[1].set_ylabel("validation accuracy")
            panels[1].set_ylim(-0.03, 1.05)
        figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=SMALL)
        if path is not None:
            figure.savefig(path)
        return figure


def compare(*runs: Run | Trajectory | str | Path, detector: Detector | None = None) -> Comparison:
    """Put the results that were last found for several runs side by side: seeds, learning rates, controls.

    Args:
        runs: run directories, their paths or URLs, or trajectories.
        detector: of the transitions; see `find_transitions`.

    Raises:
        SettingsError: no run is given.
        RunError: one cannot be read, or was not analysed yet.
    """
    if not runs:
        raise SettingsError("runs: expected one at least, such as compare('runs/seed0', 'runs/seed1').")
    results = []
    for i, run in enumerate(runs):
        opened = open_run(run) if isinstance(run, str | Path) else run
        trajectory = opened.trajectory() if isinstance(opened, Run) else opened
        name = str(run) if isinstance(run, str | Path) else trajectory.run or f"trajectory {i + 1}"
        results.append((name, Series.of(trajectory), Events.of(trajectory, detector)))
    return Comparison(tuple(results))


def _short_names(results: Sequence[Result]) -> list[str]:
    """The runs' paths without what all have in common at their beginning."""
    paths = [Path(name).parts for name, *_ in results]
    shared = 0
    while len(paths) > 1 and all(path[shared : shared + 1] == paths[0][shared : shared + 1] for path in paths):
        if shared == min(len(path) for path in paths) - 1:
            break
        shared += 1
    return [str(Path(*path[shared:])) for path in paths]
