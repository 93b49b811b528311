"""`groktrace follow`: analyse a recording while it goes on."""

import os
import sys
from pathlib import Path
from typing import Any

import click

from groktrace.cli.options import ANALYSIS, RUN, Command, as_keywords, options
from groktrace.cli.results import finish, more_reporters, write_logs


@click.command("follow", cls=Command)
@RUN
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line, the result last.")
@click.option("--timeout", type=float, help="Seconds without a new snapshot until it ends [none].")
@options(*ANALYSIS)
def command(
    run: Path | str,
    as_json: bool,
    timeout: float | None,
    logdir: Path | None,
    wandb: str | None,
    as_csv: bool,
    **given: Any,
) -> None:
    """Analyse the snapshots of RUN as they appear, until its recording is closed."""
    from groktrace.analysis.follow import follow, wait_for_run
    from groktrace.reporting.events import show_events
    from groktrace.run.store import open_run

    with as_keywords(given) as keywords:
        reporters = more_reporters(wandb)
        if isinstance(run, Path):
            if not run.exists():
                click.echo(f"{run}: not there yet; waits for a recording to begin", err=True)
            wait_for_run(run, timeout)
        opened = open_run(run)
        os.nice(19)  # the training goes first
        events = follow(opened, timeout=timeout, **keywords)
        trajectory = show_events(events, lambda trajectory: write_logs(trajectory, opened, logdir), as_json, sys.stdout)
    finish(trajectory, opened.refreshed(), logdir, as_json, as_csv, reporters, keywords["keep"] is not None)
