"""`groktrace plot`: the last result as a figure."""

from pathlib import Path

import click

from groktrace.cli.options import FIGURE_FILE, RUN, Command


@click.command("plot", cls=Command)
@RUN
@click.option("-o", "--output", type=FIGURE_FILE, required=True, help="A .png, .pdf or .svg file.")
def command(run: Path | str, output: Path) -> None:
    """Draw the trajectory that was last found for RUN."""
    from groktrace.run.store import open_run

    open_run(run).trajectory().plot(output)
    click.echo(f"Figure: {output}")
