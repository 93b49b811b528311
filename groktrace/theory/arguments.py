"""The check that the closed forms make of their arguments."""

import operator
from typing import Any

from groktrace.errors import SettingsError


def whole(name: str, value: Any, least: int, most: int | None = None, bound: str = "") -> int:
    """`value` as an int, if it is a whole number within its range.

    Args:
        name: the argument's name, for the message.
        value: what came; any integer type but bool.
        least: smallest allowed value.
        most: largest allowed value; None for no limit.
        bound: what the largest value is, in words, for the message.

    Returns:
        The value.

    Raises:
        SettingsError: it is no whole number or outside its range.
    """
    allowed = f"of at least {least}" if most is None else f"from {least} to {most}"
    refusal = SettingsError(f"{name}: expected a whole number {allowed}{bound and f' ({bound})'}, got {value!r}.")
    if isinstance(value, bool):
        raise refusal
    try:
        number = operator.index(value)
    except TypeError:
        raise refusal from None
    if number < least or (most is not None and number > most):
        raise refusal
    return number
