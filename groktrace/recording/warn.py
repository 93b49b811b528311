"""Warnings to the user whose training is recorded; none of them ever raises."""

import contextlib
import os
import sys
import warnings
from collections.abc import Callable


def warn_user(message: str) -> None:
    """Issue a RuntimeWarning, or print it where warnings are errors: recording must not stop a training."""
    try:
        warnings.warn(f"groktrace: {message}", RuntimeWarning, stacklevel=2)
    except RuntimeWarning:
        print(f"groktrace: {message}", file=sys.stderr)


def say(message: str) -> None:
    """Print a line on stderr: of what is as it should be, but not as it was asked for."""
    with contextlib.suppress(OSError, ValueError):  # a stream that is closed
        print(f"groktrace: {message}", file=sys.stderr, flush=True)


class WarnOnce:
    """Warns of each kind of trouble once."""

    def __init__(self) -> None:
        self._kinds: set[str] = set()

    def __call__(self, kind: str, message: str) -> None:
        """Warn, unless there was a warning of this kind before."""
        self.first(kind, message)

    def first(self, kind: str, message: str) -> bool:
        """Warn, unless there was a warning of this kind before; whether there was none."""
        if kind in self._kinds:
            return False
        self._kinds.add(kind)
        warn_user(message)
        return True

    def silence(self, kind: str) -> None:
        """Do not warn of this kind of trouble any more."""
        self._kinds.add(kind)

    def on_failure(self, action: Callable[[], None]) -> None:
        """Run an action, and warn where it fails."""
        try:
            action()
        except Exception as failure:
            self.of_failure(failure)

    def of_failure(self, failure: Exception) -> None:
        """Warn that recording failed."""
        self("recording", f"recording failed ({type(failure).__name__}: {failure}); training goes on.")


class Doubts:
    """Warns, once of each kind, of what speaks against a run, and has it kept with the run.

    Args:
        warn_once: warns.
        mark: takes the step and a text that the analysis repeats; None in processes that do not write: they are silent.
        steps: the number of updates so far.
    """

    def __init__(self, warn_once: WarnOnce, mark: Callable[[int, str], None] | None, steps: Callable[[], int]) -> None:
        self._warn_once, self._mark, self._steps = warn_once, mark, steps
        self._pid = os.getpid()

    def __call__(self, kind: str, text: str) -> None:
        """Warn, and have it kept, unless there was a warning of this kind before."""
        # A forked child inherits the hooks, but not the thread that writes.
        if self._mark is not None and os.getpid() == self._pid and self._warn_once.first(kind, text):
            self._mark(self._steps(), text)
