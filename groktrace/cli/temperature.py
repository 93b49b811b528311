"""`groktrace temperature`: λ̂ of one snapshot at several temperatures."""

import json
from pathlib import Path
from typing import Any

import click

from groktrace.cli.options import COMPUTING, DATA, JSON, RUN, SAMPLING, Command, as_keywords, options


@click.command("temperature", cls=Command)
@RUN
@click.argument("step", type=int)
@JSON
@options(*DATA, *COMPUTING, *SAMPLING)
def command(run: Path | str, step: int, as_json: bool, **given: Any) -> None:
    """Print λ̂ of the snapshot of STEP in RUN at several nβ and, of at most 500 weights, its limit λ."""
    from groktrace.analysis.temperature import temperature_curve_at
    from groktrace.reporting.console import temperature_table
    from groktrace.reporting.progress import Phases
    from groktrace.run.store import open_run

    with as_keywords(given) as keywords:
        opened = open_run(run)
        with Phases() as phases:
            curve = temperature_curve_at(opened, step, progress=phases.report, **keywords)
    click.echo(json.dumps(curve.to_dict(), allow_nan=False) if as_json else temperature_table(curve))
