"""`groktrace show`: the last result as text."""

import json
from pathlib import Path

import click

from groktrace.cli.options import JSON, RUN, Command
from groktrace.cli.results import exit_incomplete


@click.command("show", cls=Command)
@RUN
@JSON
@click.option("--csv", "as_csv", is_flag=True, help="Print comma-separated values, one snapshot a line.")
def command(run: Path | str, as_json: bool, as_csv: bool) -> None:
    """Print the trajectory and the transitions that were last found for RUN."""
    from groktrace.reporting import console, csv
    from groktrace.reporting.series import Events, Series
    from groktrace.run.store import open_run

    if as_json and as_csv:
        raise click.UsageError("--json or --csv, not both")
    opened = open_run(run)
    trajectory = opened.trajectory()
    series = Series.of(trajectory)
    if as_csv:
        click.echo(csv.as_csv(series), nl=False)
    elif as_json:
        click.echo(json.dumps(console.as_json(series, Events.of(trajectory)), allow_nan=False))
    else:
        console.ConsoleReporter().report(series, Events.of(trajectory), opened.root)
    exit_incomplete(trajectory, opened)
