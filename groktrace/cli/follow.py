"""`groktrace follow`: analyse a recording while it goes on."""

import contextlib
import os
import sys
from pathlib import Path
from typing import Any, Literal

import click

from groktrace.cli.options import (
    BESIDE,
    COMPUTING,
    NBETA,
    PRESET,
    RUN,
    SAMPLING,
    WORKERS,
    Command,
    load_task,
    options,
    sampling_settings,
    set_threads,
)
from groktrace.cli.results import finish, more_reporters, write_logs


@click.command("follow", cls=Command)
@RUN
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line, the result last.")
@click.option("--timeout", type=float, help="Seconds without a new snapshot until it ends [none].")
@options(PRESET, *COMPUTING, *WORKERS, *BESIDE, NBETA, *SAMPLING)
def command(
    run: Path | str,
    as_json: bool,
    timeout: float | None,
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
    """Analyse the snapshots of RUN as they appear, until its recording is closed."""
    from groktrace.analysis.follow import follow, wait_for_run
    from groktrace.analysis.workers import dask_executor
    from groktrace.reporting.live import show_events
    from groktrace.run.store import open_run

    set_threads(threads)
    settings, reporters = sampling_settings(given, preset), more_reporters(wandb)
    if isinstance(run, Path):
        wait_for_run(run, timeout)
    opened = open_run(run)
    loaded = load_task(task)
    with contextlib.ExitStack() as held:
        executor = None if dask is None else held.enter_context(dask_executor(dask))
        os.nice(19)  # the training goes first
        events = follow(
            opened,
            timeout=timeout,
            task=loaded,
            task_name=task,
            device=device,
            reference=reference,
            curvature=curvature,
            jobs=jobs,
            executor=executor,
            settings=settings,
        )
        trajectory = show_events(events, lambda trajectory: write_logs(trajectory, opened, logdir), as_json, sys.stdout)
    finish(trajectory, opened.refreshed(), logdir, as_json, as_csv, reporters)
