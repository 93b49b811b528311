"""`groktrace analyze`: from snapshots to a trajectory and its transitions."""

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from groktrace.cli.options import ANALYSIS, JSON, RUN, Command, ExpertOption, as_keywords, options
from groktrace.cli.results import finish, write_logs

if TYPE_CHECKING:
    from groktrace.reporting.progress import Progress


@click.command("analyze", cls=Command)
@RUN
@JSON
@click.option("--time", "minutes", type=float, default=10.0, show_default=True, help="Minutes after which it stops.")
@click.option(
    "--adaptive",
    cls=ExpertOption,
    is_flag=True,
    help="Sample at most a tenth of the snapshots: those that date transitions.",
)
@options(*ANALYSIS)
def command(run: Path | str, as_json: bool, minutes: float, adaptive: bool, logdir: Path | None, **given: Any) -> None:
    """Replay the snapshots of RUN into an LLC trajectory, find its phase transitions, write TensorBoard files."""
    from groktrace.analysis.replay import analyze
    from groktrace.reporting.console import opening_line
    from groktrace.run.store import open_run

    if not minutes > 0:
        raise click.UsageError(f"--time: expected a positive number of minutes, got {minutes:g}")
    with as_keywords(given) as keywords, contextlib.ExitStack() as held:
        opened = open_run(run)
        trajectory = analyze(
            opened,
            progress=held.enter_context(_Phases(opening_line(opened))).report,
            adaptive=adaptive,
            time_limit=60 * minutes,
            partial=lambda trajectory: write_logs(trajectory, opened, logdir),
            **keywords,
        )
    finish(trajectory, opened, logdir, as_json)


class _Phases:
    """One progress display after another, as an analysis goes from phase to phase.

    Args:
        opening: a line that is shown before the first.
    """

    def __init__(self, opening: str) -> None:
        self._opening = opening
        self._label: str | None = None
        self._done = 0
        self._display: Progress | None = None

    def __enter__(self) -> "_Phases":
        return self

    def __exit__(self, *error: object) -> None:
        if self._display is not None:
            self._display.__exit__(*error)

    def report(self, phase: str, done: int, total: int) -> None:
        """Show that `done` of `total` snapshots have passed `phase`."""
        from groktrace.reporting.progress import Progress

        if phase != self._label or self._display is None:
            self.__exit__(None, None, None)
            if self._label is None:
                click.echo(self._opening, err=True)
            self._label, self._done = phase, 0
            self._display = Progress(total, phase).__enter__()
        self._display.advance(done - self._done)
        self._done = done
