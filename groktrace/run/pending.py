"""Recordings in progress in this process, flushed before a run is read, so that readers see every snapshot."""

import contextlib
import os
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path

from groktrace.run.remote import is_url

_flushes: dict[str, "weakref.WeakMethod[Callable[[], None]]"] = {}
_elsewhere: dict[str, str] = {}


def register(place: Path | str, flush: Callable[[], None], requested: Path | str | None = None) -> None:
    """Have `flush` called before the run is read.

    Args:
        place: the run directory or its URL.
        flush: a method; its object is not kept alive by this.
        requested: the place that was requested for, where an earlier run is if it is another one.
    """
    _flushes[_key(place)] = weakref.WeakMethod(flush)
    if requested is not None:
        _elsewhere.pop(_key(requested), None)
        if requested != place:
            _elsewhere[_key(requested)] = str(place)


def forget(place: Path | str, flush: Callable[[], None]) -> None:
    """Undo `register`; another one's stays."""
    known = _flushes.get(_key(place))
    if known is not None and known() in (None, flush):
        del _flushes[_key(place)]


def flush(place: Path | str) -> None:
    """Wait until what is being recorded at `place` is written; warn once where this process recorded beside it.

    Args:
        place: a directory or a URL.
    """
    if (other := _elsewhere.pop(_key(place), None)) is not None:
        warnings.warn(
            f"groktrace: '{place}' is an earlier run; what was recorded here is in '{other}' (recorder.out).",
            RuntimeWarning,
            stacklevel=3,
        )
    known = _flushes.get(_key(place))
    method = None if known is None else known()
    if method is not None:
        method()


def _key(place: Path | str) -> str:
    if is_url(place):
        return str(place).rstrip("/")
    with contextlib.suppress(OSError, ValueError):
        return os.path.realpath(Path(place).expanduser())
    return str(place)
