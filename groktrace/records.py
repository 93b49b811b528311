"""Records as JSON, and back: what is read is hostile, and the record's own annotations say what each field may hold."""

import inspect
import math
import sys
import types
from collections.abc import Callable
from functools import cache
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import torch

from groktrace.errors import printable

Kind = TypeVar("Kind")
_MAX_INTEGER = 2**63 - 1


def read_record(kind: type[Kind], value: Any) -> Kind:
    """Build a dataclass or named tuple from parsed JSON, checked against its annotations.

    These may be bool, int, float (a finite number), str (made printable), None, torch.dtype (by name), other records,
    and unions, Literal, tuple[x, ...] and dict[str, x] of them. Further arguments of Annotated take the value that was
    read, and return what to use; they raise ValueError where it is out of bounds.

    Args:
        kind: the dataclass or named tuple.
        value: what the JSON held.

    Raises:
        ValueError: a field is missing, unknown, or holds something else than its annotation says.
    """
    hints, required = _fields(kind)
    if not isinstance(value, dict):
        raise ValueError(f"expected an object with {', '.join(hints)}, got {type(value).__name__}")
    if odd := sorted(required - value.keys()) or sorted(value.keys() - hints.keys()):
        raise ValueError(f"'{odd[0]}' is {'missing' if odd[0] in hints else 'unknown'} among {', '.join(hints)}"[:400])
    return kind(**{name: _read(hints[name], item, name) for name, item in value.items()})


class Record:
    """A dataclass that goes to JSON and back."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; what is not finite becomes None."""
        return plain(vars(self))

    @classmethod
    def from_dict(cls: type[Kind], value: Any) -> Kind:
        """The inverse of `to_dict`.

        Raises:
            ValueError: a key is missing, unknown, or of the wrong kind.
        """
        return read_record(cls, value)


def plain(value: Any) -> Any:
    """JSON values: records become objects, tuples lists, and numbers that are not finite None."""
    if isinstance(value, Record):
        return value.to_dict()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def between(least: float, most: float = sys.float_info.max) -> Callable[[Any], Any]:
    """Bounds of a number, for Annotated.

    Args:
        least: the smallest that is allowed.
        most: the largest.
    """

    def check(number: Any) -> Any:
        if not least <= number <= most:
            raise ValueError(f"expected a number from {least:g} to {most:g}, got {number!r:.40}")
        return number

    return check


def at_most(length: int) -> Callable[[Any], Any]:
    """Bound of the length of a text or tuple, for Annotated."""

    def check(value: Any) -> Any:
        if len(value) > length:
            raise ValueError(f"expected at most {length} letters or entries, got {len(value)}")
        return value

    return check


@cache
def _fields(kind: Any) -> tuple[dict[str, Any], frozenset[str]]:
    """Annotations by field, and the fields without a default."""
    hints = get_type_hints(kind, include_extras=True)
    parameters = inspect.signature(kind).parameters
    required = (name for name, parameter in parameters.items() if parameter.default is inspect.Parameter.empty)
    return {name: hints[name] for name in parameters}, frozenset(required)


def _read(hint: Any, value: Any, name: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        value = _read(arguments[0], value, name)
        try:
            for check in arguments[1:]:
                value = check(value)
        except ValueError as failure:
            raise ValueError(f"{name}: {failure}") from failure
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        options = [option for option in arguments if option is not type(None)]
        for option in options[:-1]:
            try:
                return _read(option, value, name)
            except ValueError:
                continue
        return _read(options[-1], value, name)
    if origin is Literal:
        if any(type(value) is type(option) and value == option for option in arguments):
            return value
    elif origin is tuple:
        if isinstance(value, list | tuple):
            return tuple(_read(arguments[0], item, name) for item in value)
    elif origin is dict:
        if isinstance(value, dict):
            return {printable(key): _read(arguments[1], item, name) for key, item in value.items()}
    elif hint is float:
        if type(value) in (int, float) and abs(value) <= sys.float_info.max:
            return value
    elif hint is int:
        if type(value) is int and abs(value) <= _MAX_INTEGER:
            return value
    elif hint is str:
        if isinstance(value, str):
            return printable(value)
    elif hint is torch.dtype:
        if isinstance(value, str) and isinstance(dtype := vars(torch).get(value), torch.dtype):
            return dtype
    elif hint is bool:
        if type(value) is bool:
            return value
    elif hint is Any:
        return value
    else:
        return read_record(hint, value)
    raise ValueError(f"{name}: expected {_describe(hint)}, got {value!r:.40}")


def _describe(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint).replace("typing.", "")
