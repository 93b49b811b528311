"""`groktrace compare`: the last results of several runs."""

import json
from pathlib import Path

import click

from groktrace.cli.options import FIGURE_FILE, JSON, Command


@click.command("compare", cls=Command)
@click.argument("runs", metavar="RUN...", nargs=-1, required=True)
@JSON
@click.option("-o", "--output", type=FIGURE_FILE, help="Draw their curves too: a .png, .pdf or .svg file.")
def command(runs: tuple[str, ...], as_json: bool, output: Path | None) -> None:
    """Put the results that were last found for several runs side by side: seeds, learning rates, controls."""
    from groktrace.reporting.comparison import compare

    found = compare(*runs)
    if output is not None:
        found.plot(output)
    if as_json:
        click.echo(json.dumps(found.to_dict(), allow_nan=False))
        return
    click.echo(found.table())
    if output is not None:
        click.echo(f"\nFigure: {output}")
