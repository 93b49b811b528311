"""`groktrace compare`: the last results of several runs."""

import json
from pathlib import Path

import click

from groktrace.cli.options import FIGURE_FILE, JSON, Command


@click.command("compare", cls=Command)
@click.argument("runs", metavar="RUN...", nargs=-1, required=True)
@JSON
@click.option("-o", "--output", type=FIGURE_FILE, help="Draw their curves too: a .png, .pdf or .svg file.")
@click.option(
    "--group-by",
    metavar="KEY",
    help="Put runs together by a setting, such as lr, weight_decay or n [those that differ in their seed only].",
)
@click.option("--analyses", is_flag=True, help="Show all analyses of each run: on other data, of other weights.")
@click.option("--logdir", type=click.Path(path_type=Path), help="Write each group's mean there, for TensorBoard.")
def command(
    runs: tuple[str, ...],
    as_json: bool,
    output: Path | None,
    group_by: str | None,
    analyses: bool,
    logdir: Path | None,
) -> None:
    """Put the results that were last found for several runs side by side: seeds, learning rates, controls.

    Of runs that differ in their seed only, mean and spread are shown.
    """
    from groktrace.reporting.comparison import compare
    from groktrace.reporting.tensorboard import COLOURS

    found = compare(*runs, group_by=group_by, analyses=analyses)
    if output is not None:
        found.plot(output)
    if logdir is not None:
        found.to_tensorboard(logdir)
    if as_json:
        click.echo(json.dumps(found.to_dict(), allow_nan=False))
        return
    click.echo(found.table())
    if output is not None:
        click.echo(f"\nFigure: {output}")
    if logdir is not None:
        click.echo(f"\nSee it:  tensorboard --logdir {logdir}\nthen:    http://localhost:6006/{COLOURS}")
