"""`groktrace check`: whether a run directory is whole."""

import sys
from pathlib import Path

import click

from groktrace.cli.options import RUN, Command
from groktrace.cli.results import INCOMPLETE
from groktrace.errors import SnapshotError, TaskError


@click.command("check", cls=Command)
@RUN
def command(run: Path | str) -> None:
    """Read every file of RUN and verify it against its digests."""
    from groktrace.run.store import open_run

    opened = open_run(run)
    damaged = []
    for snapshot in opened.snapshots:
        try:
            snapshot.load()
        except SnapshotError as failure:
            damaged.append(str(failure))
    whole = len(opened.snapshots) - len(damaged)
    click.echo(f"{run}: {whole} of {len(opened.snapshots)} snapshots whole")
    try:
        task = opened.task
        click.echo(f"model, loss and data: whole ({len(task.train)} of {task.n} training samples kept)")
    except TaskError as failure:
        click.echo(f"model, loss and data: not recorded ({failure})")
    for line in damaged:
        click.echo(line, err=True)
    if damaged:
        sys.exit(INCOMPLETE)
