"""The curve of λ in a few lines of text."""

import numpy as np

from groktrace.reporting.numbers import number
from groktrace.reporting.series import CURVE, Events, Series


def small_curve(series: Series, events: Events, width: int = 64, height: int = 8) -> str:
    """The curve on which transitions are found against the step as lines of text, with their numbers below.

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
    steps, value = steps[known], value[known]
    low, high = float(value.min()), float(value.max())
    across = np.linspace(steps[0], steps[-1], width)
    level = np.round((np.interp(across, steps, value) - low) / ((high - low) or 1.0) * (2 * height - 1)).astype(int)
    rows = [["'" if at == 2 * row + 1 else "." if at == 2 * row else " " for at in level] for row in range(height)]
    marks = [" "] * width
    for i, transition in enumerate(events.transitions, 1):
        column = int(np.argmin(np.abs(across - transition.step)))
        marks[column] = str(i % 10)
        for row in rows:
            row[column] = "|" if row[column] == " " else row[column]
    left = max(len(number(low)), len(number(high)))
    names = {0: number(low), height - 1: number(high)}
    lines = [f"{names.get(row, ''):>{left}} |{''.join(rows[row])}".rstrip() for row in reversed(range(height))]
    ends = f"{int(steps[0])}{int(steps[-1]):>{width - len(str(int(steps[0])))}}"
    marked = [f"{'':{left}}  {''.join(marks)}".rstrip()] if events.transitions else []
    return "\n".join([*lines, f"{'':{left}}  {ends}", *marked])
