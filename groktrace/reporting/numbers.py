"""Numbers as text."""

import math


def number(value: float | None, sign: str = "") -> str:
    """Three digits, or all before the point; a dash for what is not known.

    Args:
        value: the number.
        sign: "+" to write the sign of positive numbers too.
    """
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:{sign}.0f}" if 99.95 <= abs(value) < 1e7 else f"{value:{sign}.3g}"


def duration(seconds: float) -> str:
    """A time in words.

    Args:
        seconds: the time.
    """
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 9.95 else f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"
