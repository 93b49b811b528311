"""Progress callbacks: called with (phase, done, total)."""

import contextlib
from collections.abc import Callable, Iterator

ProgressCallback = Callable[[str, int, int], None]
# Work that is done sooner shows nothing.
QUIET_SECONDS = 2.0


def silent(phase: str, done: int, total: int) -> None:
    """Report no progress."""


@contextlib.contextmanager
def shown(progress: ProgressCallback | bool | None) -> Iterator[ProgressCallback]:
    """What to call with (phase, done, total); without a function of the user's, it shows them on standard error.

    Args:
        progress: a function, or False to show nothing.
    """
    if callable(progress):
        yield progress
    elif progress is False:
        yield silent
    else:
        from groktrace.reporting.progress import Phases  # built on this package: only where it is called

        with Phases(quiet_seconds=QUIET_SECONDS) as phases:
            yield phases.report
