"""Progress of work that goes from phase to phase."""

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from groktrace.reporting.progress import Progress


class Phases:
    """One progress display after another, as work goes from phase to phase.

    Args:
        opening: a line that is shown before the first, if any.
    """

    def __init__(self, opening: str | None = None) -> None:
        self._opening = opening
        self._label: str | None = None
        self._done = 0
        self._display: Progress | None = None

    def __enter__(self) -> "Phases":
        return self

    def __exit__(self, *error: object) -> None:
        if self._display is not None:
            self._display.__exit__(*error)

    def report(self, phase: str, done: int, total: int) -> None:
        """Show that `done` of `total` have passed `phase`."""
        from groktrace.reporting.progress import Progress

        if phase != self._label or self._display is None:
            self.__exit__(None, None, None)
            if self._label is None and self._opening is not None:
                click.echo(self._opening, err=True)
            self._label, self._done = phase, 0
            self._display = Progress(total, phase).__enter__()
        self._display.advance(done - self._done)
        self._done = done
