"""`groktrace analyze`: from snapshots to a trajectory and its transitions."""

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from groktrace.cli.options import (
    BESIDE,
    COMPUTING,
    JSON,
    NBETA,
    PRESET,
    RUN,
    SAMPLING,
    WORKERS,
    Command,
    ExpertOption,
    load_task,
    options,
    sampling_settings,
    set_threads,
)
from groktrace.cli.results import finish, more_reporters, write_logs

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
@options(PRESET, *COMPUTING, *WORKERS, *BESIDE, NBETA, *SAMPLING)
def command(
    run: Path | str,
    as_json: bool,
    minutes: float,
    adaptive: bool,
    preset: str,
    device: str | None,
    threads: int | None,
    task: str | None,
    jobs: int,
    dask: str | None,
    logdir: Path | None,
    wandb: str | None,
    as_csv: bool,
    reference: float | Literal["jacobian"] | None,
    curvature: bool,
    **given: Any,
) -> None:
    """Replay the snapshots of RUN into an LLC trajectory, find its phase transitions, write TensorBoard files."""
    from groktrace.analysis.replay import analyze
    from groktrace.analysis.workers import dask_executor
    from groktrace.reporting.console import opening_line
    from groktrace.run.store import open_run

    set_threads(threads)
    if not minutes > 0:
        raise click.UsageError(f"--time: expected a positive number of minutes, got {minutes:g}")
    settings, opened = sampling_settings(given, preset), open_run(run)
    loaded, reporters = load_task(task), more_reporters(wandb)
    with contextlib.ExitStack() as held:
        executor = None if dask is None else held.enter_context(dask_executor(dask))
        trajectory = analyze(
            opened,
            task=loaded,
            task_name=task,
            device=device,
            progress=held.enter_context(_Phases(opening_line(opened))).report,
            reference=reference,
            curvature=curvature,
            adaptive=adaptive,
            jobs=jobs,
            executor=executor,
            time_limit=60 * minutes,
            partial=lambda trajectory: write_logs(trajectory, opened, logdir),
            settings=settings,
        )
    finish(trajectory, opened, logdir, as_json, as_csv, reporters)


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
