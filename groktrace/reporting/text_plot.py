"""The curve of λ in a few lines of text."""

from dataclasses import dataclass

import numpy as np

from groktrace.reporting.figure import log_spaced
from groktrace.reporting.numbers import number
from groktrace.reporting.series import CURVE, Events, Series


@dataclass(frozen=True)
class _Axis:
    """Training steps as abscissae: as they are or, as in figures, logarithms beyond the first one, where they thin out.

    Attributes:
        linear_until: that first one; None for steps as they are.
    """

    linear_until: float | None

    @classmethod
    def of(cls, steps: np.ndarray) -> "_Axis":
        return cls(max(1.0, float(steps[steps > 0].min())) if log_spaced(steps) else None)

    def at(self, steps: np.ndarray) -> np.ndarray:
        if self.linear_until is None:
            return steps.astype(float)
        relative = steps / self.linear_until
        return np.where(relative <= 1, relative, 1 + np.log10(np.maximum(relative, 1)))

    def ticks(self, first: int, last: int) -> list[int]:
        """Steps to name below the curve, the most wanted first."""
        if self.linear_until is None:
            return [first, last]
        decades = (10**power for power in range(len(str(last))))
        return [first, last, *(step for step in decades if max(first, self.linear_until) <= step < last)]


def small_curve(series: Series, events: Events, width: int = 64, height: int = 8) -> str:
    """The curve on which transitions are found against the step as lines of text, with their numbers below.

    The step's axis is logarithmic where that of the figure is.

    Args:
        series: of the trajectory.
        events: along it.
        width: of the curve, in characters.
        height: of the curve, in lines.
    """
    value, steps = series[CURVE].values, series.steps
    known = np.isfinite(value)
    if known.sum() < 3:
        return ""
    axis, steps, value = _Axis.of(steps), steps[known], value[known]
    low, high = float(value.min()), float(value.max())
    x = axis.at(steps)
    across = np.linspace(x[0], x[-1], width)

    def column_of(step: int) -> int:
        return int(np.argmin(np.abs(across - axis.at(np.array(step)))))

    level = np.round((np.interp(across, x, value) - low) / ((high - low) or 1.0) * (2 * height - 1)).astype(int)
    rows = [["'" if at == 2 * row + 1 else "." if at == 2 * row else " " for at in level] for row in range(height)]
    marks = [" "] * width
    for i, transition in enumerate(events.transitions, 1):
        column = column_of(transition.step)
        marks[column] = str(i % 10)
        for row in rows:
            row[column] = "|" if row[column] == " " else row[column]
    left = max(len(number(low)), len(number(high)))
    names = {0: number(low), height - 1: number(high)}
    lines = [f"{names.get(row, ''):>{left}} |{''.join(rows[row])}".rstrip() for row in reversed(range(height))]
    below = [" "] * width
    for step in axis.ticks(int(steps[0]), int(steps[-1])):
        text = str(step)
        start = min(max(column_of(step) - len(text) // 2, 0), width - len(text))
        if not "".join(below[max(start - 1, 0) : start + len(text) + 1]).strip():
            below[start : start + len(text)] = text
    marked = [f"{'':{left}}  {''.join(marks)}".rstrip()] if events.transitions else []
    return "\n".join([*lines, f"{'':{left}}  {''.join(below)}".rstrip(), *marked])
